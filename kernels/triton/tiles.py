"""Pieces that the kernels share: jitted functions only.

Tiles are (rows, columns) blocks in registers; `mask` always says which of their elements exist.
"""

import triton
import triton.language as tl


@triton.jit
def report_absent(report, TABLE: tl.constexpr, row, m, absent, size):
    """Tells the host of a token m whose id `row` is absent from a table of `size` rows: the first to come since it last looked.

    report: words (6,) in memory of the host, where the first word counts those that came; length of sequences."""
    words, length = report
    words += m * 0
    came = tl.atomic_add(words, tl.full(m.shape, 1, tl.int64), mask=absent, sem="relaxed")
    first = absent & (came == 0)
    tl.store(words + 1, TABLE, mask=first)
    tl.store(words + 2, row, mask=first)
    tl.store(words + 3, m, mask=first)
    tl.store(words + 4, size, mask=first)
    tl.store(words + 5, length, mask=first)


@triton.jit
def load_rows(ids, index, mask, size, report=None, m=None, TABLE: tl.constexpr = 0):
    """Table rows that ids[index] name, and which of them exist; a row that does not exist is read as row 0, and reported."""
    row = tl.load(ids + index, mask=mask, other=0).to(tl.int64)
    known = (row >= 0) & (row < size)
    if report is not None:
        report_absent(report, TABLE, row, m, known == 0, size)
    return tl.where(known, row, 0), known


@triton.jit
def load_places(position_ids, m, mask, T, size, report=None, TABLE: tl.constexpr = 1):
    """Rows of the position table: each token's place in its sequence, or what position_ids say."""
    place = m % T
    known = place < size
    if position_ids is not None:
        place, known = load_rows(position_ids, place, mask, size, report, m, TABLE)
    return place, known


@triton.jit
def find_rows(ids, terms, m, M, T, V, L):
    """Rows of the token, position and segment tables that tokens m take, and whether they all exist.

    terms, here and below: position_ids (T,) or (M,) or None: the place in the sequence; position (L, D), or int64 (2, D) of
    wave(), or None; segment: its ids, their number, table and rows, or all None; scale of the token row or None; dropout: seed,
    probability and what is kept is multiplied by, or None; report, of report_absent, or None."""
    position_ids, position, segment, _, _, report = terms
    row, known = load_rows(ids, m, m < M, V, report, m)
    place, kind = m, tl.zeros_like(m)
    if position is not None:
        place, placed = load_places(position_ids, m, m < M, T, L, report)
        known &= placed
    if segment[2] is not None:
        kind_ids, period, _, kinds = segment
        if kind_ids is not None:
            kind, there = load_rows(kind_ids, m % period, m < M, kinds, report, m, 2)
            known &= there
    return (m, row, place, kind), known


@triton.jit
def wave(steps, place, d, D, ACC: tl.constexpr):
    """Sines of place·steps[0, d] + steps[1, d], in units of 2⁻⁶⁴ turns: integers drop whole turns without an error."""
    step = tl.load(steps + d, mask=d < D, other=0)
    start = tl.load(steps + D + d, mask=d < D, other=0)
    turn = (place.to(tl.int64)[:, None] * step[None, :] + start[None, :]) >> 32
    half = tl.full((1, 1), 1 << 31, tl.int64)
    mirrored = tl.where(turn > 0, half, -half) - turn  # sin(π − x) = sin(x): a quarter of a turn is left
    x = tl.where(tl.abs(turn) > 1073741824, mirrored, turn).to(ACC) * 9.313225746154785e-10  # in quarters
    y = x * x
    # Minimax polynomial of sin(x·π/2) on [−1, 1], error 1.4e-11; tl.sin, ready for any argument, would spill.
    p = 1.602172462954465e-4 - 3.4182130339566186e-6 * y
    p = 1.5707963266218756 + y * (-0.6459640926526955 + y * (0.0796925873350185 + y * (-0.0046816203507595855 + y * p)))
    return tl.minimum(tl.maximum(x * p, -1.0), 1.0)


@triton.jit
def drop(x, dropout, m, d, ACC: tl.constexpr):
    """x, of which each element is zero with the given probability: element (m, d) by Philox of the seed and its place alone."""
    seed, probability, factor = dropout
    quads = tl.min(d, 0) // 4 + tl.arange(0, x.shape[1] // 4)  # four numbers come at once
    zero = tl.zeros((x.shape[0], x.shape[1] // 4), tl.uint32)
    low, high = m.to(tl.uint32)[:, None], (m >> 32).to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(tl.load(seed), quads.to(tl.uint32)[None, :] + zero, low + zero, high + zero, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), x.shape)
    return tl.where(tl.uint_to_uniform_float(bits) >= probability, x.to(ACC) * factor, 0.0).to(x.dtype)


@triton.jit
def load_hidden(token, terms, rows, d, D):
    """hidden[:, d], each term rounded to the table's dtype as eager rounds it; 0 past column D."""
    _, position, segment, scale, dropout, _ = terms
    m, row, place, kind = rows
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    inside = (d < D)[None, :]
    x = tl.load(token + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    if scale is not None:
        x = (x.to(ACC) * scale).to(x.dtype)
    if segment[2] is not None:
        x += tl.load(segment[2] + kind[:, None] * D + d[None, :], mask=inside, other=0.0)
    if position is not None:
        if position.dtype.element_ty == tl.int64:
            x += wave(position, place, d, D, ACC).to(x.dtype)
        else:
            x += tl.load(position + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    if dropout is not None:
        x = drop(x, dropout, m, d, ACC)
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
    terms,
    rows,
    known,
    hidden,
    mean,
    rstd,
    M,
    writes,
    eps,
    D,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and rstd of each row, where mean and rstd are not None. The program that `writes` stores them, and hidden."""
    m = rows[0]
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    mu = tl.zeros((ROWS,), ACC)
    squares = tl.zeros((ROWS,), ACC)
    stop = D
    if rstd is None:
        stop = tl.where(writes, D, 0)
    for d0 in range(0, stop, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        h = load_hidden(token, terms, rows, d, D)
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
def count_tiles(query, key, BLOCK_N: tl.constexpr):
    """Column tiles of query, key and value: none lies across two of them, so that each has one place to load or store."""
    return tl.cdiv(query, BLOCK_N) + 2 * tl.cdiv(key, BLOCK_N)


@triton.jit
def find_tile(qkv, tile, query, key, BLOCK_N: tl.constexpr):
    """A column tile's matrix, its first column there, that matrix' width, and its first column among those of all three."""
    q, k, v = qkv
    of_query, of_key = tl.cdiv(query, BLOCK_N), tl.cdiv(key, BLOCK_N)
    later, last = tile >= of_query, tile >= of_query + of_key
    matrix = tl.where(last, v, tl.where(later, k, q))
    first = tl.where(later, query, 0) + tl.where(last, key, 0)
    tile -= tl.where(later, of_query, 0) + tl.where(last, of_key, 0)
    return matrix, tile * BLOCK_N, tl.where(later, key, query), first


@triton.jit
def paired_source(n, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """The projection's column that comes to column n of a tile whose pairs of rotary columns stand side by side."""
    if HALF > 0:
        c = n % HEAD_DIM
        n = tl.where(c < 2 * HALF, n - c + c // 2 + c % 2 * HALF, n)
    return n


@triton.jit
def find_pairs(n0, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of each pair in a tile that begins at n0, and the pair's number within its head.

    HALF: pairs (i, i + HALF) come first in a head; 0: all are neighbours.
    """
    i = n0 // 2 + tl.arange(0, BLOCK_N // 2)
    pair = i % (HEAD_DIM // 2)
    first, second = 2 * i, 2 * i + 1
    if HALF > 0:
        first = tl.where(pair < HALF, 2 * i - pair, first)
        second = tl.where(pair < HALF, first + HALF, second)
    return first, second, pair


@triton.jit
def load_turns(rotary, m, mask, report=None):
    """The row of cosines and sines that each token takes, and whether it exists."""
    _, _, turn_ids, period, rows, _ = rotary
    return load_places(turn_ids, m, mask, period, rows, report, 3)


@triton.jit
def turn(x, y, rotary, row, pair, turns):
    """Pairs (x, y) turned by the angle of their row, where the matrix `turns` and the pair is one that does."""
    cos, sin, _, _, _, half = rotary
    turned = ((pair < half) & turns)[None, :]
    angle = row[:, None] * half + pair[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return tl.where(turned, x * c - y * s, x), tl.where(turned, y * c + x * s, y)


@triton.jit
def head_offsets(m, n, width, length, HEAD_DIM: tl.constexpr):
    """Where rows m and columns n of query, key or value lie: (M, n), or, of sequences of `length` tokens, (B, H, T, d_h)."""
    rows, columns = m * width, n.to(tl.int64)
    if length is not None:
        rows = m // length * length * width + m % length * HEAD_DIM
        columns = columns // HEAD_DIM * length * HEAD_DIM + columns % HEAD_DIM
    return rows, columns


@triton.jit
def store_pairs(out, x, y, m, M, n0, width, length, first, second, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Columns first and second of rows m: in two pieces of whole lines, or side by side."""
    inside = (m < M)[:, None]
    if HALF > 0:
        rows, columns = head_offsets(m, first, width, length, HEAD_DIM)
        tl.store(out + rows[:, None] + columns[None, :], x.to(out.dtype.element_ty), mask=inside & (first < width)[None, :])
        rows, columns = head_offsets(m, second, width, length, HEAD_DIM)
        tl.store(out + rows[:, None] + columns[None, :], y.to(out.dtype.element_ty), mask=inside & (second < width)[None, :])
    else:
        z = tl.interleave(x, y)
        n = n0 + tl.arange(0, z.shape[1])
        rows, columns = head_offsets(m, n, width, length, HEAD_DIM)
        tl.store(out + rows[:, None] + columns[None, :], z.to(out.dtype.element_ty), mask=inside & (n < width)[None, :])


@triton.jit
def normalise_heads(acc, head_norm, first, query, key, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm of each head of a tile whose columns begin with a head's, where the tile is of query or key."""
    query_weight, key_weight, eps = head_norm
    weight = tl.where(first < query, query_weight, key_weight)
    x = tl.reshape(acc, (acc.shape[0], acc.shape[1] // HEAD_DIM, HEAD_DIM))
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 2) / HEAD_DIM + eps)
    gamma = tl.load(weight + paired_source(tl.arange(0, HEAD_DIM), HEAD_DIM, HALF)).to(acc.dtype)
    normed = tl.reshape(x * scale[:, :, None] * gamma[None, None, :], acc.shape)
    return tl.where(first < query + key, normed, acc)
