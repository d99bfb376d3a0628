"""Rotary positions (Su et al. 2021): queries and keys are turned, pair by pair, by an angle that grows with the position."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """What turns the heads of a batch: rows of cosines and sines, and which of them each token takes."""

    cos: Tensor  # (rows, R/2) float32
    sin: Tensor
    ids: Tensor | None  # (T,) or (M,): each token's row; None: token m takes row m % rows
    interleaved: bool  # pairs (2i, 2i+1); else (i, i + R/2)


class Rotary(nn.Module):
    """Turns of heads by position, for EmbeddingQKV and functional.embed_qkv.

    head_dim: width of a head, of which the first rotary_dim (default: all) turn, as in GPT-NeoX. interleaved: pairs are
    (2i, 2i+1), as in the paper, Llama's original weights and GPT-J; else (i, i + rotary_dim/2), as Hugging Face and GPT-NeoX
    have it. Pair i turns by position·base^(−2i/rotary_dim), or by position·inv_freq[i] where inv_freq (rotary_dim/2,) is given:
    linear, NTK, YaRN and Llama-3 scaling are that. scale multiplies cosines and sines (YaRN's attention_scaling).
    Tables cos and sin (max_length, rotary_dim/2) are float32 whatever dtype the model has (angles in float64), and no part of
    state_dict. ValueError: an odd or too large rotary_dim, an inv_freq of another length.
    """

    def __init__(
        self, head_dim, max_length, base=10_000.0, *, rotary_dim=None, interleaved=False, inv_freq=None, scale=1.0, device=None
    ):
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
        self.inv_freq = inv_freq.detach().to("cpu", torch.float64)  # no buffer: .half() would take its digits
        for name in ("cos", "sin"):
            empty = torch.empty(max_length, rotary_dim // 2, dtype=torch.float32, device=device)
            self.register_buffer(name, empty, persistent=False)
        self._fill()

    def _fill(self):
        angle = torch.outer(torch.arange(self.cos.shape[0], dtype=torch.float64, device="cpu"), self.inv_freq)
        if self.cos.is_meta:
            return
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            setattr(self, name, (table * self.scale).to(self.cos.device, torch.float32))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._fill()  # .half() rounded the tables, to_empty() left them without values
        return self

    def rotation(self, ids: Tensor, position_ids: Tensor | None) -> Rotation:
        """The turns of ids (..., T) at position_ids (T,), (1, T) or like ids, None: 0 … T−1."""
        if position_ids is not None:
            return Rotation(self.cos, self.sin, position_ids.reshape(-1), self.interleaved)
        T, tables = ids.shape[-1] if ids.dim() else 1, self._buffers  # a module's attributes are slow
        return Rotation(tables["cos"][:T], tables["sin"][:T], None, self.interleaved)

    def extra_repr(self):
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
