"""The `distinct` plan by PyTorch's own operators, for the CPU: each distinct token and position is projected once.

A norm's linear part distributes over the sum, so with centred rows r̄ = γ⊙(r − mean(r)) (RMSNorm: γ⊙r; no norm: r)

    qkv[m] = rstd[m] · (token̄[ids[m]]·Wᵀ + position̄[places[m]]·Wᵀ) + (W·β + b)

and the product needs as many rows as there are distinct tokens and positions; rstd alone depends on the pair. Backward:
a projected row's gradient is the sum of rstd·grad_qkv over its tokens, both products run on those rows, and rstd's own term
is −rstd³/D·(hidden − mean)·(grad_qkv · qkv before rstd) per token.

What is left is bound by memory, so tokens go by in blocks that stay in cache, and large results reuse memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import memory

BLOCK_BYTES = 2 << 20  # of one block's largest tensor: a few of them fit in the last level of cache


class Block(NamedTuple):
    """Tokens of one pass: rows of (M, …) tensors, and the rows of the position table that they use."""

    tokens: slice
    sequences: int
    places: slice


class Batch:
    """Which rows a batch uses: distinct tokens, distinct positions, and each token's place among them."""

    def __init__(self, ids: Tensor, position: Tensor | None, position_ids: Tensor | None, width: int):
        self.M, self.T = ids.numel(), ids.shape[-1] if ids.dim() else 1
        self.ids = ids.reshape(-1)
        self.rows, self.index = torch.unique(self.ids, return_inverse=True)
        self.place_rows = self.place_index = None
        if position is not None and position_ids is None:
            self.place_rows = torch.arange(self.T)
        elif position is not None and position_ids.numel() == self.T:
            self.place_rows = position_ids.reshape(-1)
        elif position is not None:
            self.place_rows, self.place_index = torch.unique(position_ids.reshape(-1), return_inverse=True)
        self.P = 0 if self.place_rows is None else self.place_rows.numel()
        self.step = max(1, BLOCK_BYTES // (4 * width))

    def blocks(self):
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

    def hidden(self, block: Block, token: Tensor, places: Tensor | None, out: Tensor) -> Tensor:
        """token[ids] + position[…] of a block, into out."""
        torch.index_select(token, 0, self.ids[block.tokens], out=out)
        if places is not None:
            self.add_places(block, out, places)
        return out

    def projected(self, block: Block, table: Tensor, out: Tensor) -> Tensor:
        """The sum of each token's two rows of a projected table (P + U, N), into out of any dtype."""
        rows, index = table[self.P :], self.index[block.tokens]
        if out.dtype == table.dtype:
            torch.index_select(rows, 0, index, out=out)
        else:
            out.copy_(rows.index_select(0, index))
        if self.P:
            self.add_places(block, out, table[: self.P])
        return out

    def add_places(self, block: Block, x: Tensor, table: Tensor):
        """x (tokens, n) += the rows of table (P, n) that its tokens' positions name."""
        if self.place_index is not None:
            x += table.index_select(0, self.place_index[block.tokens])
        else:
            x.view(block.sequences, -1, x.shape[1]).add_(table[block.places])

    def sum_places(self, block: Block, x: Tensor, table: Tensor):
        """table (P, n) += x (tokens, n), by position."""
        if self.place_index is not None:
            table.index_add_(0, self.place_index[block.tokens], x)
        else:
            table[block.places].add_(x.view(block.sequences, -1, x.shape[1]).sum(0))

    def sum_tokens(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(U, n): the rows of x (M, n), weighted, summed by distinct token in the batch's order."""
        order = torch.argsort(self.index, stable=True)
        offsets = torch.zeros(self.rows.numel(), dtype=torch.int64)
        offsets[1:] = torch.bincount(self.index, minlength=self.rows.numel()).cumsum(0)[:-1]
        weights = None if weights is None else weights[order].to(x.dtype)
        return torch.nn.functional.embedding_bag(order, x, offsets, mode="sum", per_sample_weights=weights)


def _distinct_rows(batch, token, position, norm):
    """(P + U, D) in at least fp32: the rows of the position table, then of the token table, centred for LayerNorm."""
    wide = torch.promote_types(token.dtype, torch.float32)
    rows = token.index_select(0, batch.rows).to(wide)
    if position is not None:
        rows = torch.cat([position.index_select(0, batch.place_rows).to(wide), rows])
    if norm == "layer":
        rows -= rows.mean(1, keepdim=True)
    return rows


def _unit(rows, dtype):
    """A factor that keeps the rows' products within fp16's range; 1 for the other types."""
    return 1.0 if dtype != torch.float16 else 1.0 / max(rows.abs().max().item(), 1e-30)


def forward(ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, norm, eps):
    """-> hidden (..., D), qkv (..., N), rstd (M,) or (0,), projected (P + U, N): of distinct positions, then of tokens."""
    D, N, dtype = token.shape[1], weight.shape[0], token.dtype
    batch = Batch(ids, position, position_ids, max(D, N))
    M, wide = batch.M, torch.promote_types(dtype, torch.float32)
    rows = _distinct_rows(batch, token, position, norm)
    unit = _unit(rows, dtype)
    if norm_weight is not None:
        rows *= norm_weight
    projected = memory.empty(rows.shape[0], N, dtype=dtype)
    torch.mm((rows * unit if unit != 1.0 else rows).to(dtype), weight.t(), out=projected)
    shift = weight.new_zeros(N, dtype=wide)
    if bias is not None:
        shift += bias
    if norm_bias is not None:
        shift += (weight @ norm_bias).to(wide)

    results = memory.empty(*ids.shape, D, dtype=dtype), memory.empty(*ids.shape, N, dtype=dtype)
    hidden, qkv = results[0].view(M, D), results[1].view(M, N)
    rstd = torch.empty(M if norm != "none" else 0, dtype=wide)
    places = None if position is None else position.index_select(0, batch.place_rows)
    for block in batch.blocks():
        h = batch.hidden(block, token, places, hidden[block.tokens])
        if norm != "none":
            centred = h - h.mean(1, keepdim=True, dtype=wide) if norm == "layer" else h.to(wide)
            rstd[block.tokens] = torch.linalg.vecdot(centred, centred).div_(D).add_(eps).rsqrt_()

        out = qkv[block.tokens]
        x = batch.projected(block, projected, out if dtype == wide else torch.empty(out.shape, dtype=wide))
        scale = rstd[block.tokens, None] / unit if norm != "none" else x.new_full((), 1 / unit)
        torch.addcmul(shift, x, scale, out=x)
        if x is not out:
            out.copy_(x)
    return *results, rstd, projected


def backward(
    grad_hidden,
    grad_qkv,
    ids,
    token,
    weight,
    position,
    position_ids,
    norm_weight,
    norm_bias,
    rstd,
    projected,
    norm,
    padding_idx,
    needs,
):
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias), None where `needs` says no.

    grad_hidden (M, D) and grad_qkv (M, N), either None; rstd and projected as forward returned them.
    """
    (V, D), dtype = token.shape, token.dtype
    needs_token, needs_weight, needs_bias, needs_position, needs_norm_weight, needs_norm_bias = needs
    batch = Batch(ids, position, position_ids, max(D, weight.shape[0]))
    wide = torch.promote_types(dtype, torch.float32)
    normed, needs_tables = norm != "none", needs_token or needs_position
    rows = _distinct_rows(batch, token, position, norm)
    unit = _unit(rows, dtype)
    P, places = batch.P, None if position is None else position.index_select(0, batch.place_rows)

    grad_places = torch.zeros(P, D, dtype=wide)
    grad_tokens = None
    grads = dict.fromkeys(("weight", "bias", "norm_weight", "norm_bias"))
    pull = None  # per token: how strongly rstd's own gradient pulls its row
    if grad_qkv is not None:
        grad_qkv = grad_qkv.contiguous()
        grad_bias = torch.zeros(weight.shape[0], dtype=wide)
        grad_projected_places = torch.zeros(P, weight.shape[0], dtype=wide)
        pull = torch.zeros(batch.M, dtype=wide) if normed and needs_tables else None
        for block in batch.blocks():
            g = grad_qkv[block.tokens].to(wide)
            grad_bias += g.sum(0)
            if pull is not None:
                x = batch.projected(block, projected, torch.empty(g.shape, dtype=wide))
                pull[block.tokens] = torch.linalg.vecdot(g, x)
            if position is not None:
                batch.sum_places(block, g * rstd[block.tokens, None] if normed else g, grad_projected_places)
        if pull is not None:
            pull *= rstd.pow(3) / (-D * unit)
        summed = batch.sum_tokens(grad_qkv, rstd if normed else None)
        grad_projected = torch.cat([grad_projected_places.to(dtype), summed])
        gamma = 1.0 if norm_weight is None else norm_weight
        if needs_weight:
            grads["weight"] = grad_projected.t() @ (rows * gamma).to(dtype)
            if norm_bias is not None:
                grads["weight"] += torch.outer(grad_bias, norm_bias.to(wide))
        grads["bias"] = grad_bias.to(dtype) if needs_bias else None
        grads["norm_bias"] = (grad_bias @ weight.to(wide)).to(dtype) if needs_norm_bias else None
        if needs_tables or needs_norm_weight:
            grad_rows = (grad_projected @ weight).to(wide)
            grads["norm_weight"] = (grad_rows * rows).sum(0).to(dtype) if needs_norm_weight else None
            grad_rows *= gamma
            if norm == "layer":
                grad_rows -= grad_rows.mean(1, keepdim=True)
            grad_places += grad_rows[:P]
            grad_tokens = grad_rows[P:]

    if needs_tables and (grad_hidden is not None or pull is not None):
        streamed = memory.empty(batch.M, D, dtype=wide) if pull is not None else grad_hidden.contiguous()
        for block in batch.blocks():
            g = streamed[block.tokens]
            if pull is not None:
                g.copy_(batch.hidden(block, token, places, torch.empty(g.shape, dtype=dtype)))
                if norm == "layer":
                    g -= g.mean(1, keepdim=True)
                g *= pull[block.tokens, None]
                if grad_hidden is not None:
                    g += grad_hidden[block.tokens]
            if position is not None:
                batch.sum_places(block, g.to(wide), grad_places)
        by_token = batch.sum_tokens(streamed)
        grad_tokens = by_token if grad_tokens is None else grad_tokens.add_(by_token)

    grad_token = grad_position = None
    if needs_token and grad_tokens is not None:
        grad_token = memory.empty(V, D, dtype=dtype).zero_()
        grad_token[batch.rows] = grad_tokens.to(dtype)
        if padding_idx >= 0:
            grad_token[padding_idx] = 0.0
    if needs_position:
        grad_position = torch.zeros(position.shape, dtype=wide).index_add_(0, batch.place_rows, grad_places).to(dtype)
    return grad_token, grads["weight"], grads["bias"], grad_position, grads["norm_weight"], grads["norm_bias"]
