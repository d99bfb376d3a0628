"""Pieces that the kernels share: jitted functions only.

Tiles are (rows, columns) blocks in registers; `mask` always says which of their elements exist.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ids, index, mask, size):
    """Table rows that ids[index] name, and which of them exist; a row that does not exist is read as row 0."""
    row = tl.load(ids + index, mask=mask, other=0).to(tl.int64)
    known = (row >= 0) & (row < size)
    return tl.where(known, row, 0), known


@triton.jit
def load_places(position_ids, m, mask, T, size):
    """Rows of the position table: each token's place in its sequence, or what position_ids say."""
    place = m.to(tl.int32) % T
    known = place < size
    if position_ids is not None:
        place, known = load_rows(position_ids, place, mask, size)
    return place, known


@triton.jit
def load_hidden(token, position, row, place, d, D):
    """hidden[:, d] = token[row] + position[place], rounded to the table's dtype as eager rounds it; 0 past column D."""
    inside = (d < D)[None, :]
    x = tl.load(token + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    if position is not None:
        p = tl.load(position + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        x += p
    return x


@triton.jit
def welford(x, mean, m2, seen, count, mask):
    """Merge a tile of `count` columns into the running mean and sum of squared deviations of each row (Chan 1979)."""
    share = count.to(x.dtype) / (seen + count).to(x.dtype)
    tile_mean = tl.sum(x, 1) / count.to(x.dtype)
    deviation = tl.where(mask, x - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    m2 += tl.sum(deviation * deviation, 1) + delta * delta * (seen * share)
    return mean + delta * share, m2


@triton.jit
def gather_statistics(
    token,
    position,
    row,
    place,
    known,
    hidden,
    mean,
    rstd,
    m,
    M,
    writes,
    eps,
    D,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and rstd of each row, where mean and rstd are not None. The program that `writes` stores them, and hidden."""
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    mu = tl.zeros((ROWS,), ACC)
    squares = tl.zeros((ROWS,), ACC)
    stop = D
    if rstd is None:
        stop = tl.where(writes, D, 0)
    for d0 in range(0, stop, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        h = load_hidden(token, position, row, place, d, D)
        shown = tl.where(known[:, None], h, float("nan"))
        tl.store(hidden + m[:, None] * D + d[None, :], shown, mask=(m < M)[:, None] & (d < D)[None, :] & writes)
        h = h.to(ACC)
        if mean is not None:
            mu, squares = welford(h, mu, squares, d0, tl.minimum(BLOCK_K, D - d0), (d < D)[None, :])
        elif rstd is not None:
            squares += tl.sum(h * h, 1)
    scale = squares
    if mean is not None:
        tl.store(mean + m, mu, mask=(m < M) & writes)
    if rstd is not None:
        scale = 1.0 / tl.sqrt(squares / D + eps)
        tl.store(rstd + m, scale, mask=(m < M) & writes)
    return mu, scale


@triton.jit
def normalise(x, mean, rstd, norm_weight, norm_bias, d, D):
    """(x − mean)·rstd·weight + bias; a mean of None is RMSNorm. Past column D it is finite, and 0 with a weight."""
    if mean is not None:
        x -= mean[:, None]
    x *= rstd[:, None]
    if norm_weight is not None:
        x *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    if norm_bias is not None:
        x += tl.load(norm_bias + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b on the tensor cores; PRECISION ("ieee" or "tf32") matters to fp32 alone."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def store_qkv(qkv, x, m, n, M, query, key):
    """Columns n of the projection to their places in query, key and value; each store is wide, as one over all could not be."""
    q, k, v = qkv
    x = x.to(q.dtype.element_ty)
    inside = (m < M)[:, None]
    tl.store(q + m[:, None] * query + n[None, :], x, mask=inside & (n < query)[None, :])
    n -= query
    tl.store(k + m[:, None] * key + n[None, :], x, mask=inside & ((n >= 0) & (n < key))[None, :])
    n -= key
    tl.store(v + m[:, None] * key + n[None, :], x, mask=inside & ((n >= 0) & (n < key))[None, :])


@triton.jit
def load_qkv(qkv, m, n, mask, query, key):
    """Columns n of the rows m of (query, key, value) side by side; 0 where mask (rows) says no."""
    q, k, v = qkv
    rows = mask[:, None]
    x = tl.load(q + m[:, None] * query + n[None, :], mask=rows & (n < query)[None, :], other=0.0)
    n -= query
    x += tl.load(k + m[:, None] * key + n[None, :], mask=rows & ((n >= 0) & (n < key))[None, :], other=0.0)
    n -= key
    return x + tl.load(v + m[:, None] * key + n[None, :], mask=rows & ((n >= 0) & (n < key))[None, :], other=0.0)
