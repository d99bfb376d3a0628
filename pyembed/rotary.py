"""Rotary position embedding (RoPE, Su et al. 2021): pairs of columns of query and key are rotated by angles that grow with the
position."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines that rotate the heads of query and key by position, for EmbeddingQKV and functional.embed_qkv.

    head_dim: width of a head; its first rotary_dim columns (default: all) are rotated, as in GPT-NeoX. interleaved: the pairs
    are columns (2i, 2i+1), as in the paper, Llama's original weights and GPT-J; else (i, i + rotary_dim/2), as in Hugging Face
    and GPT-NeoX. Pair i is rotated by position·base^(−2i/rotary_dim) radians, or by position·inv_freq[i] if inv_freq
    (rotary_dim/2,) is given, which serves linear, NTK, YaRN and Llama-3 scaling. scale multiplies cosines and sines (YaRN's
    attention_scaling). Buffers cos and sin (max_length, rotary_dim/2) are float32 whatever the model's dtype, computed from
    angles in float64, and not in state_dict. ValueError: an odd rotary_dim, or one below 2 or above head_dim, a
    max_length below 1, an inv_freq of another shape.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_length: int,
        base: float = 10_000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        inv_freq: Tensor | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim: expected an even number up to head_dim ({head_dim}), got {rotary_dim}")
        if max_length < 1:
            raise ValueError(f"max_length: expected a positive number, got {max_length}")
        if inv_freq is None:
            inv_freq = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)
        elif tuple(inv_freq.shape) != (rotary_dim // 2,):
            raise ValueError(f"inv_freq: expected shape {(rotary_dim // 2,)}, half of rotary_dim; got {tuple(inv_freq.shape)}")
        self.rotary_dim, self.interleaved, self.scale = rotary_dim, interleaved, scale
        self.inv_freq = inv_freq.detach().to("cpu", torch.float64)  # not a buffer, which .half() would round
        for name in ("cos", "sin"):
            empty = torch.empty(max_length, rotary_dim // 2, dtype=torch.float32, device=device)
            self.register_buffer(name, empty, persistent=False)
        self._fill()

    def _fill(self) -> None:
        angle = torch.outer(torch.arange(self.cos.shape[0], dtype=torch.float64, device="cpu"), self.inv_freq)
        if self.cos.is_meta:
            return
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            setattr(self, name, (table * self.scale).to(self.cos.device, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)
        self._fill()  # .half() has rounded the tables, to_empty() has left them uninitialised
        return self

    def extra_repr(self) -> str:
        return f"{self.cos.shape[0]}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"


Turns = tuple[Tensor | None, Tensor | None, Tensor | None, bool]  # cos, sin, turn_ids and interleaved of a call's Epilogue


def turns(rotary: Rotary | tuple[Tensor, Tensor] | None, ids: Tensor, position_ids: Tensor | None) -> Turns:
    """What turns the heads of ids (..., T): a Rotary at position_ids (None: 0 … T−1), or cosines and sines (T, R), (1, T, R) or
    (..., T, R) as transformers passes them, each row twice, half behind half. TypeError, ValueError: something else."""
    if rotary is None:
        return None, None, None, False
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a Tensor, got {type(ids).__name__}")
    if not isinstance(rotary, Rotary):
        pair = _checked_pair(rotary, ids)
        half = pair[0].shape[-1] // 2
        return pair[0][..., :half].to(torch.float32), pair[1][..., :half].to(torch.float32), None, False
    tables = rotary._buffers  # a module's attributes are slow
    cos, sin = tables["cos"], tables["sin"]
    assert cos is not None and sin is not None
    if position_ids is None:
        T = ids.shape[-1] if ids.dim() else 1
        cos, sin = cos[:T], sin[:T]
    return cos, sin, position_ids, rotary.interleaved


def _checked_pair(rotary: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(rotary, tuple | list) or len(rotary) != 2 or not all(isinstance(table, Tensor) for table in rotary):
        raise TypeError(f"rotary: expected a pyembed.Rotary or a (cos, sin) pair of Tensors, got {type(rotary).__name__}")
    (cos, sin), T = rotary, ids.shape[-1] if ids.dim() else 1
    width = cos.shape[-1] if cos.dim() else 0
    shapes = (T, width), (*(1,) * (ids.dim() - 1), T, width), (*ids.shape, width)
    if cos.shape != sin.shape or cos.shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"rotary: expected cos and sin of shape {wanted}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if not cos.is_floating_point() or not sin.is_floating_point() or cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: expected floating cos and sin that want no gradient: none is computed")
    if width % 2 or width == 0:
        raise ValueError(f"rotary: expected an even width of cos and sin, got {width}")
    if cos.device != sin.device:
        raise ValueError(f"rotary: expected cos and sin on one device, got {cos.device} and {sin.device}")
    return cos, sin
