"""Dozens of tokens and more: hidden and its norm first, each row once, then QKV by a plain product.

    hidden = token[ids] + position[position_ids]                    (M, D)  rounded to the table's dtype
    normed = LayerNorm(hidden) | RMSNorm(hidden) | hidden           (M, D)  statistics in fp32, in the weight's dtype
    qkv    = normed · weightᵀ + bias                                (M, N)  accumulated in fp32

Two launches: programs of a single one that share rows would each normalise them, which takes as long as the product from some
32 tokens on. normed is scratch memory, which is freed when the call ends.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Projection

from . import tuning
from .epilogue import count_tiles, find_tile, find_turns, paired_source, store_projected
from .launch import launch
from .tiles import dot, find_rows, gather_statistics, load_at, load_tile, normalise


@triton.jit
def embed_norm_kernel(
    ids,  # (M,)
    terms,  # of hidden, and the report of absent rows, as in tiles.find_rows
    token,  # (V, D)
    affine,  # the norm's weight and bias, (D,) or None
    hidden,  # (M, D) out
    normed,  # (M, D) out, rows stride_xm apart
    statistics,  # mean out, (M,), None: RMSNorm or no norm; rstd out, (M,), None: no norm
    epilogue,  # as in epilogue.store_projected: normed of tokens that it has no turn for is NaN
    shape,  # M, T, V, L
    stride_xm,
    eps,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L = shape
    mean, rstd = statistics
    norm_weight, norm_bias = affine
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, known = find_rows(ids, terms, m, M, T, V, L)
    turned = find_turns(epilogue, terms, m, M, known)
    mu, scale = gather_statistics(token, terms, rows, known, hidden, mean, rstd, M, True, eps, D, BLOCK_M, BLOCK_D)
    tl.debug_barrier()  # the program's own writes are read back
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (m < M)[:, None] & (d < D)[None, :]
        x = tl.load(hidden + m[:, None] * D + d[None, :], mask=inside, other=0.0)
        if rstd is not None:
            x = normalise(x.to(ACC), mu if mean is not None else None, scale, norm_weight, norm_bias, d, D)
        x = tl.where(turned[:, None], x.to(normed.dtype.element_ty), float("nan"))
        tl.store(normed + m[:, None] * stride_xm + d[None, :], x, mask=inside)


@triton.jit
def project_norm_kernel(
    normed,  # (M, D), as in tiles.load_tile
    weight,  # (N, D), or (D, N) when TRANSPOSED: as in tiles.load_at where HALF > 0, else as in tiles.load_tile
    bias,  # (N,) or None
    qkv,  # query, key, value out, (M, n) each
    epilogue,  # as in epilogue.store_projected
    M,
    query,  # width
    key,  # width
    D,
    TRANSPOSED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if qkv[0].dtype.element_ty == tl.float64 else tl.float32
    tiles = count_tiles(query, key, BLOCK_N)
    m0 = tl.program_id(0) // tiles * BLOCK_M
    out, n0, width, first = find_tile(qkv, tl.program_id(0) % tiles, query, key, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_N)
    column = first + paired_source(n, HEAD_DIM, HALF)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for d0 in range(0, D, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        if HALF > 0:
            w = load_at(weight, d, column) if TRANSPOSED else load_at(weight, column, d, True)
        elif TRANSPOSED:
            w = load_tile(weight, d0, first + n0, BLOCK_K, BLOCK_N)
        else:
            w = load_tile(weight, first + n0, d0, BLOCK_N, BLOCK_K, True)
        acc = dot(load_tile(normed, m0, d0, BLOCK_M, BLOCK_K), w, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + column, mask=n < width, other=0.0).to(ACC)[None, :]
    m0 = m0.to(tl.int64)
    store_projected(acc, out, m0, M, n0, width, first, query, key, epilogue, HEAD_DIM, HALF, BLOCK_M, BLOCK_N)


def embed_norm(ids, terms, token, affine, hidden, statistics, epilogue, shape, eps, dtype) -> Tensor:
    """normed (M, D) of dtype, rows at multiples of 16 bytes; writes hidden and statistics. Arguments as of the kernel."""
    M, D = shape[0], token.shape[1]
    normed = tuning.padded(hidden, M, D, dtype)
    rows, columns = tuning.embed_norm(D, token.dtype)
    launch(embed_norm_kernel, (tuning.cdiv(M, rows),))(
        ids, terms, token, affine, hidden, normed, statistics, epilogue, shape, normed.stride(0), eps, D, BLOCK_M=rows,
        BLOCK_D=columns, num_warps=4, **tuning.registers(tuning.device_of(token)),
    )  # fmt: skip
    return normed


def project_norm(normed: Tensor, projection: Projection, qkv, epilogue, pairs: dict[str, int], tiles, widths, options) -> None:
    """qkv = normed · weightᵀ + bias, and the epilogue. widths: of query and of key. pairs: HEAD_DIM and HALF."""
    M, D = normed.shape
    device = tuning.device_of(normed)
    described = pairs["HALF"] == 0 and tuning.aligned(normed.dtype, *widths)  # TMA cannot permute rows
    weight, transposed = tuning.weight_operand(projection.weight, tiles, device, by_pointers=not described)
    (bias,) = tuning.dense(projection.bias)
    programs = tuning.cdiv(M, tiles.BLOCK_M) * sum(tuning.cdiv(width, tiles.BLOCK_N) for width in (*widths, widths[1]))
    launch(project_norm_kernel, (programs,))(
        tuning.operand(normed, (tiles.BLOCK_M, tiles.BLOCK_K), device), weight, bias, qkv, epilogue, M, *widths, D,
        TRANSPOSED=transposed, **pairs, **options,
    )  # fmt: skip
