"""The one-pass kernel: gather, position, norm and QKV projection in one launch.

    hidden = token[ids] + position[position_ids]                    (M, D)  rounded to the table's dtype
    normed = LayerNorm(hidden) | RMSNorm(hidden) | hidden           statistics in fp32, rounded to the table's dtype
    qkv    = normed · weightᵀ + bias                                (M, N)  accumulated in fp32

A program owns BLOCK_M tokens and a range ("run") of column tiles. It reads its rows once for their statistics (run 0 also
writes hidden), then once per column tile to project them; meanwhile they stay in L2, so the table is read from memory once.

Normalising rows on their way into the tensor cores costs four times the instructions of the plain product. So for many tokens a
small launch first folds the norm into the weight, and the epilogue of the product applies the rest:

    folded = γ⊙W − mean over D of (γ⊙W)     shift = W·β + b     residual = sum over D of the rounded folded
    qkv    = rstd · (hidden · foldedᵀ − mean ⊗ residual) + shift    exact for any mean, whatever folded was rounded to
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Call, Norm, Projection, wide_dtype

from . import tuning
from .arguments import are_many, epilogue_arguments, needs, period, places, terms_arguments
from .launch import launch, on_device
from .tiles import (
    count_tiles,
    dot,
    find_rows,
    find_tile,
    gather_statistics,
    load_hidden,
    load_tile,
    load_turns,
    normalise,
    normalise_heads,
    pair_group,
    paired_source,
    turn_tile,
)


@triton.jit
def embed_qkv_kernel(
    ids,  # (M,)
    terms,  # of hidden, and the report of absent rows, as in tiles.find_rows
    token,  # (V, D)
    affine,  # the norm's weight and bias, (D,) or None
    weight,  # (N, D), and its strides
    bias,  # (N,) or None
    hidden,  # (M, D) out
    qkv,  # query, key, value out, (M, n) each
    statistics,  # mean out, (M,), None: RMSNorm or no norm; rstd out, (M,), None: no norm
    epilogue,  # as in store_projected
    shape,  # M, T, V, L, widths of query and of key, and runs: the number of programs that share a row's column tiles
    eps,
    D,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    READ_BACK: tl.constexpr,  # read hidden back for the projection, instead of gathering and adding the terms again
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    M, T, V, L, query, key, runs = shape
    mean, rstd = statistics
    norm_weight, norm_bias = affine
    weight, stride_wn, stride_wd = weight
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    run = tl.program_id(0) % runs  # runs vary fastest, so that programs that share rows are scheduled together
    m0 = (tl.program_id(0) // runs).to(tl.int64) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    rows, known = find_rows(ids, terms, m, M, T, V, L)
    turned = find_turns(epilogue, terms, m, M, known)
    writes = (run == 0) | READ_BACK
    mu, scale = gather_statistics(token, terms, rows, known, hidden, mean, rstd, M, writes, eps, D, BLOCK_M, BLOCK_K)
    if READ_BACK:  # this program's own writes: a barrier suffices, as in embed_qkv_folded_kernel
        tl.debug_barrier()
        token, terms, rows = hidden, (None, None, (None, None, None, None), None, None, None), (m, tl.minimum(m, M - 1), m, m)

    tiles = count_tiles(query, key, BLOCK_N)
    for tile in range(run * tiles // runs, (run + 1) * tiles // runs):
        out, n0, width, first = find_tile(qkv, tile, query, key, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        column = first.to(tl.int64) + paired_source(n, HEAD_DIM, HALF)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for d0 in range(0, D, BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            a = load_hidden(token, terms, rows, d, D)
            if rstd is not None:
                centre = mu if mean is not None else None
                a = normalise(a.to(ACC), centre, scale, norm_weight, norm_bias, d, D)
            a = a.to(weight.dtype.element_ty)  # under autocast the weight's dtype differs from the table's
            inside = (d < D)[:, None] & (n < width)[None, :]
            w = tl.load(weight + column[None, :] * stride_wn + d[:, None] * stride_wd, mask=inside, other=0.0)
            acc = dot(a, w, acc, PRECISION)
        if bias is not None:
            acc += tl.load(bias + column, mask=n < width, other=0.0).to(ACC)[None, :]
        acc = tl.where(turned[:, None], acc, float("nan"))
        store_projected(acc, out, m0, M, n0, width, first, query, key, epilogue, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)


@triton.jit
def find_turns(epilogue, terms, m, M, known):
    """Which of the `known` tokens have a row of cosines and sines too, if the epilogue turns heads. Reports those without."""
    _, _, rotary, _ = epilogue
    if rotary[0] is not None:
        _, placed = load_turns(rotary, m, m < M, terms[5])
        known = known & placed
    return known


@triton.jit
def store_projected(
    acc,
    out,
    m0,
    M,
    n0,
    width,
    first,
    query,
    key,
    epilogue,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Applies the epilogue to a tile of the projection, rows from m0 on, and stores it.

    epilogue is the tuple of
    head_norm  weights (d_h,) of query and of key, and eps: RMSNorm of each head of query and key; or None
    second     bias (query,) of a second query, which is stored M rows after the first; or None
    rotary     (cos, sin (rows, R/2), row of each token or None, period, rows, R/2), or six times None
    length     sequence length, for outputs (B, H, length, d_h); None: (M, width)
    """
    head_norm, second, rotary, length = epilogue
    if head_norm is not None:
        acc = normalise_heads(acc, head_norm, first, query, key, HEAD_DIM, HALF)
    if second is not None and first < query:
        n = paired_source(n0 + tl.arange(0, BLOCK_N), HEAD_DIM, HALF)
        more = acc + tl.load(second + n, mask=n < width, other=0.0).to(acc.dtype)[None, :]
        behind = out + tl.cast(M, tl.int64) * width
        store_turned(more, behind, m0, M, n0, width, True, rotary, length, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)
    store_turned(acc, out, m0, M, n0, width, first < query + key, rotary, length, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)


@triton.jit
def store_turned(
    acc,
    out,
    m0,
    M,
    n0,
    width,
    turns,
    rotary,
    length,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Offsets within the tile are int32: 64 bits for each of its rows would not fit into registers beside it.
    row = tl.arange(0, BLOCK_M)
    z = acc.to(out.dtype.element_ty)
    if rotary[0] is not None and turns:
        place, _ = load_turns(rotary, (m0 % rotary[3]).to(tl.int32) + row, row < M - m0)
        z = turn_tile(acc, rotary, place.to(tl.int64), n0, out.dtype.element_ty, HEAD_DIM, HALF, BLOCK_N)
    n = paired_source(n0 + tl.arange(0, BLOCK_N), HEAD_DIM, HALF)
    inside = (row < M - m0)[:, None] & (n < width)[None, :]
    if length is None:
        tl.store(out + m0 * width + (row[:, None] * width + n[None, :]), z, mask=inside)
    else:
        t = (m0 % length).to(tl.int32) + row
        rows = (t // length).to(tl.int64) * length * width + t % length * HEAD_DIM
        columns = (n // HEAD_DIM).to(tl.int64) * length * HEAD_DIM + n % HEAD_DIM
        if HALF > 0:
            GROUP: tl.constexpr = pair_group(HEAD_DIM, HALF)
            columns = tl.max_contiguous(tl.multiple_of(columns, GROUP), GROUP)
        tl.store(out + m0 // length * length * width + (rows[:, None] + columns[None, :]), z, mask=inside)


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
    epilogue,  # as in store_projected
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


@functools.lru_cache(1024)
def configure(M, N, D, groups, dtype, weight_dtype, device, normed, needs, folds, tiles, batch_invariant):
    """Whether to fold the norm into the weight, tiles, options of the launch, and how many programs share a row's tiles."""
    size = tuning.INVARIANT if batch_invariant else M
    if folds is None:
        folds = tuning.folds(size, dtype) and weight_dtype == dtype
    folds = folds and normed
    if tiles is None and folds:
        tiles = tuning.embed_qkv_folded(size, N, D, weight_dtype, device, *needs)
    elif tiles is None:
        tiles = tuning.embed_qkv(size, N, D, weight_dtype, device, *needs, dtype)
    query, key = (tuning.cdiv(N // sum(groups) * heads, tiles.BLOCK_N) for heads in groups[:2])
    return folds, tiles, {**tiles._asdict(), **tuning.registers(device)}, tuning.runs(M, query + 2 * key, tiles, device)


def embed_qkv(
    call: Call, report: tuple | None = None, folds: bool | None = None, tiles: tuning.Tiles | None = None
) -> tuple[Tensor, ...]:
    """hidden, query, key, value, mean and rstd, of the shapes and dtypes of call.empty_outputs().

    report: of tiles.report_absent. folds and tiles: instead of what tuning.py would choose.
    """
    terms, norm, projection, epilogue = call[:4]
    assert projection is not None
    hidden, query, key, value, mean, rstd = outputs = call.empty_outputs()
    weight, _, heads, kv_heads, *_ = projection
    M, (V, D), N, head_dim = terms.ids.numel(), terms.token.shape, weight.shape[0], value.shape[-1]
    if M == 0 or N == 0 or D == 0:
        return outputs
    device, layer, normed = tuning.device_of(weight), norm.kind == "layer", norm.kind != "none"
    folds, tiles, options, runs = configure(
        M, N, D, (heads, kv_heads, kv_heads), hidden.dtype, weight.dtype, device, normed, needs(epilogue, head_dim), folds,
        tiles, call.batch_invariant,
    )  # fmt: skip
    T = terms.ids.shape[-1] if terms.ids.dim() else 1
    ends, pairs = epilogue_arguments(epilogue, T, head_dim)
    ids, token = tuning.dense(terms.ids, terms.token)
    inputs = ids, terms_arguments(terms, report), token
    stored = hidden, (query, key, value), (mean if layer else None, rstd if normed else None), ends
    shape = (M, period(terms), V, places(terms), heads * head_dim, kv_heads * head_dim, runs)
    options = {"PRECISION": tuning.precision(weight.dtype, device), **pairs, **options}
    grid = (tuning.cdiv(M, tiles.BLOCK_M) * runs,)
    with on_device(token):
        if folds:
            folded, shift, residual = fold(projection, norm, pairs)
            operand = tuning.operand(folded, (tiles.BLOCK_N, tiles.BLOCK_K), device)
            launch(embed_qkv_folded_kernel, grid)(
                *inputs, operand, shift, residual, *stored, shape, norm.eps, D, **options
            )  # fmt: skip
        else:
            bias, norm_weight, norm_bias = tuning.dense(projection.bias, norm.weight, norm.bias)
            launch(embed_qkv_kernel, grid)(
                *inputs, (norm_weight, norm_bias), (weight, *weight.stride()), bias, *stored, shape, norm.eps, D,
                READ_BACK=are_many(terms), **options,
            )  # fmt: skip
    return outputs
