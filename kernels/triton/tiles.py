"""Device functions that the kernels share: @triton.jit functions only.

M tokens in sequences of T; tables of tokens (V, D), positions (L, D) and segments (S, D); N columns of the projection. A tile
is a block (rows, columns) in registers, and `mask` says which of its elements exist.
"""

import triton
import triton.language as tl


@triton.jit
def report_absent(report, TABLE: tl.constexpr, row, m, absent, size):
    """Reports to the host the first token m, since it last looked, whose id `row` is outside a table of `size` rows (`absent`).

    report: words and the sequence length. words (6,) int64 in host memory: number of absent rows, TABLE (0 token, 1 position,
    2 segment, 3 rotary), row, m, size, sequence length."""
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
    """ids[index] as row numbers of a table of `size` rows, int64, and which of them exist. Those that do not are replaced by 0,
    and reported if there is a report."""
    row = tl.load(ids + index, mask=mask, other=0).to(tl.int64)
    known = (row >= 0) & (row < size)
    if report is not None:
        report_absent(report, TABLE, row, m, known == 0, size)
    return tl.where(known, row, 0), known


@triton.jit
def load_places(position_ids, m, mask, T, size, report=None, TABLE: tl.constexpr = 1):
    """Rows of the position table, and which of them exist: m mod T, or position_ids[m mod T]."""
    place = m % T
    known = place < size
    if position_ids is not None:
        place, known = load_rows(position_ids, place, mask, size, report, m, TABLE)
    return place, known


@triton.jit
def find_rows(ids, terms, m, M, T, V, L):
    """(m, rows of the token, position and segment tables) for tokens m, and whether all of a token's rows exist.

    terms, here and below, is the tuple of what hidden is the sum of:
    position_ids  (T,) or (M,), or None: 0 … T−1
    position      (L, D), or int64 (2, D): the steps of wave(), or None
    segment       (segment_ids, their number, table (S, D), S); segment_ids None: all 0; without segments all four are None
    scale         factor of the token row, or None
    dropout       (seed (1,) int64, probability, 1 / (1 − probability)), or None
    report        as in report_absent, or None
    """
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
    """sin(place·steps[0, d] + steps[1, d]), angles in units of 2⁻⁶⁴ turns: int64 overflow removes whole turns exactly."""
    step = tl.load(steps + d, mask=d < D, other=0)
    start = tl.load(steps + D + d, mask=d < D, other=0)
    turn = (place.to(tl.int64)[:, None] * step[None, :] + start[None, :]) >> 32
    half = tl.full((1, 1), 1 << 31, tl.int64)
    mirrored = tl.where(turn > 0, half, -half) - turn  # sin(π − x) = sin(x): reduces the angle to a quarter turn
    x = tl.where(tl.abs(turn) > 1073741824, mirrored, turn).to(ACC) * 9.313225746154785e-10  # in quarter turns
    y = x * x
    # Minimax polynomial of sin(x·π/2) on [−1, 1], error 1.4e-11. tl.sin reduces any argument, and spills registers.
    p = 1.602172462954465e-4 - 3.4182130339566186e-6 * y
    p = 1.5707963266218756 + y * (-0.6459640926526955 + y * (0.0796925873350185 + y * (-0.0046816203507595855 + y * p)))
    return tl.minimum(tl.maximum(x * p, -1.0), 1.0)


@triton.jit
def drop(x, dropout, m, d, ACC: tl.constexpr):
    """Dropout of a tile: element (m, d) is zeroed with the given probability, else multiplied by factor. Its random number is
    Philox of (seed, m, d), so that forward and backward agree for any tiling."""
    seed, probability, factor = dropout
    quads = tl.min(d, 0) // 4 + tl.arange(0, x.shape[1] // 4)  # Philox gives four numbers per counter
    zero = tl.zeros((x.shape[0], x.shape[1] // 4), tl.uint32)
    low, high = m.to(tl.uint32)[:, None], (m >> 32).to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(tl.load(seed), quads.to(tl.uint32)[None, :] + zero, low + zero, high + zero, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), x.shape)
    return tl.where(tl.uint_to_uniform_float(bits) >= probability, x.to(ACC) * factor, 0.0).to(x.dtype)


@triton.jit
def load_hidden(token, terms, rows, d, D):
    """hidden[:, d] of tokens with these rows (of find_rows), 0 for d >= D. Each sum is rounded to the table's dtype, as in
    eager PyTorch."""
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
    """Merges a tile of `count` columns into each row's mean and sum of squared deviations of the `seen` columns before it (Chan
    et al. 1979)."""
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
    """Mean and rstd of each row of hidden, stored together with hidden by the programs for which `writes` is true.

    mean None: RMSNorm, rstd of the uncentred squares. rstd None: no norm. `known` false: hidden is NaN."""
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
    """(x − mean)·rstd·weight + bias; mean None: RMSNorm. Columns past D are finite, and 0 if there is a weight."""
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
    """acc + a·b on the tensor cores. PRECISION, "ieee" or "tf32", applies to fp32 only."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def count_tiles(query, key, BLOCK_N: tl.constexpr):
    """The number of column tiles of query, key and value (widths query, key, key). No tile spans two of these matrices."""
    return tl.cdiv(query, BLOCK_N) + 2 * tl.cdiv(key, BLOCK_N)


@triton.jit
def find_tile(qkv, tile, query, key, BLOCK_N: tl.constexpr):
    """Of a column tile: its matrix (one of qkv), its first column there, the matrix's width, and the matrix's first column
    among all N columns."""
    q, k, v = qkv
    of_query, of_key = tl.cdiv(query, BLOCK_N), tl.cdiv(key, BLOCK_N)
    later, last = tile >= of_query, tile >= of_query + of_key
    matrix = tl.where(last, v, tl.where(later, k, q))
    first = tl.where(later, query, 0) + tl.where(last, key, 0)
    tile -= tl.where(later, of_query, 0) + tl.where(last, of_key, 0)
    return matrix, tile * BLOCK_N, tl.where(later, key, query), first


@triton.jit
def paired_source(n, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """The column of the projection for column n of a tile in which rotary pairs are adjacent."""
    if HALF > 0:
        c = n % HEAD_DIM
        n = tl.where(c < 2 * HALF, n - c + c // 2 + c % 2 * HALF, n)
    return n


@triton.jit
def find_pairs(n0, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both columns of each rotary pair in a tile that begins at column n0, and the pair's index within its head.

    HALF > 0: the pairs of a head are (i, i + HALF) for i < HALF, and any columns after 2·HALF are paired (2i, 2i + 1) but not
    rotated. HALF = 0: all pairs are (2i, 2i + 1).
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
    """Each token's row of cosines and sines, and whether it exists. rotary: as in embed_qkv.store_projected."""
    _, _, turn_ids, period, rows, _ = rotary
    return load_places(turn_ids, m, mask, period, rows, report, 3)


@triton.jit
def turn(x, y, rotary, row, pair, turns):
    """Pairs (x, y) rotated by the angle of their row, if the matrix is rotated (`turns`: query and key) and the pair is."""
    cos, sin, _, _, _, half = rotary
    turned = ((pair < half) & turns)[None, :]
    angle = row[:, None] * half + pair[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return tl.where(turned, x * c - y * s, x), tl.where(turned, y * c + x * s, y)


@triton.jit
def head_offsets(m, n, width, length, HEAD_DIM: tl.constexpr):
    """Offsets of rows m and of columns n in query, key or value: layout (M, width), or (B, H, length, HEAD_DIM) if length is
    not None."""
    rows, columns = m * width, n.to(tl.int64)
    if length is not None:
        rows = m // length * length * width + m % length * HEAD_DIM
        columns = columns // HEAD_DIM * length * HEAD_DIM + columns % HEAD_DIM
    return rows, columns


@triton.jit
def store_pairs(out, x, y, m, M, n0, width, length, first, second, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Stores the pairs (x, y) of rows m to columns first and second: two stores of consecutive columns, or one interleaved."""
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
    """RMSNorm of each head in a tile of whole heads. Tiles of value (first >= query + key) are returned as they are.

    head_norm: weights (d_h,) of query and of key, and eps."""
    query_weight, key_weight, eps = head_norm
    weight = tl.where(first < query, query_weight, key_weight)
    x = tl.reshape(acc, (acc.shape[0], acc.shape[1] // HEAD_DIM, HEAD_DIM))
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 2) / HEAD_DIM + eps)
    gamma = tl.load(weight + paired_source(tl.arange(0, HEAD_DIM), HEAD_DIM, HALF)).to(acc.dtype)
    normed = tl.reshape(x * scale[:, :, None] * gamma[None, None, :], acc.shape)
    return tl.where(first < query + key, normed, acc)
