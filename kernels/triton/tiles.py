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
    2 segment, 3 rotary; keys.report_count has others), row, m, size, sequence length."""
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


@triton.constexpr_function
def computes(position, dropout):
    """Whether terms take computing, not only loading: sines or dropout. It keeps a program busy while rows come, and what two
    steps of it hold at once would not fit into registers."""
    return dropout is not None or position is not None and position.dtype.element_ty == tl.int64


@triton.constexpr_function
def lane(token):
    """Columns that a thread loads of `token` at a time, 16 bytes: sums over them take no exchange among threads."""
    return 128 // token.dtype.element_ty.primitive_bitwidth


@triton.jit
def lanes(x, token):
    """A tile (rows, columns) as (rows, lanes, columns of a lane)."""
    LANE: tl.constexpr = lane(token)
    return tl.reshape(x, (x.shape[0], x.shape[1] // LANE, LANE))


@triton.jit
def sum_squares(x, token):
    """Sums of the squares of a tile (rows, columns), in fp32 or fp64: (rows, lanes)."""
    x = lanes(x.to(tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32), token)
    return tl.sum(x * x, 2)


@triton.jit
def store_hidden(hidden, h, m, known, M, d, D, writes):
    """Stores columns d of hidden if `writes`: NaN for tokens that are not `known`."""
    shown = tl.where(known[:, None], h, float("nan"))
    tl.store(hidden + m[:, None] * D + d[None, :], shown, mask=(m < M)[:, None] & (d < D)[None, :] & writes)


@triton.jit
def welford(x, mean, m2, seen, count, mask):
    """Merges `count` columns, the last axis of x, into the mean and sum of squared deviations of the `seen` columns before them
    (Chan et al. 1979)."""
    share = count / tl.maximum(seen + count, 1.0)
    tile_mean = tl.sum(x, 2) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, x - tile_mean[:, :, None], 0.0)
    delta = tile_mean - mean
    m2 += tl.sum(deviation * deviation, 2) + delta * delta * (seen * share)
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
    LANE: tl.constexpr = lane(token)
    LANES: tl.constexpr = BLOCK_K // LANE
    mu = tl.zeros((ROWS, LANES), ACC)
    squares = tl.zeros((ROWS, LANES), ACC)
    stop = D
    if rstd is None:
        stop = tl.where(writes, D, 0)
    AHEAD: tl.constexpr = 2 if computes(terms[1], terms[4]) else 3
    for d0 in tl.range(0, stop, BLOCK_K, num_stages=AHEAD):
        d = d0 + tl.arange(0, BLOCK_K)
        h = load_hidden(token, terms, rows, d, D)
        store_hidden(hidden, h, m, known, M, d, D, writes)
        if mean is not None:
            columns = lanes(d[None, :], token)
            count = tl.minimum(tl.maximum(D - d0 - tl.arange(0, LANES) * LANE, 0), LANE).to(ACC)[None, :]
            mu, squares = welford(lanes(h.to(ACC), token), mu, squares, d0 // LANES, count, columns < D)
        elif rstd is not None:
            squares += sum_squares(h, token)
    centre = tl.sum(squares, 1)
    scale = centre
    if mean is not None:
        left = tl.minimum(tl.maximum(D % BLOCK_K - tl.arange(0, LANES) * LANE, 0), LANE)
        seen = (D // BLOCK_K * LANE + left).to(ACC)[None, :]
        centre = tl.sum(mu * seen, 1) / D
        apart = mu - centre[:, None]
        scale += tl.sum(apart * apart * seen, 1)
        tl.store(mean + m, centre, mask=(m < M) & writes)
    if rstd is not None:
        scale = 1.0 / tl.sqrt(scale / D + eps)
        tl.store(rstd + m, scale, mask=(m < M) & writes)
    return centre, scale


@triton.jit
def normalise(x, mean, rstd, norm_weight, norm_bias, d, D):
    """(x − mean)·rstd·weight + bias; mean None: RMSNorm; rstd None: without it. Columns past D are finite, and 0 if there is a
    weight."""
    if mean is not None:
        x -= mean[:, None]
    if rstd is not None:
        x *= rstd[:, None]
    if norm_weight is not None:
        x *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    if norm_bias is not None:
        x += tl.load(norm_bias + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    return x


@triton.jit
def load_vector(vector, d, D, absent: tl.constexpr, ACC: tl.constexpr):
    """Columns d of a vector (D,); without one `absent`, as for a norm without weight or bias."""
    if vector is None:
        return tl.full(d.shape, absent, ACC)
    else:
        return tl.load(vector + d, mask=d < D, other=0.0).to(ACC)


@triton.jit
def load_tile(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr = False):
    """The tile that begins at (row, column) of a matrix, 0 past its edges; TURNED: its transpose. matrix: of tuning.operand."""
    if isinstance(matrix, tl.core.tensor_descriptor_base):
        tile = matrix.load([row, column])
        return tile.T if TURNED else tile
    else:
        return load_at(matrix, row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), TURNED)


@triton.jit
def load_at(matrix, r, c, TURNED: tl.constexpr = False):
    """Rows r and columns c of a matrix, 0 past its edges; TURNED: the transpose. matrix: pointer, rows, columns, row stride."""
    pointer, height, width, stride = matrix
    if TURNED:  # turning the pointers, not what is loaded, lets Triton copy into shared memory asynchronously
        r, c = r[None, :], c[:, None]
    else:
        r, c = r[:, None], c[None, :]
    return tl.load(pointer + r.to(tl.int64) * stride + c, mask=(r < height) & (c < width), other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b on the tensor cores. PRECISION, "ieee" or "tf32", applies to fp32 only."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
