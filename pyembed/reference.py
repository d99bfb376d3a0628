"""The specification: every operation in plain PyTorch, short enough to be read as its definition.

It is also the CPU path, the oracle of the tests (in float64) and the eager baseline of the benchmark.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .rotary import as_rotation, rotate


class HiddenQKV(NamedTuple):
    """What a front end hands to its transformer: the residual stream and the first layer's projections."""

    hidden: Tensor  # (..., T, D)
    query: Tensor  # (..., T, H, d_h)
    key: Tensor  # (..., T, H_kv, d_h)
    value: Tensor  # (..., T, H_kv, d_h)


pytree._register_namedtuple(HiddenQKV, serialized_type_name="pyembed.HiddenQKV")  # torch.export writes its name


def embedding(ids, weight, padding_idx=None):
    return F.embedding(ids, weight, padding_idx)


def sinusoids(steps, position_ids, dtype):
    """Rows (..., D) of positions.sinusoidal_steps (2, D), by integers that drop whole turns without an error."""
    turn = position_ids.long().unsqueeze(-1) * steps[0] + steps[1]
    return (turn.double() * (math.pi * 2.0**-63)).sin().to(torch.promote_types(dtype, torch.float32)).to(dtype)


def rows_of(table):
    """How many rows a table has; one of positions.sinusoidal_steps computes those of any position."""
    return table.shape[0] if table.is_floating_point() else 2**31 - 1


def look_up(ids, table, padding_idx=None, dtype=None):
    return F.embedding(ids, table, padding_idx) if table.is_floating_point() else sinusoids(table, ids, dtype)


def embed(
    ids, token, position=None, position_ids=None, *, padding_idx=None, scale=None, segment=None, segment_ids=None, dropout=0.0,
    look_up=look_up,
):  # fmt: skip
    hidden = look_up(ids, token, padding_idx)
    if scale is not None:
        hidden = hidden * scale
    if segment is not None:  # before positions, as in BERT
        hidden = hidden + look_up(torch.zeros_like(ids) if segment_ids is None else segment_ids, segment)
    if position is not None:
        if position_ids is None:
            position_ids = torch.arange(ids.shape[-1], device=ids.device) if ids.dim() else torch.zeros_like(ids)
        hidden = hidden + look_up(position_ids, position, None, token.dtype)
    return F.dropout(hidden, dropout) if dropout else hidden


def normalise(hidden, norm, weight=None, bias=None, eps=1e-5):
    if weight is not None and weight.dtype != hidden.dtype:  # float32 beside 16 bits
        return normalise(hidden.to(weight.dtype), norm, weight, bias, eps).to(hidden.dtype)
    if norm == "layer":
        return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    if norm == "rms":
        return F.rms_norm(hidden, hidden.shape[-1:], weight, eps)
    return hidden


ROWS = 32  # of a product of invariant_linear


def invariant_linear(x, weight, bias=None):
    """F.linear by products of one shape, from memory aligned alike, so that a row's bits are the same in every batch."""
    rows = x.reshape(-1, x.shape[-1])
    D, line = x.shape[-1], 64 // x.element_size()  # each row begins a line of the cache, in a copy of its own
    padded = (F.pad(part, (0, -D % line, 0, ROWS - part.shape[0]))[:, :D] for part in rows.split(ROWS))
    found = [F.linear(part, weight, bias) for part in padded]
    return torch.cat(found)[: rows.shape[0]].view(*x.shape[:-1], weight.shape[0])


def split_heads(hidden, qkv, num_heads, num_kv_heads):
    total = num_heads + 2 * num_kv_heads
    heads = qkv.view(*qkv.shape[:-1], total, qkv.shape[-1] // total)
    return HiddenQKV(hidden, *torch.split_with_sizes(heads, (num_heads, num_kv_heads, num_kv_heads), -2))


def finish(found, *, query_norm=None, key_norm=None, head_eps=1e-6, second=None, rotation=None, heads_first=False):
    """The epilogue: heads normalised, a second query, query and key turned, heads before tokens."""
    query, key, value = found[1:]
    if query_norm is not None:
        pairs = ((query, query_norm), (key, key_norm))
        query, key = (normalise(x, "rms", norm, None, head_eps).to(x.dtype) for x, norm in pairs)  # autocast's is wider
    if second is not None:
        query = torch.stack([query, query + second.view(query.shape[-2:]).to(query.dtype)])
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    if heads_first:
        query, key, value = (x.transpose(-3, -2).contiguous() for x in (query, key, value))
    return HiddenQKV(found.hidden, query, key, value)


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
    scale=None,
    segment=None,
    segment_ids=None,
    dropout=0.0,
    query_norm=None,
    key_norm=None,
    head_eps=1e-6,
    query_biases=None,
    heads_first=False,
    look_up=look_up,
    linear=F.linear,
):
    hidden = embed(
        ids, token, position, position_ids, padding_idx=padding_idx, scale=scale, segment=segment, segment_ids=segment_ids,
        dropout=dropout, look_up=look_up,
    )  # fmt: skip
    second = None
    if query_biases is not None:
        bias, second = biases_of(weight, bias, *query_biases)
    qkv = linear(normalise(hidden, norm, norm_weight, norm_bias, eps), weight, bias)
    found = split_heads(hidden, qkv, num_heads, num_heads if num_kv_heads is None else num_kv_heads)
    if rotary is None and query_norm is None and second is None and not heads_first:
        return found  # a decode step counts every call
    rotation = None if rotary is None else as_rotation(rotary, ids, position_ids)
    ends = {"query_norm": query_norm, "key_norm": key_norm, "head_eps": head_eps}
    return finish(found, **ends, second=second, rotation=rotation, heads_first=heads_first)


def biases_of(weight, bias, first, second):
    """The projection's bias (N,) with the query's first bias (H, d_h) in it, and what makes a second query of the first."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return bias + F.pad(first.flatten(), (0, weight.shape[0] - first.numel())), (second - first).flatten()
