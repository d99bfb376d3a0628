"""The last step of the plans `distinct` and `table`: gather rows that were projected before, then norm, bias and rotary turn.

    hidden = token[ids] + position[position_ids]                                              (M, D), and its statistics
    qkv    = rotary(rstd · (projected[P + slot] + projected[position_ids]) + W·β + b)         (M, N)

projected holds P rows of positions, then rows of tokens; slot is a token's row among the latter.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Call, wide_dtype

from . import tuning
from .arguments import contiguous, epilogue_arguments, period, places, terms_arguments
from .epilogue import count_tiles, find_halves, find_pairs, find_tile, load_turns, store_pairs, turn
from .launch import launch, on_device
from .tiles import find_rows, gather_statistics, load_rows


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
    rotary,  # as in epilogue.store_projected
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
            if HALF > 0:
                left, right, pair = find_halves(n0, HEAD_DIM, HALF, BLOCK_N)
                x = gather_projected(projected, P + slot, place, first, left, width, N, factor, scale, shift, ACC)
                y = gather_projected(projected, P + slot, place, first, right, width, N, factor, scale, shift, ACC)
            else:
                left, right, pair = find_pairs(n0, HEAD_DIM, HALF, BLOCK_N)
                x, y = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
            x, y = turn(x, y, rotary, turn_row, pair, first < query + key, HALF)
            x, y = tl.where(known[:, None], x, float("nan")), tl.where(known[:, None], y, float("nan"))
            store_pairs(out, x, y, m, M, n0, width, None, left, right, HEAD_DIM, HALF)


def expand(
    call: Call,
    projected: Tensor,
    slots: Tensor | None,
    index: Tensor | None,
    offset: Tensor | None,
    P: int,
    gathered: bool,
    factor: float = 1.0,
    report: tuple | None = None,
) -> tuple[Tensor, ...]:
    """hidden, query, key and value in token's dtype, mean and rstd: shapes as of embed_qkv. Terms and norm are contiguous.

    projected: (P + U, N). slots: (V,) each token row's place among the U, then index (M,) is written; index without slots: of
    each token; neither: its id. offset: (N,) W·β + b. gathered: projected positions are in the order of position_ids, else
    in the table's. factor: of the projected rows.
    """
    assert call.projection is not None
    (terms, norm), groups = call[:2], call.projection.groups
    ids, token = terms.ids, terms.token
    M, (V, D), N = ids.numel(), token.shape, projected.shape[1]
    head_dim, wide = N // sum(groups), wide_dtype(token.dtype)
    # Not call.empty_outputs(), which takes the weight's dtype: a table's entries may have another one than token.
    hidden = token.new_empty(*ids.shape, D)
    qkv = tuple(token.new_empty(*ids.shape, heads, head_dim) for heads in groups)
    mean = token.new_empty(M if norm.kind == "layer" else 0, dtype=wide)
    rstd = token.new_empty(M if norm.kind != "none" else 0, dtype=wide)
    if hidden.numel() == 0:
        return hidden, *qkv, mean, rstd
    block_m, block_n, block_k = tuning.expand(D, N, token.dtype)
    blocks = tuning.cdiv(M, block_m)
    runs = 1 if blocks >= 2 * tuning.device_of(token).multiprocessors else tuning.cdiv(N, block_n)
    shape = (M, period(terms), V, places(terms), groups[0] * head_dim, groups[1] * head_dim, P, projected.shape[0] - P, runs)
    statistics = (mean if norm.kind == "layer" else None, rstd if norm.kind != "none" else None)
    (_, _, rotary, _), pairs = epilogue_arguments(call.epilogue, terms.length, head_dim)
    launch(expand_kernel, (blocks * runs,))(
        ids, terms_arguments(terms, report), token, projected, slots, index, offset, hidden, qkv, statistics, rotary, shape,
        (norm.eps, factor), D, GATHERED=gathered, **pairs, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        **tuning.registers(tuning.device_of(token)),
    )  # fmt: skip
    return hidden, *qkv, mean, rstd


def look_up(
    call: Call, projected: Tensor, offset: Tensor | None, factor: float = 1.0, report: tuple | None = None
) -> tuple[Tensor, ...]:
    """The `table` plan: hidden, query, key and value by a table of every row of positions and tokens, projected (L + V, N).

    call.norm is what is still to be applied, and of call.projection only the numbers of heads count. offset, factor: as of
    expand; report: of tiles.report_absent.
    """
    call = call._replace(terms=contiguous(call.terms))
    with on_device(call.terms.token):
        return expand(call, projected, None, None, offset, places(call.terms), False, factor, report)[:4]
