"""Device functions of the projection's columns: tiles of query, key and value, norms of heads, rotary turns, stores.

@triton.jit functions only, which kernels share. A tile is a block (rows, columns) in registers.
"""

import triton
import triton.language as tl

from .tiles import load_places


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


@triton.constexpr_function
def head_group(HEAD_DIM, HALF):
    """How many columns of a head are neighbours in its tile and its output alike: 8, which are 16 bytes, or as many as divide a
    head, or if HALF > 0 both halves."""
    sizes = HALF | HEAD_DIM // 2 | 8 if HALF > 0 else HEAD_DIM | 8
    return sizes & -sizes


@triton.constexpr_function
def pair_group(HEAD_DIM, HALF):
    """How many neighbours of a half stay together in a tile, before those of the other half; 1: pairs are neighbours."""
    return head_group(HEAD_DIM, HALF) if HALF > 0 else 1


@triton.jit
def paired_source(n, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """The column of the projection for column n of a tile in which groups of both halves of a head alternate, so that a thread
    has both columns of a rotary pair (HALF = 0: they are neighbours as they are)."""
    if HALF > 0:
        GROUP: tl.constexpr = pair_group(HEAD_DIM, HALF)
        c = n % HEAD_DIM
        group = c // GROUP
        n = tl.where(c < 2 * HALF, n - c + group // 2 * GROUP + group % 2 * HALF + c % GROUP, n)
        n = tl.max_contiguous(tl.multiple_of(n, GROUP), GROUP)
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
def find_halves(n0, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """As find_pairs, for kernels that load both columns of a pair by themselves. Columns after 2·HALF, which are not rotated,
    are paired by halves too: then both tiles are runs of columns, of which a thread can load and store 16 bytes at a time."""
    i = n0 // 2 + tl.arange(0, BLOCK_N // 2)
    head, pair = i // (HEAD_DIM // 2), i % (HEAD_DIM // 2)
    first = head * HEAD_DIM + pair
    second = first + HALF
    if 2 * HALF < HEAD_DIM:
        first = tl.where(pair < HALF, first, first + HALF)
        second = tl.where(pair < HALF, second, first + HEAD_DIM // 2 - HALF)
    return first, second, pair


@triton.jit
def load_turns(rotary, m, mask, report=None):
    """Each token's row of cosines and sines, and whether it exists. rotary: as in store_projected."""
    _, _, turn_ids, period, rows, _ = rotary
    return load_places(turn_ids, m, mask, period, rows, report, 3)


@triton.jit
def turn(x, y, rotary, row, pair, turns, HALF: tl.constexpr = 0):
    """Pairs (x, y) rotated by the angle of their row, if the matrix is rotated (`turns`: query and key) and the pair is.

    HALF > 0: the number of rotated pairs, known at compile time, so that cosines can be loaded 16 bytes at a time."""
    cos, sin, _, _, _, width = rotary
    half = HALF if HALF > 0 else width
    turned = ((pair < half) & turns)[None, :]
    angle = row[:, None] * half + pair[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return tl.where(turned, x * c - y * s, x), tl.where(turned, y * c + x * s, y)


@triton.jit
def turn_tile(acc, rotary, row, n0, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """turn() of a tile of query or key that begins at column n0, its columns as paired_source has them; in dtype DTYPE."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    WIDEST: tl.constexpr = 16 if HALF > 0 else 64
    if BLOCK_N > WIDEST:  # in halves: cosines and sines of a whole tile would not fit into registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        left = turn_tile(left, rotary, row, n0, DTYPE, HEAD_DIM, HALF, BLOCK_N // 2)
        right = turn_tile(right, rotary, row, n0 + BLOCK_N // 2, DTYPE, HEAD_DIM, HALF, BLOCK_N // 2)
        z = tl.permute(tl.join(left, right), (0, 2, 1))
    else:
        GROUP: tl.constexpr = pair_group(HEAD_DIM, HALF)
        pair = (n0 // 2 + tl.arange(0, BLOCK_N // 2)) % (HEAD_DIM // 2)
        x, y = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2 // GROUP, 2, GROUP)), (0, 1, 3, 2)))
        x, y = tl.reshape(x, (BLOCK_M, BLOCK_N // 2)), tl.reshape(y, (BLOCK_M, BLOCK_N // 2))
        if 2 * HALF == HEAD_DIM:  # without masks, the heads of a tile share what they load
            angle = row[:, None] * HALF + pair[None, :]
            c, s = tl.load(rotary[0] + angle), tl.load(rotary[1] + angle)
            x, y = x * c - y * s, y * c + x * s
        else:
            x, y = turn(x, y, rotary, row, pair, True)
        z = tl.reshape(tl.join(x.to(DTYPE), y.to(DTYPE)), (BLOCK_M, BLOCK_N // 2 // GROUP, GROUP, 2))
        z = tl.permute(z, (0, 1, 3, 2))
    return tl.reshape(z, (BLOCK_M, BLOCK_N))


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
        GROUP: tl.constexpr = head_group(HEAD_DIM, HALF)  # said of each factor, since Triton loses what is said of their sum
        head = tl.max_constancy(n // HEAD_DIM, GROUP)
        within = tl.max_contiguous(tl.multiple_of(n % HEAD_DIM, GROUP), GROUP)
        columns = head.to(tl.int64) * length * HEAD_DIM + within
        tl.store(out + m0 // length * length * width + (rows[:, None] + columns[None, :]), z, mask=inside)
