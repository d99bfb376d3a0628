"""The specification: every operation in plain PyTorch, short enough to be read as its definition.

It is also the CPU path, the oracle of the tests (in float64) and the eager baseline of the benchmark.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotary import as_rotation, rotate


class HiddenQKV(NamedTuple):
    """What a front end hands to its transformer: the residual stream and the first layer's projections."""

    hidden: Tensor  # (..., T, D)
    query: Tensor  # (..., T, H, d_h)
    key: Tensor  # (..., T, H_kv, d_h)
    value: Tensor  # (..., T, H_kv, d_h)


def embedding(ids, weight, padding_idx=None):
    return F.embedding(ids, weight, padding_idx)


def embed(ids, token, position=None, position_ids=None, *, padding_idx=None):
    hidden = F.embedding(ids, token, padding_idx)
    if position is not None:
        if position_ids is None:
            position_ids = torch.arange(ids.shape[-1], device=ids.device) if ids.dim() else torch.zeros_like(ids)
        hidden = hidden + F.embedding(position_ids, position)
    return hidden


def normalise(hidden, norm, weight=None, bias=None, eps=1e-5):
    if weight is not None and weight.dtype != hidden.dtype:  # float32 beside 16 bits
        return normalise(hidden.to(weight.dtype), norm, weight, bias, eps).to(hidden.dtype)
    if norm == "layer":
        return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    if norm == "rms":
        return F.rms_norm(hidden, hidden.shape[-1:], weight, eps)
    return hidden


def split_heads(hidden, qkv, num_heads, num_kv_heads):
    total = num_heads + 2 * num_kv_heads
    heads = qkv.view(*qkv.shape[:-1], total, qkv.shape[-1] // total)
    return HiddenQKV(hidden, *torch.split_with_sizes(heads, (num_heads, num_kv_heads, num_kv_heads), -2))


def turned(found, rotation):
    return found._replace(query=rotate(found.query, rotation), key=rotate(found.key, rotation))


def embed_qkv(
    ids,
    token,
    weight,
    bias=None,
    *,
    num_heads,
    num_kv_heads=None,
    position=None,
    position_ids=None,
    norm=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    padding_idx=None,
    rotary=None,
):
    hidden = embed(ids, token, position, position_ids, padding_idx=padding_idx)
    qkv = F.linear(normalise(hidden, norm, norm_weight, norm_bias, eps), weight, bias)
    found = split_heads(hidden, qkv, num_heads, num_heads if num_kv_heads is None else num_kv_heads)
    return found if rotary is None else turned(found, as_rotation(rotary, ids, position_ids))
