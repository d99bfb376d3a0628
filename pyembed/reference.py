"""The specification: what a Call computes, by PyTorch's operators, short enough to be read as its definition.

compose is the only composition of the formula: the path of CPU tensors and of modules that must be called, the oracle of the
tests (in float64) and the eager baseline of the benchmark. embedding, embed and embed_qkv have the signatures of
pyembed.functional and check nothing.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tied
from .call import NO_EPILOGUE, Call, Called, Epilogue, HiddenQKV, Norm, Projection, Terms, pad_row, places, rows_of, wide_dtype
from .rotary import Pair, Rotary, turns


def sinusoids(steps: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (..., D) of positions.sinusoidal_steps (2, D); integer arithmetic drops whole turns exactly."""
    turn = position_ids.long().unsqueeze(-1) * steps[0] + steps[1]
    return (turn.double() * (math.pi * 2.0**-63)).sin().to(wide_dtype(dtype)).to(dtype)


def look_up(ids: Tensor, table: Tensor | Called, padding_idx: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Rows (..., D) of a table; dtype: of rows that are computed."""
    if isinstance(table, Called):
        return table(ids)
    if table.is_floating_point():
        return tied.look_up(table, ids, padding_idx)
    return sinusoids(table, ids, torch.get_default_dtype() if dtype is None else dtype)


def look_up_or_zero(ids: Tensor, table: Tensor | Called, padding_idx: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """look_up under the id policy "zero": a row of zeros where an id is outside the table."""
    rows = rows_of(table)
    if rows is None:  # the module knows what an id means that has no row
        return look_up(ids, table, padding_idx, dtype)
    ids = table.in_table(ids) if isinstance(table, Called) else ids  # those of other rows may lie outside it
    absent = (ids < 0) | (ids >= rows)
    return look_up(ids.masked_fill(absent, 0), table, padding_idx, dtype).masked_fill(absent.unsqueeze(-1), 0)


def compose_hidden(call: Call) -> Tensor:
    """hidden (..., T, D), each term rounded to the table's dtype."""
    rows_at = look_up_or_zero if call.id_policy == "zero" else look_up
    ids, token, position, position_ids, segment, segment_ids, _, scale, dropout, padding_idx = call.terms
    hidden = rows_at(ids, token, padding_idx)
    if scale is not None:
        hidden = hidden * scale
    if segment is not None:  # before positions, as in BERT
        hidden = hidden + rows_at(torch.zeros_like(ids) if segment_ids is None else segment_ids, segment)
    if position is not None:
        if position_ids is None and isinstance(position, Tensor) and position.is_floating_point():
            rows = position[: ids.shape[-1]] if ids.dim() else position[0]
        else:
            rows = rows_at(places(ids) if position_ids is None else position_ids, position, dtype=hidden.dtype)
        hidden = torch.cat([hidden, rows.expand_as(hidden)], -1) if call.concat else hidden + rows
    return F.dropout(hidden, dropout) if dropout else hidden


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """x (..., D) with the statistics of its last axis; a float32 weight beside 16-bit rows computes in float32."""
    kind, weight, bias, eps = norm
    if isinstance(weight, Called):
        return weight(x)
    if weight is not None and weight.dtype != x.dtype:
        return normalise(x.to(weight.dtype), norm).to(x.dtype)
    if kind == "layer":
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.rms_norm(x, x.shape[-1:], weight, eps) if kind == "rms" else x


def compose(call: Call) -> Tensor | HiddenQKV:
    """The whole call: hidden alone where it has no projection."""
    hidden = compose_hidden(call)
    if call.projection is None:
        return hidden
    weight, bias, query_heads, heads, key_weight, *_ = call.projection
    normed, epilogue = normalise(hidden, call.norm), call.epilogue
    linear: Any = invariant_linear if call.batch_invariant else F.linear
    if isinstance(weight, Called):
        qkv: Any = weight(normed)
    elif key_weight is not None:  # not packed, by which gradients of zeros would reach what a loss does not
        qkv = tuple([linear(normed, *each) for each in call.projection.own])
    else:
        qkv = linear(normed, weight, bias)
    if isinstance(qkv, tuple):
        split = [x.unflatten(-1, (n, -1)) for x, n in zip(qkv, call.projection.groups, strict=True)]
        return finish(HiddenQKV(hidden, *split), epilogue)
    total = query_heads + 2 * heads
    qkv = qkv.view(*qkv.shape[:-1], total, qkv.shape[-1] // total)
    if epilogue.cos is not None and epilogue.query_norm is None and epilogue.query_offset is None:
        # Query and key together: half the operators. Not by split, whose views could not be changed in place.
        turned, value = rotate(qkv.narrow(-2, 0, query_heads + heads), epilogue), qkv.narrow(-2, query_heads + heads, heads)
        found = HiddenQKV(hidden, turned.narrow(-2, 0, query_heads), turned.narrow(-2, query_heads, heads), value)
        return finish(found, Epilogue(heads_first=True)) if epilogue.heads_first else found
    found = HiddenQKV(hidden, *torch.split_with_sizes(qkv, (query_heads, heads, heads), -2))
    return found if epilogue is NO_EPILOGUE else finish(found, epilogue)


def finish(found: HiddenQKV, epilogue: Epilogue) -> HiddenQKV:
    """The epilogue: heads normalised, a second query, query and key turned, heads before tokens."""
    hidden, query, key, value = found
    if epilogue.query_norm is not None:
        weights = (query, epilogue.query_norm), (key, epilogue.key_norm)
        query, key = (_normalise_heads(x, weight, epilogue.head_eps) for x, weight in weights)
    if epilogue.query_bias is not None:
        query = query + epilogue.query_bias.view(query.shape[-2:]).to(query.dtype)
    if epilogue.query_offset is not None:
        query = torch.stack([query, query + epilogue.query_offset.view(query.shape[-2:]).to(query.dtype)])
    if epilogue.cos is not None:
        query, key = rotate(query, epilogue), rotate(key, epilogue)
    if epilogue.heads_first:
        query, key, value = (x.transpose(-3, -2).contiguous() for x in (query, key, value))
    return HiddenQKV(hidden, query, key, value)


def _normalise_heads(x: Tensor, weight: Tensor | Called | None, eps: float) -> Tensor:
    """Under autocast the norm is wider than the projection."""
    return weight(x) if isinstance(weight, Called) else normalise(x, Norm("rms", weight, None, eps)).to(x.dtype)


def rotate(x: Tensor, epilogue: Epilogue) -> Tensor:
    """x (..., h, d_h) -> the same, the first R columns of each head turned (Su et al. 2021), in x's dtype."""
    cos, sin, ids, interleaved = epilogue.cos, epilogue.sin, epilogue.turn_ids, epilogue.interleaved
    if cos is None or sin is None:
        return x
    half, heads = cos.shape[-1], x if x.dim() > 2 else x.unsqueeze(0)
    if ids is not None:  # looked up, where indexing would count negative ones from the end
        cos, sin = torch.embedding(cos, ids), torch.embedding(sin, ids)
    elif cos.dim() > 1 and cos.shape[-2] != heads.shape[-3]:  # a single row would turn all tokens
        raise IndexError(f"rotary: expected rows for {heads.shape[-3]} tokens, got {cos.shape[-2]}")
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    if interleaved:
        a, b = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    else:
        a, b = heads.narrow(-1, 0, half), heads.narrow(-1, half, half)
    parts = [torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)]
    if interleaved:
        parts = [torch.stack(parts, -1).flatten(-2)]
    rest = [heads[..., 2 * half :]] if 2 * half < heads.shape[-1] else []
    return torch.cat([*parts, *rest], -1).view(x.shape)


ROWS = 32  # of a product of invariant_linear


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by products of one shape, from memory aligned alike, so that a row's bits are the same in every batch."""
    rows = x.reshape(-1, x.shape[-1])
    D, line = x.shape[-1], 64 // x.element_size()  # each row begins a line of the cache, in a copy of its own
    padded = (F.pad(part, (0, -D % line, 0, ROWS - part.shape[0]))[:, :D] for part in rows.split(ROWS))
    found = [F.linear(part, weight, bias) for part in padded]
    return torch.cat(found)[: rows.shape[0]].view(*x.shape[:-1], weight.shape[0])


def with_query_biases(call: Call, first: Tensor, second: Tensor) -> Call:
    """The call with query biases (H, d_h), Transformer-XL's u and v: query + first, and behind it query + second."""
    epilogue = call.epilogue._replace(query_bias=first.flatten(), query_offset=(second - first).flatten())
    return call._replace(epilogue=epilogue)


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows (..., D) of weight (V, D)."""
    return F.embedding(ids, weight, padding_idx)


def embed(
    ids: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    scale: float | None = None,
    segment: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """hidden (..., T, D), as functional.embed has it."""
    row = pad_row(padding_idx, token.shape[0])
    return compose_hidden(Call(Terms(ids, token, position, position_ids, segment, segment_ids, None, scale, dropout, row)))


def embed_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    padding_idx: int | None = None,
    rotary: Rotary | Pair | None = None,
    scale: float | None = None,
    segment: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    head_eps: float = 1e-6,
    query_biases: tuple[Tensor, Tensor] | None = None,
    heads_first: bool = False,
) -> HiddenQKV:
    """hidden, query, key and value, as functional.embed_qkv has them."""
    row, heads = pad_row(padding_idx, token.shape[0]), num_heads if num_kv_heads is None else num_kv_heads
    call = Call(
        Terms(ids, token, position, position_ids, segment, segment_ids, None, scale, dropout, row),
        Norm(norm or "none", norm_weight, norm_bias, eps),
        Projection(weight, bias, num_heads, heads),
        Epilogue(query_norm, key_norm, None, *turns(rotary, ids, position_ids), head_eps, heads_first),
    )
    found = compose(call if query_biases is None else with_query_biases(call, *query_biases))
    assert isinstance(found, HiddenQKV)
    return found
