"""Rotary position embedding (RoPE, Su et al. 2021): pairs of columns of query and key are rotated by angles that grow with the
position."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .modes import can_read
from .rotary_of import is_doubled, read_module


class Rotary(nn.Module):
    """Cosines and sines that rotate the heads of query and key by position, for EmbeddingQKV and functional.embed_qkv.

    head_dim: width of a head; its first rotary_dim columns (default: all) are rotated, as in GPT-NeoX. interleaved: the pairs
    are columns (2i, 2i+1), as in the paper, Llama's original weights, GPT-J, Cohere and GLM; else (None: not said)
    (i, i + rotary_dim/2), as in GPT-NeoX and most of Hugging Face. Pair i is rotated by position·base^(−2i/rotary_dim) radians,
    or by position·inv_freq[i] if inv_freq (rotary_dim/2,) is given; scale multiplies cosines and sines. Scaled frequencies
    mostly come with a factor or change with the length: from_module takes all of a model's own. Buffers cos and sin
    (max_length, rotary_dim/2) are float32 whatever the model's dtype, computed from angles in float64, and not in state_dict.
    TypeError: an inv_freq that is no Tensor. ValueError: an odd rotary_dim, or one below 2 or above head_dim, a max_length
    below 1, an inv_freq of another shape or without values (on meta).
    """

    cos: Tensor
    sin: Tensor
    _given: tuple[Tensor, Tensor] | None = None  # (max_length, rotary_dim/2) float32 on the CPU: what from_module found

    def __init__(
        self,
        head_dim: int,
        max_length: int,
        base: float = 10_000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool | None = None,
        inv_freq: Tensor | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim: expected an even number up to head_dim ({head_dim}), got {rotary_dim}")
        _check_length(max_length)
        if inv_freq is not None and not isinstance(inv_freq, Tensor):
            raise TypeError(f"inv_freq: expected a Tensor, got {type(inv_freq).__name__}")
        if inv_freq is None:
            inv_freq = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)
        elif tuple(inv_freq.shape) != (rotary_dim // 2,):
            raise ValueError(f"inv_freq: expected shape {(rotary_dim // 2,)}, half of rotary_dim; got {tuple(inv_freq.shape)}")
        elif inv_freq.is_meta:
            raise ValueError("inv_freq: expected frequencies, got a tensor on meta, which has no values")
        self.scale, self.inv_freq = scale, inv_freq.detach().to("cpu", torch.float64)  # no buffer, which .half() would round
        self._make(max_length, rotary_dim // 2, interleaved, device)

    def _make(self, rows: int, pairs: int, interleaved: bool | None, device: torch.device | str | None) -> None:
        self.rotary_dim, self.interleaved, self.is_told = 2 * pairs, bool(interleaved), interleaved is not None
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(rows, pairs, dtype=torch.float32, device=device), persistent=False)
        self._fill()

    @torch.inference_mode(False)  # a tensor made in it cannot be saved for a backward
    def _fill(self) -> None:
        if self.cos.is_meta:
            return
        for name, table in zip(("cos", "sin"), self._given or self._computed(), strict=True):
            setattr(self, name, table.to(self.cos.device, torch.float32))

    def _computed(self) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(self.cos.shape[0], dtype=torch.float64, device="cpu"), self.inv_freq)
        return angle.cos() * self.scale, angle.sin() * self.scale

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        max_length: int,
        *,
        layer_type: str | None = None,
        interleaved: bool | None = None,
        device: torch.device | str | None = None,
    ) -> "Rotary":
        """What a model's own rotary module computes for positions 0 … max_length−1, with all of its scaling (linear, YaRN,
        Llama 3, longrope, …): a copy of it is called, and its cosines and sines are kept as it gives them in float32.

        module(x, position_ids) -> (cos, sin) or (sin, cos), (1, T, R) or (1, T, R/2), as transformers' *RotaryEmbedding.
        layer_type: passed on to a module with frequencies for each type of layer (Gemma 3, ModernBERT). interleaved: as in
        Rotary; None: as apply_rotary… beside the module's class turns heads, which is tried. device: of the buffers.
        TypeError: a module that gives something else. ValueError: one without values (on meta), or whose parameters want a
        gradient, which none gets here; one whose angles change with the length (dynamic NTK, longrope: choose max_length up to
        the original length, or pass the module's (cos, sin) at each call); one with several positions for a token (multimodal);
        tables that are no rotation; heads that are turned otherwise, or in a way that nothing tells.
        """
        _check_length(max_length)
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a model's rotary nn.Module, got {type(module).__name__}")
        with torch.inference_mode(False), torch.no_grad():
            cos, sin, interleaved = read_module(module, max(max_length, 2), layer_type, interleaved)
            given = cos[:max_length].contiguous(), sin[:max_length].contiguous()
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._given = given
        self._make(max_length, cos.shape[1], interleaved, device)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)
        self._fill()  # .half() has rounded the tables, to_empty() has left them uninitialised
        return self

    def extra_repr(self) -> str:
        return f"{self.cos.shape[0]}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"


class CosSin(NamedTuple):
    """Cosines and sines of a call's tokens, in place of a plain (cos, sin), for models that lay them out or turn otherwise.

    cos, sin: (T, R), (1, T, R) or (..., T, R), the value of each pair of columns twice: half behind half (Llama, GLM) or side
    by side (Cohere); or, doubled=False, (..., T, R/2), each once (GPT-J, GPT-OSS, flash-attn). interleaved: the pairs are
    columns (2i, 2i+1) (Cohere, GLM, Helium, Ernie 4.5, GPT-J), else (i, i + R/2). Values laid out otherwise are a ValueError on
    a CPU and within debug(); elsewhere nothing waits for a device, and doubled ones make query and key NaN. Which columns are
    pairs cannot be seen from the values: GLM passes what Llama passes.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    doubled: bool = True


pytree._register_namedtuple(CosSin, serialized_type_name="pyembed.CosSin")  # torch.export writes its name

Pair = CosSin | tuple[Tensor, Tensor]
Turns = tuple[Tensor | None, Tensor | None, Tensor | None, bool]  # cos, sin, turn_ids and interleaved of a call's Epilogue


def turns(rotary: Rotary | Pair | None, ids: Tensor, position_ids: Tensor | None, interleaved: bool = False) -> Turns:
    """What turns the heads of ids (..., T): a Rotary at position_ids (None: 0 … T−1), or cosines and sines of each token, a
    CosSin or a plain (cos, sin), which is CosSin(cos, sin, interleaved). TypeError, ValueError: something else."""
    if rotary is None:
        return None, None, None, False
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a Tensor, got {type(ids).__name__}")
    if not isinstance(rotary, Rotary):
        pair = _checked_pair(rotary, ids, interleaved)
        cos, sin = _once(pair)
        return cos.to(torch.float32), sin.to(torch.float32), None, pair.interleaved
    tables = rotary._buffers  # a module's attributes are slow
    own_cos, own_sin = tables["cos"], tables["sin"]
    assert own_cos is not None and own_sin is not None
    if position_ids is None:
        T = ids.shape[-1] if ids.dim() else 1
        own_cos, own_sin = own_cos[:T], own_sin[:T]
    return own_cos, own_sin, position_ids, rotary.interleaved


def _once(pair: CosSin) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, R/2). ValueError: values laid out otherwise, where they can be read without waiting."""
    cos, sin, interleaved, doubled = pair
    half, readable = sin.shape[-1] // 2, can_read(sin)
    if not doubled:
        if readable and is_doubled(sin):
            raise ValueError("rotary: expected cos and sin with each value once where doubled=False, got each twice")
        return cos, sin
    # Sines tell more than cosines, which are 1 for all small angles.
    first, second = sin[..., :half], sin[..., half:]
    if not interleaved:
        if not readable:
            return cos[..., :half], _nan_unless_equal(first, second)
        if not torch.equal(first, second):
            raise ValueError(
                "rotary: expected cos and sin whose second half repeats the first, got others: pass pyembed.CosSin(cos, sin, "
                "interleaved=True) if columns (2i, 2i+1) are turned together, doubled=False if each value comes once"
            )
        return cos[..., :half], first
    left, right = sin[..., ::2], sin[..., 1::2]
    if not readable:
        beside = (left == right).all()
        halves = _nan_unless_equal(first, second)
        return torch.where(beside, cos[..., ::2], cos[..., :half]), torch.where(beside, left, halves)
    if torch.equal(left, right):
        return cos[..., ::2], left
    if torch.equal(first, second):
        return cos[..., :half], first
    raise ValueError(
        "rotary: expected cos and sin with each value twice, side by side or half behind half, got others: pass doubled=False "
        "if each comes once"
    )


def _nan_unless_equal(first: Tensor, second: Tensor) -> Tensor:
    """first, NaN where second is another: what a device tells of wrong values without a wait."""
    return torch.where(first == second, first, math.nan)


def _checked_pair(rotary: Any, ids: Tensor, interleaved: bool) -> CosSin:
    pair = rotary if isinstance(rotary, CosSin) else None
    if pair is None and isinstance(rotary, tuple | list) and len(rotary) == 2:
        pair = CosSin(rotary[0], rotary[1], interleaved)
    if pair is None or not isinstance(pair.cos, Tensor) or not isinstance(pair.sin, Tensor):
        raise TypeError(f"rotary: expected a pyembed.Rotary or a (cos, sin) pair of Tensors, got {type(rotary).__name__}")
    (cos, sin, *told), T = pair, ids.shape[-1] if ids.dim() else 1
    if not all(isinstance(value, bool) for value in told):
        raise TypeError(f"rotary: expected interleaved and doubled to be True or False, got {told[0]!r} and {told[1]!r}")
    width = cos.shape[-1] if cos.dim() else 0
    shapes = (T, width), (*(1,) * (ids.dim() - 1), T, width), (*ids.shape, width)
    if cos.shape != sin.shape or cos.shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"rotary: expected cos and sin of shape {wanted}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if not cos.is_floating_point() or not sin.is_floating_point() or cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: expected floating cos and sin that want no gradient: none is computed")
    if width % 2 and pair.doubled or width == 0:
        raise ValueError(f"rotary: expected an even width of cos and sin, got {width}")
    if cos.device != sin.device:
        raise ValueError(f"rotary: expected cos and sin on one device, got {cos.device} and {sin.device}")
    return pair


def _check_length(max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length: expected a positive number, got {max_length}")
