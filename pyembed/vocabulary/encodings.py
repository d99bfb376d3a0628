"""What an encoding has for each id: text, a part of a character, a special token, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken

FINE, SPECIAL, UNREACHABLE, FRAGMENT, NOTHING = "fine", "special", "unreachable", "fragment", "no token"
CATEGORIES = {
    FINE: "text that is encoded as this token",
    SPECIAL: "special tokens",
    UNREACHABLE: "text that is never encoded as this token",
    FRAGMENT: "bytes that are no UTF-8 by themselves",
    NOTHING: "ids that the encoding has no token for",
}
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def load(encoding: Any) -> tiktoken.Encoding:
    """encoding: a name, or the encoding itself. Errors as of data.get_encoding; TypeError: something else."""
    if isinstance(encoding, str):
        from ..data import get_encoding

        return get_encoding(encoding)
    if not hasattr(encoding, "decode_single_token_bytes"):
        raise TypeError(f"encoding: expected a name or a tiktoken.Encoding, got {type(encoding).__name__}")
    return encoding


def special_tokens(encoding: tiktoken.Encoding) -> dict[str, int]:
    return {token: encoding.encode_single_token(token) for token in sorted(encoding.special_tokens_set)}


def bytes_of(encoding: tiktoken.Encoding, id: int) -> bytes | None:
    """None: the encoding has no token for this id."""
    try:
        return encoding.decode_single_token_bytes(id)
    except KeyError:
        return None


def readable(data: bytes) -> str:
    """Bytes as UTF-8, with what is not as \\xNN."""
    return data.decode("utf-8", "backslashreplace")


def categorize(encoding: tiktoken.Encoding, rows: int) -> list[str]:
    """The category of each id under rows."""
    special = set(special_tokens(encoding).values())
    return [_category(encoding, id, special) for id in range(rows)]


def _category(encoding: tiktoken.Encoding, id: int, special: set[int]) -> str:
    data = bytes_of(encoding, id)
    if data is None:
        return NOTHING
    if id in special:
        return SPECIAL
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return FRAGMENT
    return FINE if encoding.encode_ordinary(text) == [id] else UNREACHABLE


def never_used(encoding: tiktoken.Encoding, rows: int) -> list[int]:
    """Ids under rows that no text has: those without a token, and single bytes that UTF-8 does not use (Unicode, table 3-7)."""
    found = []
    for id in range(rows):
        data = bytes_of(encoding, id)
        if data is None or len(data) == 1 and data[0] in NEVER_IN_UTF8:
            found.append(id)
    return found
