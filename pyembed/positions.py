"""The kinds of position that a front end adds to its tokens, and the position ids of batches as they come."""

import itertools
from numbers import Integral

import torch
from torch import Tensor, nn

from . import planner
from .functional import check_integers, padding_row

KINDS = ("learned", "sinusoidal")
CONVENTIONS = ("interleaved", "fairseq", "marian")


def _check_size(name, size, least):
    if not isinstance(size, Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {size}")


def sinusoidal_table(
    max_length: int,
    embedding_dim: int,
    base: float = 10_000.0,
    convention: str = "interleaved",
    padding_idx: int | None = None,
) -> Tensor:
    """(max_length, embedding_dim) float32: sin and cos of t·f(i), computed in float64, for position t and frequency f(i).

    "interleaved", as Vaswani et al. 2017 (section 3.5), XLM, DistilBERT: f(i) = base^(−2i/D), sin in column 2i, cos in 2i+1.
    "marian": the same frequencies, [sin | cos]. In both an odd width has one sine more than cosines.
    "fairseq", as tensor2tensor, fairseq, M2M100: f(i) = base^(−i/(⌊D/2⌋−1)), [sin | cos], an odd width ends with a zero. Of
    D = 2 and 3 the one frequency is 1, as in tensor2tensor; fairseq and M2M100 divide by zero.
    Row padding_idx (negative: from the end) is zero. ValueError: a size below 1, a base not above 0, another convention, a
    padding_idx outside of the table. TypeError: a size that is no int.
    """
    _check_size("max_length", max_length, 1)
    _check_size("embedding_dim", embedding_dim, 1)
    padding_idx = padding_row(padding_idx, max_length)
    if not base > 0:
        raise ValueError(f"base: expected a number above 0, got {base}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {CONVENTIONS}, got {convention!r}")
    if convention == "fairseq":
        half = embedding_dim // 2
        exponent = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
    else:
        exponent = torch.arange(0, embedding_dim, 2, dtype=torch.float64) / embedding_dim
    angle = torch.outer(torch.arange(max_length, dtype=torch.float64), base**-exponent)
    waves = angle.sin(), angle.cos()
    table = torch.stack(waves, -1).flatten(-2) if convention == "interleaved" else torch.cat(waves, -1)
    # An odd width: fairseq lacks a column, the others have a cosine too many.
    table = nn.functional.pad(table, (0, embedding_dim - table.shape[1])).float()
    if padding_idx is not None:
        table[padding_idx] = 0
    return table


class Sinusoidal(nn.Module):
    """A fixed table of positions; `weight` (max_length, embedding_dim) is a buffer that state_dict leaves out.

    Arguments and errors as in sinusoidal_table.
    """

    def __init__(self, max_length: int, embedding_dim: int, convention="interleaved", base=10_000.0, device=None, dtype=None):
        super().__init__()
        self.convention, self.base = convention, base
        table = sinusoidal_table(max_length, embedding_dim, base, convention)
        self.register_buffer("weight", table.to(device, dtype or torch.get_default_dtype()), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.weight.is_meta:  # to_empty() leaves a buffer without values, and a cast would round twice
            self.weight.copy_(sinusoidal_table(*self.weight.shape, self.base, self.convention))
        return self

    def forward(self, position_ids):
        return nn.functional.embedding(position_ids, self.weight)

    def extra_repr(self):
        return f"{', '.join(map(str, self.weight.shape))}, convention={self.convention!r}"


def make(kind: str | None, max_length: int, embedding_dim: int, device=None, dtype=None) -> nn.Module | None:
    """The module behind position="learned" | "sinusoidal" | "sinusoidal:" and a convention | None. ValueError: another kind."""
    if kind is None:
        return None
    if kind == "learned":
        return nn.Embedding(max_length, embedding_dim, device=device, dtype=dtype)
    name, _, convention = str(kind).partition(":")
    if name == "sinusoidal":
        return Sinusoidal(max_length, embedding_dim, convention or "interleaved", device=device, dtype=dtype)
    kinds, conventions = (", ".join(map(repr, names)) for names in (KINDS, [f"sinusoidal:{c}" for c in CONVENTIONS]))
    raise ValueError(f"position: expected {kinds} or None, got {kind!r}; conventions are {conventions}")


def from_attention_mask(mask: Tensor) -> Tensor:
    """Positions that count tokens only, 0 at padding, as Hugging Face's generate has them for left padding.

    mask (B, T) bool or integer, 0 = padding -> (B, T) int64. A decode step takes the last columns. Never synchronises.
    TypeError: another dtype; ValueError: another shape.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a Tensor, got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected dtype torch.bool or an integer one, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape (batch, length), got {tuple(mask.shape)}")
    is_token = mask != 0
    return (is_token.cumsum(-1) - 1) * is_token


def from_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Positions that restart at each of the sequences packed one after the other, as FlashAttention's varlen calls pack them.

    cu_seqlens (S+1,) int32 or int64: where each sequence begins, and their end, which is tokens -> (tokens,) int64. Sequences
    may be empty. ValueError: on CPU tensors, values that do not begin at 0, end at tokens and never decrease; on others
    nothing looks, and such values give wrong positions. TypeError, ValueError: another type or shape.
    """
    check_integers("cu_seqlens", cu_seqlens)
    _check_size("tokens", tokens, 0)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if planner.looks(cu_seqlens):
        _check_cu_seqlens(cu_seqlens.tolist(), tokens)
    cu_seqlens = cu_seqlens.contiguous()  # else searchsorted warns
    place = torch.arange(tokens, device=cu_seqlens.device)
    # right: of the sequences that begin here, the last is the one that is not empty.
    return place - cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]


def _check_cu_seqlens(values, tokens):
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: expected 0 at its beginning, got {values[0]}")
    for i, (before, value) in enumerate(itertools.pairwise(values), 1):
        if value < before:
            raise ValueError(f"cu_seqlens: expected values that never decrease, got {value} after {before} at {i}")
    if values[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected tokens ({tokens}) at its end, got {values[-1]}")


def from_offset(offset: int | Tensor, length: int, device=None) -> Tensor:
    """offset … offset+length−1, the positions of tokens that follow on a key-value cache.

    offset: an int or a 0-d int32 or int64 tensor -> (length,) int64; a (B,) tensor, one offset a sequence -> (B, length).
    A tensor is never looked at, and the result is on its device, the only one to ask for. TypeError, ValueError: another
    type, shape or device, a negative int or length.
    """
    _check_size("length", length, 0)
    if not isinstance(offset, Tensor):
        _check_size("offset", offset, 0)
        return torch.arange(offset, offset + length, device=device)
    check_integers("offset", offset)
    if offset.dim() > 1:
        raise ValueError(f"offset: expected shape () or (batch,), got {tuple(offset.shape)}")
    step = torch.arange(length, device=offset.device if device is None else device)
    if step.device != offset.device:
        raise ValueError(f"device: expected {offset.device}, that of offset, or None; got {step.device}")
    return offset.unsqueeze(-1) + step
