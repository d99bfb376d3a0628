"""Many tokens, the norm folded into the weight: gather, position, norm and QKV projection by a plain product.

    folded = γ⊙W − mean over D of (γ⊙W)     shift = W·β + b     residual = sum over D of the rounded folded
    qkv    = rstd · (hidden · foldedᵀ − mean ⊗ residual) + shift    exact for any mean, whatever folded was rounded to

A small launch folds. Then a program owns BLOCK_M tokens and a range ("run") of column tiles: it gathers its rows once, for
their statistics, writes hidden and reads it back for each tile, while it stays in L2; the epilogue applies the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Norm, Projection, wide_dtype

from . import tuning
from .epilogue import count_tiles, find_tile, find_turns, paired_source, store_projected
from .launch import launch
from .tiles import dot, find_rows, gather_statistics, load_tile


@triton.jit
def fold_kernel(
    weight,  # (N, D)
    bias,  # (N,) or None
    norm_weight,  # (D,) or None
    norm_bias,  # (D,) or None
    folded,  # (N, D) out, rows stride_fn apart
    shift,  # (N,) out
    residual,  # (N,) out; None: RMSNorm, which does not centre
    N,
    stride_wn,
    stride_wd,
    stride_fn,
    D,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = paired_source(n, HEAD_DIM, HALF)  # makes rotary pairs adjacent
    rows = weight + source[:, None].to(tl.int64) * stride_wn
    totals = tl.zeros((BLOCK_N, BLOCK_K), ACC)  # tiles of partial sums: threads exchange theirs once
    affines = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for d0 in tl.range(0, D, BLOCK_K, num_stages=3):
        d = d0 + tl.arange(0, BLOCK_K)
        w = tl.load(rows + d[None, :] * stride_wd, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(ACC)
        if norm_bias is not None:
            affines += w * tl.load(norm_bias + d, mask=d < D, other=0.0).to(ACC)[None, :]
        if norm_weight is not None:
            w *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(ACC)[None, :]
        totals += w
    affine = tl.sum(affines, 1)
    if bias is not None:
        affine += tl.load(bias + source, mask=n < N, other=0.0).to(ACC)
    tl.store(shift + n, affine, mask=n < N)

    centre = tl.sum(totals, 1) / D if residual is not None else tl.zeros((BLOCK_N,), ACC)
    left = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for d0 in tl.range(0, D, BLOCK_K, num_stages=3):
        d = d0 + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (d < D)[None, :]
        w = tl.load(rows + d[None, :] * stride_wd, mask=inside, other=0.0).to(ACC)
        if norm_weight is not None:
            w *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(ACC)[None, :]
        rounded = tl.where(inside, w - centre[:, None], 0.0).to(folded.dtype.element_ty)
        tl.store(folded + n[:, None].to(tl.int64) * stride_fn + d[None, :], rounded, mask=inside)
        left += rounded.to(ACC)
    if residual is not None:
        tl.store(residual + n, tl.sum(left, 1), mask=n < N)


@triton.jit
def embed_qkv_folded_kernel(
    ids,  # (M,)
    terms,  # of hidden, and the report of absent rows, as in tiles.find_rows
    token,  # (V, D)
    folded,  # (N, D), as in tiles.load_tile
    shift,  # (N,)
    residual,  # (N,), or None: RMSNorm
    hidden,  # (M, D) out
    qkv,  # query, key, value out, (M, n) each
    statistics,  # mean out, (M,), None: RMSNorm; rstd out, (M,)
    epilogue,  # as in epilogue.store_projected
    shape,  # M, T, V, L, widths of query and of key, and runs: the number of programs that share a row's column tiles
    eps,
    D,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    mean, rstd = statistics
    M, T, V, L, query, key, runs = shape
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    run = tl.program_id(0) % runs
    m0 = (tl.program_id(0) // runs).to(tl.int64) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    rows, known = find_rows(ids, terms, m, M, T, V, L)
    turned = find_turns(epilogue, terms, m, M, known)
    _, scale = gather_statistics(token, terms, rows, known, hidden, mean, rstd, M, True, eps, D, BLOCK_M, BLOCK_K)
    scale = tl.where(turned, scale, float("nan"))
    # Each program wrote all rows that it reads back (programs that share rows wrote the same bits), so a barrier among its
    # own threads suffices, and the loop below is a plain matrix product without gathers and sums.
    tl.debug_barrier()
    rows = hidden + m0 * D + tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - m0).to(tl.int32))[:, None] * D

    tiles = count_tiles(query, key, BLOCK_N)
    for tile in range(run * tiles // runs, (run + 1) * tiles // runs):
        out, n0, width, first = find_tile(qkv, tile, query, key, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for d0 in range(0, D, BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            a = tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0.0)
            acc = dot(a, load_tile(folded, first + n0, d0, BLOCK_N, BLOCK_K, True), acc, PRECISION)
        n = n0 + tl.arange(0, BLOCK_N)
        if mean is not None:
            row = tl.arange(0, BLOCK_M)
            mu = tl.load(mean + m0 + row, mask=row < M - m0, other=0.0)  # read back: kept, it would not fit into registers
            acc -= mu[:, None] * tl.load(residual + first + n, mask=n < width, other=0.0)[None, :]
        acc = acc * scale[:, None] + tl.load(shift + first + n, mask=n < width, other=0.0)[None, :]
        store_projected(acc, out, m0, M, n0, width, first, query, key, epilogue, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)


def fold(projection: Projection, norm: Norm, pairs: dict[str, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The norm folded into the projection: folded (N, D), rows at multiples of 16 bytes, shift (N,), residual (N,) or None.

    pairs: HEAD_DIM and HALF; the rows of rotary pairs are moved side by side.
    """
    weight = projection.weight
    N, D = weight.shape
    folded = tuning.padded(weight, N, D)
    bias, norm_weight, norm_bias = tuning.dense(projection.bias, norm.weight, norm.bias)
    shift = weight.new_empty(N, dtype=wide_dtype(weight.dtype))
    residual = torch.empty_like(shift) if norm.kind == "layer" else None
    tiles = tuning.fold(weight)
    options = {**tiles, **tuning.registers(tuning.device_of(weight))}
    launch(fold_kernel, (tuning.cdiv(N, tiles["BLOCK_N"]),))(
        weight, bias, norm_weight, norm_bias, folded, shift, residual, N, *weight.stride(), folded.stride(0), D, **pairs,
        **options,
    )  # fmt: skip
    return folded, shift, residual
