"""The `distinct` plan by PyTorch's own operators, for the CPU: each distinct token and position is projected once.

A norm's linear part distributes over the sum, so with centred rows r̄ = γ⊙(r − mean(r)) (RMSNorm: γ⊙r; no norm: r)

    qkv[m] = rstd[m] · (token̄[ids[m]]·Wᵀ + position̄[places[m]]·Wᵀ) + (W·β + b)

and the product needs as many rows as there are distinct tokens and positions; rstd alone depends on the pair. Backward:
a projected row's gradient is the sum of rstd·grad_qkv over its tokens, both products run on those rows, and rstd's own term
is −rstd³/D·(hidden − mean)·(grad_qkv · qkv before rstd) per token.

What is left is bound by memory, so tokens go by in blocks that stay in cache, large results reuse memory, and query, key and
value are tensors of their own: autograd would copy the gradients of three views into one.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import pyembed.tied as tied

from ..call import Call, Norm, Terms, wide_dtype
from ..memory import empty, empty_each
from .rates import product_dtype

FEW = 64  # tokens up to which the number of operators is what a call costs
BLOCK_BYTES = 2 << 20  # of one block's largest tensor: a few of them fit in the last level of cache


Parts = list[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]


class Block(NamedTuple):
    """Tokens of one pass: rows of (M, …) tensors, and the rows of the position table that they use."""

    tokens: slice
    sequences: int
    places: slice


class Batch:
    """Which rows a batch uses: of the token table, of the position table, and each token's place among them.

    rows (U,) and index (M,) where they are known: the rows of the token table that were projected, and each token's among them.
    """

    place_index: Tensor | None = None

    def __init__(self, terms: Terms, width: int, rows: Tensor | None = None, index: Tensor | None = None) -> None:
        ids, _, position, position_ids, *_ = terms
        self.M, self.T, self.ids = ids.numel(), terms.length, ids.reshape(-1)
        if index is None:
            rows, index = torch.unique(self.ids, return_inverse=True)
        self.rows, self.index = rows, index
        if position is None:
            self.place_rows = ids.new_empty(0)
        elif position_ids is None:
            self.place_rows = torch.arange(self.T, device=ids.device)
        elif position_ids.numel() == self.T:
            self.place_rows = position_ids.reshape(-1)
        else:
            self.place_rows, self.place_index = torch.unique(position_ids.reshape(-1), return_inverse=True)
        self.P = self.place_rows.numel()
        self.step = max(1, BLOCK_BYTES // (4 * width))

    def blocks(self) -> Iterator[Block]:
        """Whole sequences where they are short, pieces of one where they are long."""
        if self.M == 0:
            return
        if self.step >= self.T:
            stride = self.step // self.T * self.T
            for m in range(0, self.M, stride):
                tokens = slice(m, min(m + stride, self.M))
                yield Block(tokens, (tokens.stop - m) // self.T, slice(0, self.T))
        else:
            for first in range(0, self.M, self.T):
                for t in range(0, self.T, self.step):
                    places = slice(t, min(t + self.step, self.T))
                    yield Block(slice(first + t, first + places.stop), 1, places)

    def sum(self, block: Block, tokens: Tensor, index: Tensor, places: Tensor | None, out: Tensor) -> Tensor:
        """tokens[index] + places[…] of a block, into out; places (P, n) are the rows of the batch's positions."""
        if tokens.dtype == out.dtype:
            torch.index_select(tokens, 0, index[block.tokens], out=out)
        else:
            out.copy_(tokens.index_select(0, index[block.tokens]))
        if places is not None and self.place_index is not None:
            out += places.index_select(0, self.place_index[block.tokens])
        elif places is not None:
            out.view(block.sequences, -1, out.shape[1]).add_(places[block.places])
        return out

    def sum_places(self, block: Block, x: Tensor, table: Tensor) -> None:
        """table (P, n) += x (tokens, n), by position."""
        if self.place_index is not None:
            table.index_add_(0, self.place_index[block.tokens], x)
        else:
            table[block.places].add_(x.view(block.sequences, -1, x.shape[1]).sum(0))

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Tokens in the order of their distinct rows, stable, and where each row's tokens begin."""
        assert self.rows is not None
        counts = torch.bincount(self.index, minlength=self.rows.numel())
        return torch.argsort(self.index, stable=True), counts.cumsum(0) - counts

    def sum_tokens(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(U, n): the rows of x (M, n), weighted, summed by distinct token in the batch's order."""
        order, offsets = self.order
        if x.dtype == torch.float16:  # sums over many tokens leave its range
            x = x.float()
        weights = None if weights is None else weights[order].to(x.dtype)
        return torch.nn.functional.embedding_bag(order, x, offsets, mode="sum", per_sample_weights=weights)


def centred(rows: Tensor, norm: str) -> Tensor:
    """Table rows in at least fp32, without their mean for LayerNorm; a tensor of its own."""
    rows = rows.to(wide_dtype(rows.dtype), copy=True)
    return rows.sub_(rows.mean(1, keepdim=True)) if norm == "layer" else rows


def project(rows: Tensor, weight: Tensor, out: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """rows · weightᵀ, into out: rows (R, D) in at least fp32, weight (n, D), out (R, n) of any dtype; dtype: of the product,
    by default the one that is fastest."""
    dtype = dtype or product_dtype(weight.device, weight.dtype)
    rows, weight = rows.to(dtype), weight.to(dtype)
    return torch.mm(rows, weight.t(), out=out) if out.dtype == dtype else out.copy_(rows @ weight.t())


def shift(weight: Tensor, bias: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    """W·β + b (N,), in at least fp32."""
    wide = wide_dtype(weight.dtype)
    total = weight.new_zeros(weight.shape[0], dtype=wide)
    if norm_bias is not None:
        total += (weight.to(norm_bias.dtype) @ norm_bias).to(wide)
    return total if bias is None else total.add_(bias)


def inverse_deviation(hidden: Tensor, norm: str, eps: float) -> Tensor:
    """rstd (m, 1) of rows (m, D), in at least fp32."""
    rows = hidden.to(wide_dtype(hidden.dtype)) if hidden.dtype.itemsize == 2 else hidden
    if norm == "layer":  # one operator, though it writes more than is wanted
        return torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)[2]
    return torch.linalg.vecdot(rows, rows).div_(rows.shape[1]).add_(eps).rsqrt_()[:, None]


def expand(
    batch: Batch, token: Tensor, places: Tensor | None, parts: Parts, hidden: Tensor, rstd: Tensor, norm: Norm, unit: float = 1
) -> None:
    """One pass over the tokens: hidden (M, D) and rstd (M,) are filled, and for each of parts — projected tokens, projected
    positions or None (both times unit), shift or None, out (M, n) — out is the projection. places (P, D): the rows of the
    batch's positions, or None."""
    wide = wide_dtype(token.dtype)
    for block in batch.blocks():
        h = batch.sum(block, token, batch.ids, places, hidden[block.tokens])
        scale = None
        if norm.kind != "none":
            scale = inverse_deviation(h, norm.kind, norm.eps)
            rstd[block.tokens, None] = scale
        for tokens, positions, offset, out in parts:
            out = out[block.tokens]
            in_place = out.dtype == wide == tokens.dtype
            x = batch.sum(block, tokens, batch.index, positions, out if in_place else out.new_empty(out.shape, dtype=wide))
            if scale is not None:
                assert offset is not None
                x = torch.addcmul(offset, x, scale, value=1 / unit, out=x)
            elif offset is not None:
                x = torch.add(offset, x, alpha=1 / unit, out=x)
            if not in_place:
                out.copy_(x)


def split(buffer: Tensor, widths: list[int]) -> list[Tensor]:
    """A buffer (R, N) as dense matrices (R, n), one behind the other in its memory."""
    R, flat, start, parts = buffer.shape[0], buffer.view(-1), 0, []
    for width in widths:
        parts.append(flat[R * start : R * (start + width)].view(R, width))
        start += width
    return parts


def forward(call: Call, rows: Tensor | None = None, index: Tensor | None = None) -> tuple[Tensor, ...]:
    """-> hidden (..., D), query, key and value (..., h, d_h), mean (0,), rstd (M,) or (0,), projected (P + U, N): of distinct
    positions, then of tokens, and the batch's rows (U,) and index (M,), which may be given. The epilogue is not applied."""
    (ids, token, position, *_), norm, projection = call.terms, call.norm, call.projection
    assert projection is not None
    weight, bias, heads, kv_heads, *_ = projection
    D, N, dtype = token.shape[1], weight.shape[0], token.dtype
    batch = Batch(call.terms, max(D, N), rows, index)
    assert batch.rows is not None
    wide, P, head_dim = wide_dtype(dtype), batch.P, N // (heads + 2 * kv_heads)
    widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    places = None if position is None else position.index_select(0, batch.place_rows)
    used = token.index_select(0, batch.rows)
    used = centred(used if places is None else torch.cat([places, used]), norm.kind)
    if norm.weight is not None:
        used *= norm.weight
    # In fp16 small projections would lose digits, so they stay in fp32.
    projected = empty(used.shape[0], N, dtype=wide if dtype == torch.float16 else dtype, has_room=True)
    hidden, *results = empty_each([(*ids.shape, D), *((*ids.shape, n // head_dim, head_dim) for n in widths)], dtype)
    rstd = torch.empty(batch.M if norm.kind != "none" else 0, dtype=wide)
    parts, product = [], product_dtype(weight.device, weight.dtype)
    offsets = shift(weight, bias, norm.bias).split(widths)
    for rows_of, table, out, offset in zip(weight.split(widths), split(projected, widths), results, offsets, strict=True):
        if rows_of.shape[0] == 0:  # all outputs are the query's
            continue
        project(used, rows_of, table, product)
        parts.append((table[P:], table[:P] if P else None, offset, out.view(batch.M, rows_of.shape[0])))
    expand(batch, token, places, parts, hidden.view(batch.M, D), rstd, norm)
    return hidden, *results, rstd.new_empty(0), rstd, projected, batch.rows, batch.index


def backward(
    call: Call,
    grads: list[Tensor | None],
    rstd: Tensor,
    projected: Tensor,
    rows: Tensor,
    index: Tensor,
    needs: set[str],
    into: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of those fields of the call that are needed, by name.

    grads: of hidden, query, key and value, each or None; the others as forward returned them. into: (V, D), to which that of
    the token table is added, and is then missing.
    """
    assert call.projection is not None
    (ids, token, position, *_), norm, weight = call.terms, call.norm, call.projection.weight
    (V, D), dtype, M = token.shape, token.dtype, ids.numel()
    N, needs_tables, found = weight.shape[0], not needs.isdisjoint(("token", "position")), {}
    grad_hidden, *grads_qkv = (None if g is None else g.reshape(M, g.shape[ids.dim() :].numel()) for g in grads)
    batch = Batch(call.terms, max(D, N), rows, index)
    wide, P, normed = wide_dtype(dtype), batch.P, norm.kind != "none"
    places = None if position is None else position.index_select(0, batch.place_rows)

    grad_places, grad_tokens = torch.zeros(P, D, dtype=wide), None
    pull = None  # per token: rstd's own gradient is this times its row
    if any(grad is not None for grad in grads_qkv):
        pull = torch.zeros(batch.M, dtype=wide) if normed and needs_tables else None
        product = wide if dtype == torch.float16 else product_dtype(weight.device, dtype)
        grad_projected = torch.empty(P + rows.numel(), N, dtype=product)
        grad_bias = torch.zeros(N, dtype=wide)
        widths = [heads * call.head_dim for heads in call.projection.groups]
        sums = zip(split(projected, widths), grad_projected.split(widths, 1), grad_bias.split(widths), strict=True)
        for grad, (table, *sum_of) in zip(grads_qkv, sums, strict=True):
            if grad is None:
                sum_of[0].zero_()
            else:
                _project_backward(batch, grad.contiguous(), table, rstd, pull, *sum_of)
        if pull is not None:
            pull *= rstd.pow(3) / -D
        used = token.index_select(0, rows)
        used = centred(used if places is None else torch.cat([places, used]), norm.kind)
        gamma = 1.0 if norm.weight is None else norm.weight
        if "weight" in needs:
            grad_weight = grad_projected.t() @ (used * gamma).to(product)
            if norm.bias is not None:
                grad_weight += torch.outer(grad_bias, norm.bias.to(wide))
            found["weight"] = grad_weight.to(dtype)
        if "bias" in needs:
            found["bias"] = grad_bias.to(dtype)
        if "norm_bias" in needs and norm.bias is not None:
            # Not grad_bias @ weight: a matrix-vector product adds up its rows one after the other, which loses digits.
            found["norm_bias"] = (weight * grad_bias[:, None]).sum(0).to(norm.bias.dtype)
        if needs_tables or "norm_weight" in needs:
            grad_rows = (grad_projected @ weight.to(product)).to(wide)
            if "norm_weight" in needs and norm.weight is not None:
                found["norm_weight"] = (grad_rows * used).sum(0).to(norm.weight.dtype)
            grad_rows *= gamma
            if norm.kind == "layer":
                grad_rows -= grad_rows.mean(1, keepdim=True)
            grad_places += grad_rows[:P]
            grad_tokens = grad_rows[P:]

    if needs_tables and (grad_hidden is not None or pull is not None):
        by_token = _sum_backward(batch, grad_hidden, token, places, pull, norm.kind, grad_places)
        grad_tokens = by_token if grad_tokens is None else grad_tokens.add_(by_token)

    if "token" in needs and grad_tokens is not None and into is not None:
        tied.add_rows(into, rows, grad_tokens.to(dtype), call.terms.padding_idx)
    elif "token" in needs and grad_tokens is not None:
        found["token"] = empty(V, D, dtype=dtype).zero_()
        found["token"][rows] = grad_tokens.to(dtype)
        if call.terms.padding_idx >= 0:
            found["token"][call.terms.padding_idx] = 0.0
    if "position" in needs and position is not None:
        grad_position = torch.zeros(position.shape, dtype=wide).index_add_(0, batch.place_rows, grad_places)
        found["position"] = grad_position.to(dtype)
    return found


def _project_backward(
    batch: Batch, grad: Tensor, table: Tensor, rstd: Tensor, pull: Tensor | None, grad_table: Tensor, grad_bias: Tensor
) -> None:
    """For query, key or value: fills grad_table (P + U, n), the gradient of its projected rows, adds to grad_bias (n,), and to
    pull (M,), where that is not None, grad · qkv before rstd."""
    P, wide, normed = batch.P, grad_bias.dtype, rstd.numel() > 0
    grad_places = torch.zeros(P, grad.shape[1], dtype=wide)
    for block in batch.blocks():
        g = grad[block.tokens].to(wide)
        grad_bias += g.sum(0)
        if pull is not None:
            x = batch.sum(block, table[P:], batch.index, table[:P] if P else None, torch.empty(g.shape, dtype=wide))
            pull[block.tokens] += torch.linalg.vecdot(g, x)
        if P:
            batch.sum_places(block, g * rstd[block.tokens, None] if normed else g, grad_places)
    grad_table[:P] = grad_places
    grad_table[P:] = batch.sum_tokens(grad, rstd if normed else None)


def _sum_backward(
    batch: Batch, grad: Tensor | None, token: Tensor, places: Tensor | None, pull: Tensor | None, norm: str, grad_places: Tensor
) -> Tensor:
    """Gradient of the distinct tokens (U, D) through hidden and rstd; adds that of the positions to grad_places (P, D)."""
    wide = grad_places.dtype
    if grad is not None and pull is None:
        streamed = grad.contiguous()
    else:
        streamed = empty(batch.M, token.shape[1], dtype=wide, has_room=True)
    for block in batch.blocks():
        g = streamed[block.tokens]
        if pull is not None:
            g.copy_(batch.sum(block, token, batch.ids, places, torch.empty(g.shape, dtype=token.dtype)))
            if norm == "layer":
                g -= g.mean(1, keepdim=True)
            g *= pull[block.tokens, None]
            if grad is not None:
                g += grad[block.tokens]
        if batch.P:
            batch.sum_places(block, g.to(wide), grad_places)
    return batch.sum_tokens(streamed)
