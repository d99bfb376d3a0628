"""Gradients of the front end, without atomics or host synchronisation: every sum has a fixed order, so results are repeatable.

    grad_normed = grad_qkv · weight                  grad_weight = grad_qkvᵀ · normed          torch's matrix products
    grad_sum    = norm's backward (grad_normed) + grad_hidden                     (M, D), hidden is gathered again, not saved
    grad_token[v] = Σ grad_sum[m] over the tokens m with ids[m] = v               likewise for the position table

Table gradients sort the ids (stable: the order of each sum is fixed) and sum runs of equal ids. Runs are split at multiples of
CHUNK: a run inside one chunk is summed and written at once; the partial sums of a longer run go to a buffer, which a second
launch adds up in order. So the time does not depend on how often an id repeats.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .embed import drop_again, embed
from .launch import launch, on_device
from .tiles import drop, find_rows, load_hidden

CHUNK = 64


@triton.jit
def norm_backward_kernel(
    ids,  # (M,)
    terms,  # of hidden, as in tiles.find_rows
    token,  # (V, D)
    norm_weight,  # (D,) or None
    norm_bias,  # (D,) or None
    mean,  # (M,), or None: RMSNorm
    rstd,  # (M,)
    grad_normed,  # (M, D), or None: only normed is computed
    grad_hidden,  # (M, D) or None
    grad_sum,  # (M, D) out, or None
    normed,  # (M, D) out, or None
    partials,  # (2, programs, D) out, or None: each program's share of the gradients of norm_weight and norm_bias
    shape,  # M, T, V, L
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L = shape
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    d = tl.arange(0, BLOCK_D)
    gamma = tl.full((BLOCK_D,), 1.0, ACC)
    beta = tl.zeros((BLOCK_D,), ACC)
    if norm_weight is not None:
        gamma = tl.load(norm_weight + d, mask=d < D, other=0.0).to(ACC)
    if norm_bias is not None:
        beta = tl.load(norm_bias + d, mask=d < D, other=0.0).to(ACC)
    grad_gamma = tl.zeros((BLOCK_D,), ACC)
    grad_beta = tl.zeros((BLOCK_D,), ACC)

    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(0)) * BLOCK_M
    first = tl.program_id(0).to(tl.int64) * share
    for m0 in range(first, tl.minimum(first + share, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (d < D)[None, :]
        rows, known = find_rows(ids, terms, m, M, T, V, L)
        h = load_hidden(token, terms, rows, d, D).to(ACC)
        scale = tl.load(rstd + m, mask=m < M, other=0.0)[:, None]
        if mean is not None:
            h -= tl.load(mean + m, mask=m < M, other=0.0)[:, None]
        x = tl.where(inside & known[:, None], h * scale, 0.0)
        if normed is not None:
            tl.store(normed + m[:, None] * D + d[None, :], (x * gamma + beta).to(normed.dtype.element_ty), mask=inside)
        if grad_normed is not None:
            dy = tl.load(grad_normed + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(ACC)
            grad_gamma += tl.sum(dy * x, 0)
            grad_beta += tl.sum(dy, 0)
            if grad_sum is not None:
                dy *= gamma
                dx = dy - x * (tl.sum(dy * x, 1) / D)[:, None]
                if mean is not None:
                    dx -= (tl.sum(dy, 1) / D)[:, None]
                dx *= scale
                if grad_hidden is not None:
                    dx += tl.load(grad_hidden + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(ACC)
                if terms[4] is not None:
                    dx = drop(dx, terms[4], m, d, ACC)
                tl.store(grad_sum + m[:, None] * D + d[None, :], dx.to(grad_sum.dtype.element_ty), mask=inside)
    if partials is not None:
        tl.store(partials + tl.program_id(0) * D + d, grad_gamma, mask=d < D)
        tl.store(partials + (tl.num_programs(0) + tl.program_id(0)) * D + d, grad_beta, mask=d < D)


@triton.jit
def segment_kernel(
    rows,  # (M, D)
    ids,  # (M,) sorted
    order,  # (M,) index of each sorted id before sorting
    weights,  # (M,) factors of the rows, or None
    grad,  # (V, D) out, rows stride_gv apart
    pieces,  # (2, chunks, D) out: each chunk's sum of the run that began before it, and of the run that goes on after it
    M,
    V,
    padding_idx,
    stride_gv,
    D,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(ids + start).to(tl.int64)
    opens = (start == 0) | (tl.load(ids + tl.maximum(start - 1, 0)) != row)
    if (opens | (start % CHUNK == 0)) & (row >= 0) & (row < V) & (row != padding_idx):
        chunk = start // CHUNK
        end = tl.minimum((chunk + 1) * CHUNK, M)
        lane = start + tl.arange(0, CHUNK)
        count = tl.sum((tl.load(ids + lane, mask=lane < end, other=-1) == row).to(tl.int32), 0)
        acc = tl.zeros((BLOCK_D,), pieces.dtype.element_ty)
        for i in range(0, count, BLOCK_M):
            step = i + tl.arange(0, BLOCK_M)
            source = tl.load(order + start + step, mask=step < count, other=0)
            inside = (step < count)[:, None] & (d < D)[None, :]
            x = tl.load(rows + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(acc.dtype)
            if weights is not None:
                x *= tl.load(weights + source, mask=step < count, other=0.0)[:, None]
            acc += tl.sum(x, 0)
        leaves = (start + count == end) & (tl.load(ids + tl.minimum(end, M - 1)) == row) & (end < M)
        if opens & (leaves == 0):
            tl.store(grad + row * stride_gv + d, acc.to(grad.dtype.element_ty), mask=d < D)
        else:
            side = tl.where(opens, tl.cdiv(M, CHUNK), 0).to(tl.int64)
            tl.store(pieces + (side + chunk) * D + d, acc, mask=d < D)


@triton.jit
def join_kernel(
    ids,  # (M,) sorted
    grad,  # (V, D) out
    pieces,  # (2, chunks, D)
    M,
    V,
    padding_idx,
    stride_gv,
    D,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(M, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    next_chunk = (chunk + 1) * CHUNK
    row = tl.load(ids + tl.minimum(next_chunk, M) - 1).to(tl.int64)
    leaves = (next_chunk < M) & (tl.load(ids + tl.minimum(next_chunk, M - 1)) == row)
    entered = (chunk > 0) & (tl.load(ids + tl.maximum(chunk * CHUNK - 1, 0)) == row)
    if leaves & (entered == 0) & (row >= 0) & (row < V) & (row != padding_idx):
        acc = tl.load(pieces + (chunks + chunk) * D + d, mask=d < D, other=0.0)
        more = 1
        while more > 0:
            later = chunk + 1 + tl.arange(0, BLOCK_M)
            same = tl.load(ids + later * CHUNK, mask=later < chunks, other=-1) == row
            inside = same[:, None] & (d < D)[None, :]
            acc += tl.sum(tl.load(pieces + later[:, None] * D + d[None, :], mask=inside, other=0.0), 0)
            more = tl.min(same.to(tl.int32), 0)
            chunk += BLOCK_M
        tl.store(grad + row * stride_gv + d, acc.to(grad.dtype.element_ty), mask=d < D)


def table_grad(rows, ids, size, padding_idx=-1, dtype=None, weights=None, order=None, out=None):
    """Gradient of a table of `size` rows: rows (M, D), times weights (M,), summed by ids (M,); ids outside the table have none.

    order: torch.sort(ids, stable=True), where it is known. out: (size, D), of which only rows that an id names are written.
    """
    M, D = rows.shape
    rows = rows.contiguous()  # sum().backward() hands down an expanded gradient of stride 0
    grad = rows.new_zeros(size, D, dtype=dtype or rows.dtype) if out is None else out
    if M == 0 or D == 0:
        return grad
    ids, order = torch.sort(ids, stable=True) if order is None else order
    chunks = tuning.cdiv(M, CHUNK)
    pieces = rows.new_empty(2, chunks, D, dtype=torch.promote_types(rows.dtype, torch.float32))
    block_m, block_d = tuning.segment(D)
    tiles = {"D": D, "CHUNK": CHUNK, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": 4}
    with on_device(rows):
        launch(segment_kernel, (M, tuning.cdiv(D, block_d)))(
            rows, ids, order, weights, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles
        )
        launch(join_kernel, (chunks, tuning.cdiv(D, block_d)))(ids, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles)
    return grad


def position_grad(rows, shape, position_ids, size, dtype=None):
    """Gradient of a position table of `size` rows: rows (M, D) of ids with this shape, summed by position."""
    dtype = dtype or rows.dtype
    T = shape[-1] if shape else 1
    if position_ids is not None and position_ids.numel() == rows.shape[0]:
        return table_grad(rows, position_ids.reshape(-1), size, dtype=dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    per_place = rows.view(-1, T, rows.shape[1]).sum(0, dtype=wide) if rows.numel() else rows.new_zeros(T, rows.shape[1])
    if position_ids is not None:
        return table_grad(per_place, position_ids.reshape(-1), size, dtype=dtype)
    grad = rows.new_zeros(size, rows.shape[1], dtype=dtype)
    grad[:T] = per_place[:size]
    return grad


def segment_grad(rows, shape, segment_ids, size):
    """Gradient of a segment table of `size` rows: rows (M, D) of ids with this shape; segment_ids None: all are 0."""
    if segment_ids is not None:
        return position_grad(rows, shape, segment_ids, size)
    grad = rows.new_zeros(size, rows.shape[1])
    grad[0] = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    return grad


def norm_backward(ids, token, terms, norm_weight, norm_bias, mean, rstd, grad_normed, grad_hidden, wants_sum, normed_dtype):
    """grad_normed (M, D) -> grad_sum (M, D), before dropout, normed (M, D), grad_norm_weight (D,), grad_norm_bias (D,); what is
    not wanted comes as None, normed where it has no dtype. Without grad_normed only normed is computed."""
    M, T = ids.numel(), ids.shape[-1] if ids.dim() else 1
    V, D = token.shape
    affine_like = norm_bias if norm_weight is None else norm_weight
    wants_affine = grad_normed is not None and affine_like is not None
    block_m, block_d, warps = tuning.rows(D)
    programs = min(tuning.cdiv(M, block_m), 2 * tuning.device_of(token).multiprocessors)
    grad_sum = token.new_empty(M, D) if wants_sum else None
    normed = token.new_empty(M, D, dtype=normed_dtype) if normed_dtype else None
    partials = token.new_empty(2, programs, D, dtype=rstd.dtype) if wants_affine else None
    ids, token, norm_weight, norm_bias = tuning.dense(ids, token, norm_weight, norm_bias)
    with on_device(token):
        launch(norm_backward_kernel, (programs,))(
            ids,
            terms.arguments(),
            token,
            norm_weight,
            norm_bias,
            mean if mean.numel() else None,
            rstd,
            grad_normed,
            grad_hidden,
            grad_sum,
            normed,
            partials,
            (M, terms.period(T), V, terms.places),
            D=D,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=warps,
            **tuning.registers(tuning.device_of(token)),
        )
    affine = (None, None) if partials is None else (share.sum(0).to(affine_like.dtype) for share in partials)
    return grad_sum, normed, *affine


def packed(grads, widths):
    """Gradients of query, key and value, [(M, n)] of any strides or None, as one matrix (M, N); None where all are."""
    if all(grad is None for grad in grads):
        return None
    (like,) = [grad for grad in grads if grad is not None][:1]
    zeros = (like.new_zeros(like.shape[0], n) if g is None else g for g, n in zip(grads, widths, strict=True))
    return torch.cat(tuple(zeros), 1)


def tables_grad(grad_sum, ids, terms, padding_idx, sizes):
    """Gradients of tables of tokens, positions and segments of these sizes (0: not wanted, None), by that of hidden before its
    dropout (M, D)."""
    rows, places, kinds = sizes
    shape, M, weights = tuple(ids.shape), grad_sum.shape[0], None
    if rows and terms.scale is not None:
        weights = grad_sum.new_full((M,), terms.scale, dtype=torch.promote_types(grad_sum.dtype, torch.float32))
    return (
        table_grad(grad_sum, ids.reshape(-1), rows, padding_idx, weights=weights) if rows else None,
        position_grad(grad_sum, shape, terms.position_ids, places) if places else None,
        segment_grad(grad_sum, shape, terms.segment_ids, kinds) if kinds else None,
    )


def embed_backward(grad, ids, terms, padding_idx, sizes):
    """Gradients of tables as tables_grad has them, by that of hidden (M, D)."""
    return tables_grad(grad if terms.dropout is None else drop_again(grad, terms.dropout), ids, terms, padding_idx, sizes)


def embed_qkv_backward(
    grad_hidden, grads_qkv, ids, token, weight, terms, norm_weight, norm_bias, mean, rstd, heads, padding_idx, needs
):
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias, segment), None where `needs` says no.

    grad_hidden (M, D) and grads_qkv [(M, n)] of query, key and value, any of them None, of any strides. mean and rstd as
    embed_qkv returned them; heads: how many of query, key and value.
    """
    needs_token, needs_weight, needs_bias, needs_position, needs_norm_weight, needs_norm_bias, needs_segment = needs
    needs_sum = needs_token or needs_position or needs_segment
    grad_weight = grad_bias = grad_norm_weight = grad_norm_bias = None
    grad_sum = None if grad_hidden is None else grad_hidden.contiguous()
    grad_qkv = packed(grads_qkv, [weight.shape[0] // sum(heads) * h for h in heads])
    drops = terms.dropout is not None and needs_sum
    if grad_qkv is not None and ids.numel():
        normed = None
        if rstd.numel():
            wants_grad = needs_sum or needs_norm_weight or needs_norm_bias
            if wants_grad or needs_weight:
                new_sum, normed, grad_norm_weight, grad_norm_bias = norm_backward(
                    ids, token, terms, norm_weight, norm_bias, mean, rstd, grad_qkv @ weight if wants_grad else None, grad_sum,
                    needs_sum, weight.dtype if needs_weight else None,
                )  # fmt: skip
                grad_sum, drops = new_sum if needs_sum else None, False
        else:
            if needs_weight:
                normed = embed(ids, token, terms, 0.0).view(-1, token.shape[1]).to(weight.dtype)
            if needs_sum and grad_sum is not None and grad_sum.dtype == weight.dtype:
                grad_sum = torch.addmm(grad_sum, grad_qkv, weight)
            elif needs_sum:
                reached = (grad_qkv @ weight).to(token.dtype)
                grad_sum = reached if grad_sum is None else grad_sum + reached
        grad_weight = grad_qkv.t() @ normed if needs_weight else None
        grad_bias = grad_qkv.sum(0) if needs_bias else None
    grad_token = grad_position = grad_segment = None
    if grad_sum is not None:
        if drops:
            grad_sum = drop_again(grad_sum, terms.dropout)
        sizes = (token.shape[0], terms.places, 0 if terms.segment is None else terms.segment.shape[0])
        needed = (needs_token, needs_position, needs_segment)
        sizes = [size if need else 0 for size, need in zip(sizes, needed, strict=True)]
        grad_token, grad_position, grad_segment = tables_grad(grad_sum, ids, terms, padding_idx, sizes)
    return grad_token, grad_weight, grad_bias, grad_position, grad_norm_weight, grad_norm_bias, grad_segment
