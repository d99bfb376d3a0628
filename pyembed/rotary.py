"""Rotary position embedding (RoPE, Su et al. 2021): pairs of columns of query and key are rotated by angles that grow with the
position."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """What turns the heads of a batch: rows of cosines and sines, and which of them each token takes."""

    cos: Tensor  # (rows, R/2) float32
    sin: Tensor
    ids: Tensor | None  # (T,) or (M,): each token's row; None: token m takes row m % rows
    interleaved: bool  # pairs (2i, 2i+1); else (i, i + R/2)


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

    def rotation(self, ids: Tensor, position_ids: Tensor | None) -> Rotation:
        """The rotation of tokens ids (..., T) at position_ids: (T,), (1, T) or of ids' shape; None: 0 … T−1."""
        if position_ids is not None:
            return Rotation(self.cos, self.sin, position_ids.reshape(-1), self.interleaved)
        T = ids.shape[-1] if ids.dim() else 1
        tables: dict[str, Any] = self._buffers  # faster than self.cos, which goes through nn.Module.__getattr__
        return Rotation(tables["cos"][:T], tables["sin"][:T], None, self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.cos.shape[0]}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"


def as_rotation(rotary, ids: Tensor, position_ids: Tensor | None) -> Rotation:
    """Of a Rotary, or of cosines and sines (..., T, R) as transformers passes them: each row twice, half behind half."""
    if isinstance(rotary, Rotary):
        found = rotary.rotation(ids, position_ids)
    else:
        if rotary[0].device != rotary[1].device:
            raise ValueError(f"rotary: expected cos and sin on one device, got {rotary[0].device} and {rotary[1].device}")
        half = rotary[0].shape[-1] // 2
        found = Rotation(*(table[..., :half].reshape(-1, half).to(torch.float32) for table in rotary), None, False)
    T = ids.shape[-1] if ids.dim() else 1
    if found.ids is None and found.cos.shape[0] not in (T, ids.numel()):
        raise IndexError(f"rotary: expected rows for {T} or {ids.numel()} tokens, got {found.cos.shape[0]}")
    return found


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (..., h, d_h) -> the same, the first R of each head turned, by PyTorch's operators in x's dtype."""
    if x.numel() == 0:
        return x
    cos, sin = (table if rotation.ids is None else table[rotation.ids] for table in rotation[:2])
    heads = x.reshape(-1, cos.shape[0], *x.shape[-2:])  # sequences of as many tokens as there are rows
    cos, sin, half = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1), cos.shape[-1]
    if rotation.interleaved:
        a, b = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    else:
        a, b = heads.narrow(-1, 0, half), heads.narrow(-1, half, half)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    if rotation.interleaved:
        turned = (torch.stack(turned, -1).flatten(-2),)
    rest = () if 2 * half == heads.shape[-1] else (heads[..., 2 * half :],)
    return torch.cat((*turned, *rest), -1).view(x.shape)
