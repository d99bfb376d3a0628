"""Position tables that a front end adds to its tokens, and position ids for padded, packed and cached sequences."""

import itertools
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .call import pad_row, stock_forward
from .checks import check_integers
from .modes import can_read
from .reference import sinusoids

KINDS = ("learned", "sinusoidal")
CONVENTIONS = ("interleaved", "fairseq", "marian")


def _check_size(name: str, size: Any, least: int) -> None:
    if not isinstance(size, Integral | torch.SymInt) or isinstance(size, bool):
        raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {size}")


def sinusoidal_table(
    max_length: int, embedding_dim: int, base: float = 10_000.0, convention: str = "interleaved", padding_idx: int | None = None
) -> Tensor:
    """(max_length, embedding_dim) float32: sin and cos of t·f(i) for position t and frequency f(i), computed in float64.

    Conventions, for D = embedding_dim:
    "interleaved" (Vaswani et al. 2017, section 3.5; XLM, DistilBERT): f(i) = base^(−2i/D), sin in column 2i, cos in 2i+1.
    "marian": the same frequencies, first all sines, then all cosines. In both, an odd D has one sine more than cosines.
    "fairseq" (tensor2tensor, fairseq, M2M100): f(i) = base^(−i/(⌊D/2⌋−1)), first all sines, then all cosines, and a column of
    zeros if D is odd. For D = 2 and 3 the only frequency is 1, as in tensor2tensor; fairseq and M2M100 divide by zero there.

    Row padding_idx (negative: counted from the end) is zero. TypeError: a size that is not an int. ValueError: a size below 1,
    a base that is not positive, an unknown convention, a padding_idx outside the table.
    """
    _check_size("max_length", max_length, 1)
    row = pad_row(padding_idx, max_length)
    angle = torch.outer(
        torch.arange(max_length, dtype=torch.float64, device="cpu"), _frequencies(embedding_dim, base, convention)
    )
    table = _columns(angle.sin(), angle.cos(), embedding_dim, convention).float()
    if row >= 0:
        table[row] = 0
    return table


def sinusoidal_steps(embedding_dim: int, base: float = 10_000.0, convention: str = "interleaved") -> Tensor:
    """(2, embedding_dim) int64: passed as `position` to functional.embed or embed_qkv, it makes them compute the rows of
    sinusoidal_table, of any position, without a table.

    Row 0: by how much the phase of each column grows per position; row 1: its phase at position 0. The unit is 2⁻⁶⁴ of a full
    turn, so t·step + start wraps around in int64 exactly as the phase does. Errors as in sinusoidal_table.
    """
    turns = _frequencies(embedding_dim, base, convention) / (2 * math.pi)
    # Exact: a float64 is an integer times a power of two, and reducing it to int64 removes full turns only.
    whole = [(int(turn * 2.0**64) + 2**63) % 2**64 - 2**63 for turn in turns.tolist()]
    step = torch.tensor(whole, dtype=torch.int64, device="cpu")
    start = torch.full_like(step, 2**62)  # cos(x) = sin(x + a quarter of a turn)
    return torch.stack([_columns(*pair, embedding_dim, convention) for pair in ((step, step), (start * 0, start))])


def _frequencies(embedding_dim: int, base: float, convention: str) -> Tensor:
    """float64: the frequency of each (sine, cosine) pair; (⌈D/2⌉,), for "fairseq" (⌊D/2⌋,)."""
    _check_size("embedding_dim", embedding_dim, 1)
    if not base > 0:
        raise ValueError(f"base: expected a number above 0, got {base}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {CONVENTIONS}, got {convention!r}")
    if convention == "fairseq":
        half = embedding_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device="cpu") / max(half - 1, 1)
    else:
        exponent = torch.arange(0, embedding_dim, 2, dtype=torch.float64, device="cpu") / embedding_dim
    return base**-exponent


def _columns(sines: Tensor, cosines: Tensor, embedding_dim: int, convention: str) -> Tensor:
    """Sines and cosines in the convention's order, padded or cut to embedding_dim: for an odd one fairseq has a column too few,
    the others a cosine too many."""
    waves = sines, cosines
    table = torch.stack(waves, -1).flatten(-2) if convention == "interleaved" else torch.cat(waves, -1)
    return nn.functional.pad(table, (0, embedding_dim - table.shape[-1]))


class Sinusoidal(nn.Module):
    """Fixed sinusoidal positions. The buffer `weight`, not in state_dict, holds sinusoidal_table (max_length, embedding_dim) in
    dtype, or, if max_length is None, sinusoidal_steps (2, embedding_dim), which give the row of any position. Other arguments
    and errors as in sinusoidal_table.
    """

    weight: Tensor

    def __init__(
        self,
        max_length: int | None,
        embedding_dim: int,
        convention: str = "interleaved",
        base: float = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.convention, self.base = convention, base
        self.dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else device
        with torch.inference_mode(False):  # a tensor made in it cannot be saved for a backward
            if max_length is None:
                weight = sinusoidal_steps(embedding_dim, base, convention).to(device)
            else:
                weight = sinusoidal_table(max_length, embedding_dim, base, convention).to(device, self.dtype)
        self.register_buffer("weight", weight, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sinusoidal":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.weight.is_meta:
            return self
        # Computed anew: to_empty() leaves the buffer uninitialised, and casting a cast table would round twice.
        max_length, embedding_dim = self.weight.shape
        fresh = sinusoidal_table(max_length, embedding_dim, self.base, self.convention) if self.is_table else self._steps()
        with torch.inference_mode(False):
            if self.weight.is_inference():  # it was moved in that mode
                self.weight = torch.empty_like(self.weight)
            self.weight.copy_(fresh)
        return self

    @property
    def is_table(self) -> bool:
        """Whether weight is a table, not steps."""
        return self.weight.is_floating_point()

    def _steps(self) -> Tensor:
        return sinusoidal_steps(self.weight.shape[1], self.base, self.convention)

    @stock_forward
    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids (...) int32 or int64 -> (..., embedding_dim) in dtype."""
        if self.is_table:
            return nn.functional.embedding(position_ids, self.weight)
        return sinusoids(self.weight, position_ids, self.dtype)

    def extra_repr(self) -> str:
        size = ", ".join(map(str, self.weight.shape)) if self.is_table else f"None, {self.weight.shape[1]}"
        return f"{size}, convention={self.convention!r}"


def make(
    kind: str | None,
    max_length: int | None,
    embedding_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """The module for position=kind, which is "learned", "sinusoidal", "sinusoidal:<convention>" or None. ValueError: others."""
    if kind is None:
        return None
    if kind == "learned":
        if max_length is None:
            raise TypeError("max_length: expected an int, got NoneType")
        return nn.Embedding(max_length, embedding_dim, device=device, dtype=dtype)
    name, _, convention = str(kind).partition(":")
    if name == "sinusoidal":
        return Sinusoidal(max_length, embedding_dim, convention or "interleaved", device=device, dtype=dtype)
    kinds, conventions = (", ".join(map(repr, names)) for names in (KINDS, [f"sinusoidal:{c}" for c in CONVENTIONS]))
    raise ValueError(
        f"position: expected {kinds} or None, got {kind!r}; conventions are {conventions}; EmbeddingQKV also takes 'rotary'"
    )


def from_attention_mask(mask: Tensor) -> Tensor:
    """Position ids that count the tokens of each sequence, without padding, and are 0 at padding; as Hugging Face's generate
    has them for left padding.

    mask (B, T) bool or integer, 0 = padding -> (B, T) int64. A decode step takes the last columns. No host synchronisation.
    TypeError: another dtype. ValueError: another shape.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a Tensor, got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected dtype torch.bool or an integer one, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape (batch, length), got {tuple(mask.shape)}")
    is_token = mask != 0
    return (_count(is_token) - 1) * is_token


def from_input_ids(ids: Tensor, padding_idx: int, offset: int | Tensor = 0) -> Tensor:
    """Position ids that count the tokens of each sequence, without padding, from padding_idx + 1 on, and are padding_idx at
    padding: fairseq's make_positions, transformers' create_position_ids_from_input_ids (RoBERTa, XLM-R, CamemBERT, Longformer,
    MPNet, M2M100).

    ids (..., T) int32 or int64 -> int64 of the same shape. offset: how many tokens lie before these in a key-value cache, an
    int or a tensor as in from_offset, one per sequence or one for all. No host synchronisation.
    The first rows of such a table, 0 … padding_idx, are counted in these positions, so a front end's position_offset must be 0;
    a table of sines is sinusoidal_table(…, "fairseq", padding_idx), which is zero at padding.
    TypeError, ValueError: another type, shape or device, a negative padding_idx or int offset.
    """
    check_integers("ids", ids)
    _check_size("padding_idx", padding_idx, 0)
    _check_offset(offset)
    if isinstance(offset, Tensor):
        if offset.device != ids.device:
            raise ValueError(f"offset: expected device {ids.device}, that of ids; got {offset.device}")
        if offset.dim() and offset.shape != ids.shape[:-1]:
            wanted = f"() or {tuple(ids.shape[:-1])}, that of ids without its length"
            raise ValueError(f"offset: expected shape {wanted}; got {tuple(offset.shape)}")
        offset = offset.unsqueeze(-1) if offset.dim() else offset
    is_token = ids != padding_idx
    return (_count(is_token) + offset) * is_token + padding_idx


def _count(is_token: Tensor) -> Tensor:
    """How many tokens each sequence has up to each place. In shards of a DTensor, cumsum(-1) is wrong in torch 2.13."""
    return is_token.cumsum(is_token.dim() - 1)


def from_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Position ids that restart at 0 in each sequence of a packed batch, as FlashAttention's varlen functions pack it.

    cu_seqlens (S+1,) int32 or int64: the first token of each sequence, and last the number of all tokens -> (tokens,) int64.
    Sequences may be empty. TypeError, ValueError: another type or shape. ValueError, for CPU tensors: values that do not start
    at 0, decrease, or do not end at `tokens`. On other devices values are not checked, and wrong ones give wrong positions.
    """
    check_integers("cu_seqlens", cu_seqlens)
    _check_size("tokens", tokens, 0)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if can_read(cu_seqlens):
        _check_cu_seqlens(cu_seqlens.tolist(), tokens)
    cu_seqlens = cu_seqlens.contiguous()  # searchsorted warns otherwise
    place = torch.arange(tokens, device=cu_seqlens.device)
    # right=True: of the sequences that start at one token, the last is the one that is not empty.
    return place - cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]


def _check_cu_seqlens(values: list[int], tokens: int) -> None:
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: expected 0 at its beginning, got {values[0]}")
    for i, (before, value) in enumerate(itertools.pairwise(values), 1):
        if value < before:
            raise ValueError(f"cu_seqlens: expected values that never decrease, got {value} after {before} at {i}")
    if values[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected tokens ({tokens}) at its end, got {values[-1]}")


def from_offset(offset: int | Tensor, length: int, device: torch.device | str | None = None) -> Tensor:
    """offset … offset+length−1: position ids of `length` tokens that follow `offset` tokens in a key-value cache.

    offset: an int or a 0-d int32 or int64 tensor -> (length,) int64; a (B,) tensor, one offset per sequence -> (B, length).
    A tensor's values are not read by the host, and the result is on its device: device may only name that one. TypeError,
    ValueError: another type, shape or device, a negative int or length.
    """
    _check_size("length", length, 0)
    _check_offset(offset)
    if not isinstance(offset, Tensor):
        return torch.arange(offset, offset + length, device=device)
    step = torch.arange(length, device=offset.device if device is None else device)
    if step.device != offset.device:
        raise ValueError(f"device: expected {offset.device}, that of offset, or None; got {step.device}")
    return offset.unsqueeze(-1) + step


def _check_offset(offset: Any) -> None:
    if not isinstance(offset, Tensor):
        _check_size("offset", offset, 0)
        return
    check_integers("offset", offset)
    if offset.dim() > 1:
        raise ValueError(f"offset: expected shape () or (batch,), got {tuple(offset.shape)}")
