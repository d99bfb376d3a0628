"""The streaming pass of the plans `distinct` and `table`: gathers projected rows and finishes query, key and value.

hidden = token[ids] + position[places], and its statistics                             (M, D)
qkv    = rotary(rstd · (projected[P + slot] + projected[place]) + W·β + b)             (M, N)
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .arguments import Epilogue, Terms
from .launch import launch, on_device
from .tiles import (
    count_tiles,
    find_pairs,
    find_rows,
    find_tile,
    gather_statistics,
    load_rows,
    load_turns,
    store_pairs,
    turn,
)


@triton.jit
def gather_projected(projected, row, place, first, n, width, N, factor, scale, shift, ACC: tl.constexpr):
    """Columns n of the matrix that begins at column `first`: factor · rstd · (sum of the two projected rows) + W·β + b."""
    inside = (n < width)[None, :]
    x = tl.load(projected + first + row[:, None] * N + n[None, :], mask=inside, other=0.0).to(ACC)
    if place is not None:
        x += tl.load(projected + first + place.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0.0).to(ACC)
    x *= factor
    if scale is not None:
        x *= scale[:, None]
    if shift is not None:
        x += tl.load(shift + first + n, mask=n < width, other=0.0).to(ACC)[None, :]
    return x


@triton.jit
def expand_kernel(
    ids,  # (M,)
    terms,  # of hidden, as in tiles.find_rows
    token,  # (V, D)
    projected,  # (P + U, N) of positions, then of tokens
    slots,  # (V,) slot of each token row, whose projection is row P + slot; or None
    index,  # (M,) slot of each token: an output if slots are given (−1: id outside the table), else an input; None: slot = id
    shift,  # (N,) W·β + b, or None
    hidden,  # (M, D) out
    qkv,  # query, key, value out, (M, n) each
    statistics,  # mean out, (M,), None: RMSNorm or no norm; rstd out, (M,), None: no norm
    rotary,  # as in embed_qkv.store_projected
    shape,  # M, T, V, L, widths of query and of key, P, U and the number of programs that share a token's columns
    scalars,  # eps, and the factor of projected rows
    D,
    GATHERED: tl.constexpr,  # row p of projected belongs to position_ids[p], else to position p
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    M, T, V, L, query, key, P, U, runs = shape
    mean, rstd = statistics
    eps, factor = scalars
    N = query + 2 * key
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    run = tl.program_id(0) % runs
    m = (tl.program_id(0) // runs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, known = find_rows(ids, terms, m, M, T, V, L)
    _, scale = gather_statistics(token, terms, rows, known, hidden, mean, rstd, M, run == 0, eps, D, BLOCK_M, BLOCK_K)
    if rstd is None:
        scale = None
    _, row, place, _ = rows
    if terms[1] is None:
        place = None
    slot = row
    if slots is not None:
        slot = tl.load(slots + row, mask=known & (m < M), other=0).to(tl.int64)
        tl.store(index + m, tl.where(known, slot, -1).to(tl.int32), mask=(m < M) & (run == 0))
    elif index is not None:
        slot, _ = load_rows(index, m, m < M, U)
    if GATHERED:
        place = m % T
    if rotary[0] is not None:
        turn_row, placed = load_turns(rotary, m, m < M, terms[5])
        known &= placed

    tiles = count_tiles(query, key, BLOCK_N)
    for tile in range(run * tiles // runs, (run + 1) * tiles // runs):
        out, n0, width, first = find_tile(qkv, tile, query, key, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        if HALF == 0:
            x = gather_projected(projected, P + slot, place, first, n, width, N, factor, scale, shift, ACC)
        if rotary[0] is None:
            x = tl.where(known[:, None], x, float("nan")).to(out.dtype.element_ty)
            tl.store(out + m[:, None] * width + n[None, :], x, mask=(m < M)[:, None] & (n < width)[None, :])
        else:
            left, right, pair = find_pairs(n0, HEAD_DIM, HALF, BLOCK_N)
            if HALF > 0:
                x = gather_projected(projected, P + slot, place, first, left, width, N, factor, scale, shift, ACC)
                y = gather_projected(projected, P + slot, place, first, right, width, N, factor, scale, shift, ACC)
            else:
                x, y = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
            x, y = turn(x, y, rotary, turn_row, pair, first < query + key)
            x, y = tl.where(known[:, None], x, float("nan")), tl.where(known[:, None], y, float("nan"))
            store_pairs(out, x, y, m, M, n0, width, None, left, right, HEAD_DIM, HALF)


def expand(
    ids, token, position, position_ids, projected, slots, index, offset, norm, eps, heads, P, gathered, factor=1.0, rotary=None,
    report=None,
):  # fmt: skip
    """The streaming pass -> hidden (..., D), query, key and value (..., h, d_h), mean and rstd (M,) or (0,)."""
    M, T = ids.numel(), ids.shape[-1] if ids.dim() else 1
    (V, D), N = token.shape, projected.shape[1]
    head_dim, wide = N // sum(heads), torch.promote_types(token.dtype, torch.float32)
    hidden = token.new_empty(*ids.shape, D)
    qkv = tuple(token.new_empty(*ids.shape, h, head_dim) for h in heads)
    mean = token.new_empty(M if norm == "layer" else 0, dtype=wide)
    rstd = token.new_empty(M if norm != "none" else 0, dtype=wide)
    if hidden.numel() == 0:
        return hidden, *qkv, mean, rstd
    block_m, block_n, block_k = tuning.expand(D, N, token.dtype)
    blocks = tuning.cdiv(M, block_m)
    runs = 1 if blocks >= 2 * tuning.device_of(token).multiprocessors else tuning.cdiv(N, block_n)
    terms = Terms(position, position_ids, report=report)
    shape = (M, terms.period(T), V, terms.places, heads[0] * head_dim, heads[1] * head_dim, P, projected.shape[0] - P, runs)
    statistics = (mean if norm == "layer" else None, rstd if norm != "none" else None)
    (_, _, rotary, _), pairs = Epilogue(rotary=rotary).arguments(T, head_dim)
    launch(expand_kernel, (blocks * runs,))(
        ids, terms.arguments(), token, projected, slots, index, offset, hidden, qkv, statistics, rotary, shape,
        (eps, factor), D, GATHERED=gathered, **pairs, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        **tuning.registers(tuning.device_of(token)),
    )  # fmt: skip
    return hidden, *qkv, mean, rstd


def look_up(ids, token, position, position_ids, projected, offset, norm, eps, heads, factor, rotary, report=None):
    """The `table` plan: expand over a table (L + V, N) of all positions and tokens -> hidden, query, key, value."""
    ids, position_ids, token, position = tuning.dense(ids, position_ids, token, position)
    P = 0 if position is None else position.shape[0]
    with on_device(token):
        return expand(
            ids, token, position, position_ids, projected, None, None, offset, norm, eps, heads, P, False, factor, rotary,
            report,
        )[:4]  # fmt: skip
