"""The front end by kernels: gather, position, norm and QKV projection.

    hidden = token[ids] + position[position_ids]                    (M, D)  rounded to the table's dtype
    normed = LayerNorm(hidden) | RMSNorm(hidden) | hidden           statistics in fp32, rounded to the table's dtype
    qkv    = normed · weightᵀ + bias                                (M, N)  accumulated in fp32

Few tokens, as when decoding, take the one launch below; for more, normalising rows on their way into the product takes longer
than the product, so embed_qkv_rows.py does it before, or embed_qkv_folded.py after it. tuning.way chooses.

A program owns BLOCK_M tokens and a range ("run") of column tiles. It reads its rows once for their statistics (run 0 also
writes hidden), then once per column tile to project them; meanwhile they stay in L2, so the table is read from memory once.
For RMSNorm of bare token rows one reading does: its factor of a row is multiplied into the row's products, whose loop sums the
squares too.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Call

from . import tuning
from .arguments import are_many, epilogue_arguments, needs, period, places, terms_arguments
from .embed_qkv_folded import embed_qkv_folded_kernel, fold
from .embed_qkv_rows import embed_norm, project_norm
from .epilogue import count_tiles, find_tile, find_turns, paired_source, store_projected
from .launch import launch, on_device
from .tiles import dot, find_rows, gather_statistics, lane, load_hidden, normalise, store_hidden, sum_squares


@triton.constexpr_function
def step(rows, columns, token):
    """Columns that are read at a time for statistics: 8 KB, so that few reads follow each other."""
    return max(columns, 2**16 // (rows * token.dtype.element_ty.primitive_bitwidth))


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
    epilogue,  # as in epilogue.store_projected
    shape,  # M, T, V, L, widths of query and of key, and runs: the number of programs that share a row's column tiles
    eps,
    D,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    READS: tl.constexpr,  # rows for the projection: "again" from the tables, "back" from hidden, "once" as above
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
    writes = (run == 0) | (READS == "back")
    mu, scale = None, None
    if READS != "once":
        COLUMNS: tl.constexpr = step(BLOCK_M, BLOCK_K, token)
        mu, scale = gather_statistics(token, terms, rows, known, hidden, mean, rstd, M, writes, eps, D, BLOCK_M, COLUMNS)
    if READS == "back":  # this program's own writes: a barrier suffices, as programs that share rows write the same bits
        tl.debug_barrier()
        token, terms, rows = hidden, (None, None, (None, None, None, None), None, None, None), (m, tl.minimum(m, M - 1), m, m)

    tiles = count_tiles(query, key, BLOCK_N)
    for tile in range(run * tiles // runs, (run + 1) * tiles // runs):
        out, n0, width, first = find_tile(qkv, tile, query, key, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        column = first.to(tl.int64) + paired_source(n, HEAD_DIM, HALF)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        squares = tl.zeros((BLOCK_M, BLOCK_K // lane(token)), ACC)
        for d0 in range(0, D, BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            a = load_hidden(token, terms, rows, d, D)
            h = a
            if READS == "once":
                store_hidden(hidden, h, m, known, M, d, D, tile == 0)
            if rstd is not None:
                centre = mu if mean is not None else None
                a = normalise(a.to(ACC), centre, scale, norm_weight, norm_bias, d, D)
            a = a.to(weight.dtype.element_ty)  # under autocast the weight's dtype differs from the table's
            inside = (d < D)[:, None] & (n < width)[None, :]
            w = tl.load(weight + column[None, :] * stride_wn + d[:, None] * stride_wd, mask=inside, other=0.0)
            acc = dot(a, w, acc, PRECISION)
            if READS == "once":
                squares += sum_squares(h, token)
        if READS == "once":
            late = 1.0 / tl.sqrt(tl.sum(squares, 1) / D + eps)
            tl.store(rstd + m, late, mask=(m < M) & (tile == 0))
            acc *= late[:, None]
        if bias is not None:
            acc += tl.load(bias + column, mask=n < width, other=0.0).to(ACC)[None, :]
        acc = tl.where(turned[:, None], acc, float("nan"))
        store_projected(acc, out, m0, M, n0, width, first, query, key, epilogue, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)


@functools.lru_cache(1024)
def configure(M, N, D, groups, dtype, weight_dtype, device, normed, needs, way, tiles, batch_invariant, precision, kept, reads):
    """Which kernels run, as tuning.way, tiles, options of the launch, and how many programs share a row's tiles."""
    size = tuning.INVARIANT if batch_invariant else M
    way = way or tuning.way(size, N, D, dtype, device, kept, needs[1])
    if way == "folded" and not (normed and weight_dtype == dtype):
        way = "rows"
    if tiles is None:
        shape = size, N, D, weight_dtype, device, *needs
        if way == "few":
            tiles = tuning.few(*shape, table=dtype, once=reads == "once")
        elif way == "rows":
            tiles = tuning.product(*shape, precision=precision)
        else:
            tiles = tuning.embed_qkv_folded(*shape)
    query, key = (tuning.cdiv(N // sum(groups) * heads, tiles.BLOCK_N) for heads in groups[:2])
    options = {"PRECISION": precision, **tiles._asdict(), **tuning.registers(device)}
    return way, tiles, options, tuning.runs(M, query + 2 * key, tiles, device, resident=2 if way == "few" else 1)


def embed_qkv(
    call: Call, report: tuple | None = None, way: str | None = None, tiles: tuning.Tiles | None = None
) -> tuple[Tensor, ...]:
    """hidden, query, key, value, mean and rstd, of the shapes and dtypes of call.empty_outputs().

    report: of tiles.report_absent. way and tiles: instead of what tuning.py would choose.
    """
    terms, norm, projection, epilogue = call[:4]
    assert projection is not None
    hidden, query, key, value, mean, rstd = outputs = call.empty_outputs()
    weight, _, heads, kv_heads, *_ = projection
    M, (V, D), N, head_dim = terms.ids.numel(), terms.token.shape, weight.shape[0], value.shape[-1]
    if M == 0 or N == 0 or D == 0:
        return outputs
    bare = norm.kind == "rms" and norm.bias is None and terms.position is None and weight.dtype == hidden.dtype
    # fp16 products of rows that are not normalised may overflow.
    reads = "back" if are_many(terms) else "once" if bare and weight.dtype != torch.float16 else "again"
    device, layer, normed = tuning.device_of(weight), norm.kind == "layer", norm.kind != "none"
    way, tiles, options, runs = configure(
        M, N, D, (heads, kv_heads, kv_heads), hidden.dtype, weight.dtype, device, normed, needs(epilogue, head_dim), way, tiles,
        call.batch_invariant, tuning.precision(weight.dtype, device), call.kept is not None, reads,
    )  # fmt: skip
    T = terms.ids.shape[-1] if terms.ids.dim() else 1
    ends, pairs = epilogue_arguments(epilogue, T, head_dim)
    ids, token = tuning.dense(terms.ids, terms.token)
    affine = tuple(tuning.dense(norm.weight, norm.bias))
    inputs = ids, terms_arguments(terms, report), token
    qkv, statistics = (query, key, value), (mean if layer else None, rstd if normed else None)
    tables, widths = (M, period(terms), V, places(terms)), (heads * head_dim, kv_heads * head_dim)
    stored, shape = (hidden, qkv, statistics, ends), (*tables, *widths, runs)
    grid = (tuning.cdiv(M, tiles.BLOCK_M) * runs,)
    with on_device(token):
        if way == "rows":
            rows = embed_norm(*inputs, affine, hidden, statistics, ends, tables, norm.eps, weight.dtype)
            project_norm(rows, projection, qkv, ends, pairs, tiles, widths, options)
        elif way == "folded":
            make, how = functools.partial(fold, projection, norm, pairs), (weight.dtype, *pairs.values())
            folded, shift, residual = make() if call.kept is None else call.kept.get("folded", how, make)
            operand = tuning.operand(folded, (tiles.BLOCK_N, tiles.BLOCK_K), device)
            launch(embed_qkv_folded_kernel, grid)(
                *inputs, operand, shift, residual, *stored, shape, norm.eps, D, **pairs, **options
            )  # fmt: skip
        else:
            (bias,) = tuning.dense(projection.bias)
            launch(embed_qkv_kernel, grid)(
                *inputs, affine, (weight, *weight.stride()), bias, *stored, shape, norm.eps, D, READS=reads, **pairs, **options,
            )  # fmt: skip
    return outputs
