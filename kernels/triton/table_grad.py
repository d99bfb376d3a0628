"""The gradient of a table: sums of the gradients of its rows' tokens, without atomics, each in a fixed order.

    grad_table[v] = Σ rows[m] over the tokens m with ids[m] = v                   (V, D)

Ids are sorted (stable: the order of each sum is fixed) and runs of equal ids are summed. Runs are split at multiples of
CHUNK: a run inside one chunk is summed and written at once; the partial sums of a longer run go to a buffer, which a second
launch adds up in order. So the time does not depend on how often an id repeats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import wide_dtype

from . import tuning
from .launch import launch, on_device

CHUNK = 64


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
    ADDS: tl.constexpr,  # whether rows of grad are added to, which no other program touches
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = start // CHUNK
    end = tl.minimum((chunk + 1) * CHUNK, M)
    lane = start + tl.arange(0, CHUNK)
    here = tl.load(ids + lane, mask=lane < end, other=-1)  # before it is known whether a run begins: one wait for all ids
    row = tl.load(ids + start).to(tl.int64)
    opens = (start == 0) | (tl.load(ids + tl.maximum(start - 1, 0)) != row)
    if (opens | (start % CHUNK == 0)) & (row >= 0) & (row < V) & (row != padding_idx):
        count = tl.sum((here == row).to(tl.int32), 0)
        total = tl.zeros((BLOCK_M, BLOCK_D), pieces.dtype.element_ty)
        for i in tl.range(0, count, BLOCK_M, num_stages=2):
            step = i + tl.arange(0, BLOCK_M)
            source = tl.load(order + start + step, mask=step < count, other=0)
            inside = (step < count)[:, None] & (d < D)[None, :]
            x = tl.load(rows + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(total.dtype)
            if weights is not None:
                x *= tl.load(weights + source, mask=step < count, other=0.0)[:, None]
            total += x
        acc = tl.sum(total, 0)
        leaves = (start + count == end) & (tl.load(ids + tl.minimum(end, M - 1)) == row) & (end < M)
        if opens & (leaves == 0):
            if ADDS:
                acc += tl.load(grad + row * stride_gv + d, mask=d < D, other=0.0).to(acc.dtype)
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
    ADDS: tl.constexpr,
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
        if ADDS:
            acc += tl.load(grad + row * stride_gv + d, mask=d < D, other=0.0).to(acc.dtype)
        tl.store(grad + row * stride_gv + d, acc.to(grad.dtype.element_ty), mask=d < D)


def table_grad(
    rows: Tensor,
    ids: Tensor,
    size: int,
    padding_idx: int = -1,
    dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    adds: bool = False,
) -> Tensor:
    """The gradient (size, D) of a table: rows (M, D), times weights (M,), summed by ids (M,); ids without a row are left out.

    order: torch.sort(ids, stable=True), where it is known. out: (size, D), of which only rows that an id names are written,
    or, where it adds, changed by their sums.
    """
    M, D = rows.shape
    rows = rows.contiguous()  # sum().backward() passes an expanded gradient of stride 0
    grad = rows.new_zeros(size, D, dtype=dtype or rows.dtype) if out is None else out
    if M == 0 or D == 0:
        return grad
    ids, order = torch.sort(ids, stable=True) if order is None else order
    chunks = tuning.cdiv(M, CHUNK)
    pieces = rows.new_empty(2, chunks, D, dtype=wide_dtype(rows.dtype))
    block_m, block_d = tuning.segment(D)
    tiles = {"D": D, "ADDS": adds, "CHUNK": CHUNK, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": 4}
    with on_device(rows):
        launch(segment_kernel, (M, tuning.cdiv(D, block_d)))(
            rows, ids, order, weights, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles
        )
        launch(join_kernel, (chunks, tuning.cdiv(D, block_d)))(ids, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles)
    return grad


def position_grad(rows: Tensor, T: int, position_ids: Tensor | None, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient (size, D) of a position table: rows (M, D) of sequences of T tokens, summed by position."""
    dtype = dtype or rows.dtype
    if position_ids is not None and position_ids.numel() == rows.shape[0]:
        return table_grad(rows, position_ids.reshape(-1), size, dtype=dtype)
    wide = wide_dtype(rows.dtype)
    per_place = rows.view(-1, T, rows.shape[1]).sum(0, dtype=wide) if rows.numel() else rows.new_zeros(T, rows.shape[1])
    if position_ids is not None:
        return table_grad(per_place, position_ids.reshape(-1), size, dtype=dtype)
    grad = rows.new_zeros(size, rows.shape[1], dtype=dtype)
    grad[:T] = per_place[:size]
    return grad


def segment_grad(rows: Tensor, T: int, segment_ids: Tensor | None, size: int) -> Tensor:
    """The gradient (size, D) of a segment table; without segment_ids every token takes row 0."""
    if segment_ids is not None:
        return position_grad(rows, T, segment_ids, size)
    grad = rows.new_zeros(size, rows.shape[1])
    grad[0] = rows.sum(0, dtype=wide_dtype(rows.dtype))
    return grad
