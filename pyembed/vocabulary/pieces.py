"""pieces(text) and traps(text): what an encoding makes of a text, and where that goes wrong."""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from .encodings import load, special_tokens
from .languages import ENGLISH, TRANSLATIONS, script_of

if TYPE_CHECKING:
    import tiktoken

SHOWN = 40  # characters of a text, and 5 of its parts, that a sentence quotes


class Piece(NamedTuple):
    """A token of a text. text: None where its bytes are no UTF-8 by themselves. start: of its bytes in the text's UTF-8."""

    id: int
    data: bytes
    text: str | None
    start: int


class Trap(NamedTuple):
    """name: trailing white space, digits, special token, fragments, beyond the table, Unicode form, or language; message: one
    sentence or two; values: the numbers in it, by name."""

    name: str
    message: str
    values: dict[str, Any]


def pieces(text: str, encoding: Any = "gpt2") -> list[Piece]:
    """The tokens of a text, special tokens in it being plain text. Half of a surrogate pair becomes U+FFFD, as tiktoken has it.

    encoding: a name for data.get_encoding, or a tiktoken.Encoding. TypeError: no str. Other errors as of get_encoding."""
    encoder = load(encoding)
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    ids = encoder.encode_ordinary(text)
    parts = [encoder.decode_single_token_bytes(id) for id in ids]
    starts = accumulate((len(data) for data in parts), initial=0)
    return [Piece(id, data, _decode(data), start) for id, data, start in zip(ids, parts, starts, strict=False)]


def traps(text: str, encoding: Any = "gpt2", model_size: int | None = None) -> list[Trap]:
    """What in a text a model may stumble over, for this encoding. model_size: rows of the model's table. Errors as of pieces;
    ValueError: model_size is no positive number.

    Digits are cut evenly where the cuts are between thousands. What a language costs is the tokens of one text in it for
    each token of its English original, Article 1 of the Universal Declaration of Human Rights: of the language that is most
    usual in the text's script, which may be another.
    """
    if model_size is not None and (isinstance(model_size, bool) or not isinstance(model_size, int) or model_size < 1):
        raise ValueError(f"model_size: expected a positive number, got {model_size!r}")
    encoder = load(encoding)
    found = pieces(text, encoder)
    text = b"".join(piece.data for piece in found).decode()  # without halves of surrogate pairs
    every = [
        _trailing(text, found),
        _digits(found),
        *_special(text, encoder),
        _fragments(found),
        _beyond(found, encoder, model_size),
        _form(text, found, encoder),
        _language(text, found, encoder),
    ]
    return [trap for trap in every if trap is not None]


def cost_of_languages(encoding: Any = "gpt2") -> dict[str, float]:
    """{language: tokens that a text takes in it, for each token of the English original}, for one text in 24 languages."""
    encoder = load(encoding)
    return {language: _times(encoder, text) for language, text in TRANSLATIONS.values()}


def _times(encoder: tiktoken.Encoding, text: str) -> float:
    return len(encoder.encode_ordinary(text)) / len(encoder.encode_ordinary(ENGLISH))


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _quote(text: str, shown: int = SHOWN) -> str:
    return repr(text if len(text) <= shown else "…" + text[-shown:])


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _trailing(text: str, found: list[Piece]) -> Trap | None:
    kept = text.rstrip()
    space = text[len(kept) :]
    if not space:
        return None
    end = len(kept.encode())
    ids = [piece.id for piece in found if piece.start + len(piece.data) > end]
    shown = _some([str(id) for id in ids])
    message = (
        f"The text ends in white space, {_quote(space)}, and so in the token{'s' * (len(ids) > 1)} {shown}: a model learned "
        "words that begin with their space, and continues badly after one. End the text before it."
    )
    return Trap("trailing white space", message, {"space": space, "ids": ids})


def _digits(found: list[Piece]) -> Trap | None:
    data = b"".join(piece.data for piece in found)
    cuts = {piece.start for piece in found}
    uneven = []
    for match in re.finditer(rb"[0-9]{2,}", data):
        start, end = match.span()
        inner = [cut for cut in range(start + 1, end) if cut in cuts]
        if any((end - cut) % 3 for cut in inner):
            uneven.append("|".join(data[a:b].decode() for a, b in pairwise([start, *inner, end])))
    if not uneven:
        return None
    message = (
        f"{count(len(uneven), 'number')} {_is(len(uneven))} cut elsewhere than between thousands, {_some(uneven)}: the same "
        "digit of another number is elsewhere in its token, which makes arithmetic hard. Separators, as in 1,234,567, help."
    )
    return Trap("digits", message, {"numbers": uneven})


def _special(text: str, encoder: tiktoken.Encoding) -> list[Trap]:
    made = []
    for token, id in special_tokens(encoder).items():
        if token not in text:
            continue
        ids = encoder.encode_ordinary(token)
        message = (
            f"The text spells the special token {token}, id {id}: as plain text it is {count(len(ids), 'token')}, allowed as "
            "special it is that one, and tiktoken's encode() refuses it by default. In text of others it may forge a turn."
        )
        made.append(Trap("special token", message, {"token": token, "id": id, "ids": ids}))
    return made


def _fragments(found: list[Piece]) -> Trap | None:
    ids = [piece.id for piece in found if piece.text is None]
    if not ids:
        return None
    message = (
        f"{len(ids):,} of {count(len(found), 'token')} {_is(len(ids))} no UTF-8 alone: characters are cut. Decode ids "
        "together, or keep bytes until a character is complete; one by one they become U+FFFD."
    )
    return Trap("fragments", message, {"ids": ids})


def _beyond(found: list[Piece], encoder: tiktoken.Encoding, size: int | None) -> Trap | None:
    ids = sorted({piece.id for piece in found if size is not None and piece.id >= size})
    if not ids:
        return None
    shown = _some([str(id) for id in ids])
    message = (
        f"The model's table has {size:,} rows, {encoder.name} has {encoder.n_vocab:,} ids, and {count(len(ids), 'id')} of "
        f"this text {_is(len(ids))} beyond it: {shown}. Take the encoding that the model was trained with, or grow the table."
    )
    return Trap("beyond the table", message, {"size": size, "ids": ids})


def _form(text: str, found: list[Piece], encoder: tiktoken.Encoding) -> Trap | None:
    composed = unicodedata.normalize("NFC", text)
    if composed == text:
        return None
    fewer = len(encoder.encode_ordinary(composed))
    message = (
        f"The text is not in Unicode's composed form, NFC: it is {count(len(found), 'token')}, against {fewer:,} in NFC, of "
        "other ids for the same letters. unicodedata.normalize('NFC', text) composes them."
    )
    return Trap("Unicode form", message, {"tokens": len(found), "composed": fewer})


def _language(text: str, found: list[Piece], encoder: tiktoken.Encoding) -> Trap | None:
    script = script_of(text)
    if script is None:
        return None
    language, sample = TRANSLATIONS[script]
    times = _times(encoder, sample)
    message = (
        f"In {encoder.name} {language} takes {times:.1f} times the tokens of English (Universal Declaration of Human Rights, "
        f"Article 1); this text is {count(len(found), 'token')} for {count(len(text), 'character')}."
    )
    values = {"language": language, "times": times, "tokens": len(found), "characters": len(text)}
    return Trap("language", message, values)
