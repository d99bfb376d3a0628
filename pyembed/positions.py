"""The kinds of position that a front end adds to its tokens, and the position ids of batches as they come."""

import itertools
import math
from numbers import Integral

import torch
from torch import Tensor, nn

from .checks import check_integers, padding_row
from .modes import can_read
from .reference import sinusoids

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
    padding_idx = padding_row(padding_idx, max_length)
    angle = torch.outer(
        torch.arange(max_length, dtype=torch.float64, device="cpu"), _frequencies(embedding_dim, base, convention)
    )
    table = _columns(angle.sin(), angle.cos(), embedding_dim, convention).float()
    if padding_idx is not None:
        table[padding_idx] = 0
    return table


def sinusoidal_steps(embedding_dim: int, base: float = 10_000.0, convention: str = "interleaved") -> Tensor:
    """(2, embedding_dim) int64, from which the same rows are computed at any position, without a table, as `position` of
    functional.embed and embed_qkv: by how much each column's phase grows from one position to the next, and where it begins, in
    units of 2⁻⁶⁴ turns, so that t·step + start drops whole turns without an error. Errors as in sinusoidal_table."""
    turns = _frequencies(embedding_dim, base, convention) / (2 * math.pi)
    # A float64 is an integer over a power of two; what int64 does not hold are whole turns.
    whole = [(int(turn * 2.0**64) + 2**63) % 2**64 - 2**63 for turn in turns.tolist()]
    step = torch.tensor(whole, dtype=torch.int64, device="cpu")
    start = torch.full_like(step, 2**62)  # a cosine is a sine a quarter of a turn later
    return torch.stack([_columns(*pair, embedding_dim, convention) for pair in ((step, step), (start * 0, start))])


def _frequencies(embedding_dim, base, convention):
    """float64, of the pairs of a sine and a cosine."""
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


def _columns(sines, cosines, embedding_dim, convention):
    """In a convention's order. An odd width: fairseq lacks a column, the others have a cosine too many."""
    waves = sines, cosines
    table = torch.stack(waves, -1).flatten(-2) if convention == "interleaved" else torch.cat(waves, -1)
    return nn.functional.pad(table, (0, embedding_dim - table.shape[-1]))


class Sinusoidal(nn.Module):
    """A fixed table of positions; `weight` (max_length, embedding_dim) is a buffer that state_dict leaves out.

    max_length None: no table but sinusoidal_steps as `weight`, from which rows are computed, of any position. Other arguments
    and errors as in sinusoidal_table.
    """

    def __init__(
        self, max_length: int | None, embedding_dim: int, convention="interleaved", base=10_000.0, device=None, dtype=None
    ):
        super().__init__()
        self.convention, self.base = convention, base
        self.dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else device
        if max_length is None:
            weight = sinusoidal_steps(embedding_dim, base, convention).to(device)
        else:
            weight = sinusoidal_table(max_length, embedding_dim, base, convention).to(device, self.dtype)
        self.register_buffer("weight", weight, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.weight.is_meta:
            return self
        # to_empty() leaves a buffer without values, and a cast would round twice
        fresh = sinusoidal_table(*self.weight.shape, self.base, self.convention) if self.is_table else self._steps()
        self.weight.copy_(fresh)
        return self

    @property
    def is_table(self):
        return self.weight.is_floating_point()

    def _steps(self):
        return sinusoidal_steps(self.weight.shape[1], self.base, self.convention)

    def forward(self, position_ids):
        """position_ids (...) -> (..., embedding_dim)."""
        if self.is_table:
            return nn.functional.embedding(position_ids, self.weight)
        return sinusoids(self.weight, position_ids, self.dtype)

    def extra_repr(self):
        size = ", ".join(map(str, self.weight.shape)) if self.is_table else f"None, {self.weight.shape[1]}"
        return f"{size}, convention={self.convention!r}"


def make(kind: str | None, max_length: int | None, embedding_dim: int, device=None, dtype=None) -> nn.Module | None:
    """The module behind position="learned" | "sinusoidal" | "sinusoidal:" and a convention | None. ValueError: another kind."""
    if kind is None:
        return None
    if kind == "learned":
        return nn.Embedding(max_length, embedding_dim, device=device, dtype=dtype)
    name, _, convention = str(kind).partition(":")
    if name == "sinusoidal":
        return Sinusoidal(max_length, embedding_dim, convention or "interleaved", device=device, dtype=dtype)
    kinds, conventions = (", ".join(map(repr, names)) for names in (KINDS, [f"sinusoidal:{c}" for c in CONVENTIONS]))
    raise ValueError(
        f"position: expected {kinds} or None, got {kind!r}; conventions are {conventions}; EmbeddingQKV also takes 'rotary'"
    )


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
    if can_read(cu_seqlens):
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
