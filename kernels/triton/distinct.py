"""The `distinct` plan: project each distinct token and each position once, then gather.

    find     marks the ids that occur, numbers them by a prefix sum and lists them          U stays on the device
    prepare  used = rows of positions, then of distinct tokens, centred, times γ            (P + U, D)
    project  projected = used · weightᵀ, by a persistent product that reads U from memory   (P + U, N)
    expand   hidden = token[ids] + position[position_ids], and its statistics               (M, D)
             qkv = rstd · (projected[P + slot] + projected[position_ids]) + W·β + b         (M, N)

Exact, because the linear part of a norm distributes over the sum: only rstd depends on both. Buffers have room for min(M, V)
distinct rows and the host is never waited for, so a CUDA graph can capture the plan and replay it with other ids.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Call, Norm, Projection, Terms, wide_dtype

from . import tuning
from .arguments import contiguous, places
from .expand import expand
from .launch import launch, on_device
from .tiles import dot, load_places, load_rows, load_tile, load_vector


@triton.jit
def mark_kernel(
    ids,  # (M,)
    position_ids,  # (T,) or (M,), or None
    seen,  # (V,) int8 out, zero before: 1 for ids that occur
    shape,  # M, T, V, L
    BLOCK_M: tl.constexpr,
):
    M, T, V, L = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, known = load_rows(ids, m, m < M, V)
    if position_ids is not None:
        _, placed = load_places(position_ids, m, m < M, T, L)
        known &= placed
    tl.store(seen + row, 1, mask=(m < M) & known)


@triton.jit
def number_kernel(
    seen,  # (V,) int8
    slots,  # (V,) out: the number of each seen row
    rows,  # (min(M, V),) out: the seen rows, ascending
    count,  # (1,) out: U, the number of seen rows
    V,
    BLOCK_V: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_V
    lane = tl.arange(0, BLOCK_V)
    # Every program counts all seen rows before its own: V bytes from L2 cost less than a second launch or a look-back.
    STEP: tl.constexpr = 4 * BLOCK_V
    earlier = tl.zeros((STEP,), tl.int32)
    for v0 in tl.range(0, start, STEP, num_stages=3):
        place = v0 + tl.arange(0, STEP)
        earlier += tl.load(seen + place, mask=place < start, other=0).to(tl.int32)
    before = tl.sum(earlier, 0)
    v = start + lane
    flag = tl.load(seen + v, mask=v < V, other=0).to(tl.int32)
    number = before + tl.cumsum(flag, 0) - flag
    tl.store(slots + v, number, mask=flag > 0)
    tl.store(rows + number, v, mask=flag > 0)
    if start + BLOCK_V >= V:
        tl.store(count, before + tl.sum(flag, 0))


@triton.jit
def prepare_kernel(
    rows,  # (U,) rows of the token table
    place_rows,  # (P,) rows of the position table, or None: 0 … P−1
    count,  # (1,) U
    token,  # (V, D)
    position,  # (L, D) or None
    norm_weight,  # (D,) or None
    used,  # (P + U, D) out, rows stride_um apart
    units,  # (P + U,) out, or None: the divisor of each row, its largest magnitude, so that it fits fp16
    shape,  # P, V, L
    stride_um,
    D,
    CENTRE: tl.constexpr,
    HELD: tl.constexpr,  # whether BLOCK_D columns hold a whole row
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    P, V, L = shape
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    WIDTH = BLOCK_D if HELD else D
    total = P + tl.load(count)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < total:
        found = find_used(rows, place_rows, r, total, P, V, L)
        x = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        centre = tl.zeros((BLOCK_M,), ACC)
        unit = tl.full((BLOCK_M,), 1e-30, ACC)
        if HELD or CENTRE:
            for d0 in range(0, WIDTH, BLOCK_D):
                x = load_used(token, position, found, d0 + tl.arange(0, BLOCK_D), D).to(ACC)
                if CENTRE:
                    centre += tl.sum(x, 1) / D
        if units is not None:
            for d0 in range(0, WIDTH, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                if not HELD:
                    x = load_used(token, position, found, d, D).to(ACC)
                unit = tl.maximum(unit, tl.max(tl.abs(scale_used(x, centre, norm_weight, d, D)), 1))
            tl.store(units + r, unit, mask=r < total)
        for d0 in range(0, WIDTH, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            if not HELD:
                x = load_used(token, position, found, d, D).to(ACC)
            y = scale_used(x, centre, norm_weight, d, D)
            if units is not None:
                y /= unit[:, None]
            inside = (r < total)[:, None] & (d < D)[None, :]
            tl.store(used + r[:, None] * stride_um + d[None, :], y.to(used.dtype.element_ty), mask=inside)


@triton.jit
def find_used(rows, place_rows, r, total, P, V, L):
    """Of rows r of (positions, then distinct tokens): their rows in the token and in the position table, and which are a token
    and which a position. Past row `total` they are neither."""
    is_token = (r >= P) & (r < total)
    row, _ = load_rows(rows, r - P, is_token, V)
    place = r
    if place_rows is not None:
        place, _ = load_rows(place_rows, r, r < P, L)
    return row, place, is_token, r < P


@triton.jit
def load_used(token, position, found, d, D):
    """Columns d of the rows that find_used found, in the tables' dtype; 0 past column D."""
    row, place, is_token, is_place = found
    columns = (d < D)[None, :]
    x = tl.load(token + row[:, None] * D + d[None, :], mask=is_token[:, None] & columns, other=0.0)
    if position is not None:  # one of the two is 0
        x += tl.load(position + place[:, None] * D + d[None, :], mask=is_place[:, None] & columns, other=0.0)
    return x


@triton.jit
def scale_used(x, centre, norm_weight, d, D):
    """(x − centre)·γ, 0 past column D."""
    x = tl.where((d < D)[None, :], x - centre[:, None], 0.0)
    return x * load_vector(norm_weight, d, D, 1.0, x.dtype)[None, :]


@triton.jit
def project_kernel(
    rows,  # (P + U, K), as in tiles.load_tile
    weight,  # (N, K), or (K, N) when TRANSPOSED, as in tiles.load_tile
    units,  # (P + U,) or None
    count,  # (1,) U
    out,  # (P + U, N)
    P,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = P + tl.load(count)
    across = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(total, BLOCK_M) * across, tl.num_programs(0)):
        m0 = tile // across * BLOCK_M
        n0 = tile % across * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(0, K, BLOCK_K):
            w = load_tile(weight, k, n0, BLOCK_K, BLOCK_N) if TRANSPOSED else load_tile(weight, n0, k, BLOCK_N, BLOCK_K, True)
            acc = dot(load_tile(rows, m0, k, BLOCK_M, BLOCK_K), w, acc, PRECISION)
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        if units is not None:
            acc *= tl.load(units + m, mask=m < total, other=0.0)[:, None]
        inside = (m < total)[:, None] & (n < N)[None, :]
        tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def shift_kernel(
    weight,  # (N, D)
    bias,  # (N,) or None
    norm_bias,  # (D,)
    shift,  # (N,) out: W·β + b
    N,
    stride_wn,
    stride_wd,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), shift.dtype.element_ty)
    for d0 in tl.range(0, D, BLOCK_K, num_stages=3):
        d = d0 + tl.arange(0, BLOCK_K)
        places = n[:, None].to(tl.int64) * stride_wn + d[None, :] * stride_wd
        w = tl.load(weight + places, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(total.dtype)
        total += w * tl.load(norm_bias + d, mask=d < D, other=0.0).to(total.dtype)[None, :]
    acc = tl.sum(total, 1)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(acc.dtype)
    tl.store(shift + n, acc, mask=n < N)


class ProjectedRows(NamedTuple):
    """Which rows of the tables are projected: P positions, then the batch's distinct tokens."""

    P: int
    positions: Tensor | None  # (P,) rows of the position table; None: 0 … P−1
    gathered: bool  # position i of the projected ones is that of position_ids[i]
    tokens: Tensor  # (U,) rows of the token table, of which the first in_use[0] count
    in_use: Tensor  # (1,) int32


def find(
    ids: Tensor, V: int, position_ids: Tensor | None = None, L: int = 0, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct ids of a batch: rows (min(M, V),), ascending, count (1,) of those in use, and slots (V,), the place of each
    among them. A token whose id or position has no row is left out. rows: memory for them, of which the rest stays as it is."""
    M = ids.numel()
    ids, position_ids = tuning.dense(ids, position_ids)
    seen = ids.new_zeros(V, dtype=torch.int8)
    slots, count = (ids.new_empty(size, dtype=torch.int32) for size in (V, 1))
    rows = ids.new_empty(min(M, V), dtype=torch.int32) if rows is None else rows
    period = 1 if position_ids is None else position_ids.numel()
    with on_device(ids):
        launch(mark_kernel, (tuning.cdiv(M, 1024),))(ids, position_ids, seen, (M, period, V, L), BLOCK_M=1024, num_warps=4)
        launch(number_kernel, (tuning.cdiv(V, 2048),))(seen, slots, rows, count, V, BLOCK_V=2048, num_warps=8)
    return rows, count, slots


def projected_rows(terms: Terms, tokens: Tensor, count: Tensor) -> ProjectedRows:
    """All positions where the table has no more rows than there are tokens; else those of position_ids, with repetitions."""
    if terms.position is None:
        return ProjectedRows(0, None, False, tokens, count)
    if terms.position_ids is None:
        return ProjectedRows(terms.length, None, False, tokens, count)
    if places(terms) <= terms.ids.numel():
        return ProjectedRows(places(terms), None, False, tokens, count)
    return ProjectedRows(terms.position_ids.numel(), terms.position_ids.reshape(-1), True, tokens, count)


def prepare(terms: Terms, norm: Norm, which: ProjectedRows) -> tuple[Tensor, Tensor | None]:
    """used (P + U, D), rows at multiples of 16 bytes, and in fp16 units (P + U,): what each row was divided by."""
    token, (V, D) = terms.token, terms.token.shape
    R = which.P + which.tokens.numel()
    used = tuning.padded(token, R, D)
    units = token.new_empty(R, dtype=torch.float32) if token.dtype == torch.float16 else None
    block_m, block_d, warps = tuning.rows(D, token.dtype)
    launch(prepare_kernel, (tuning.cdiv(R, block_m),))(
        which.tokens, which.positions, which.in_use, token, terms.position, norm.weight, used, units,
        (which.P, V, places(terms)), used.stride(0), D, CENTRE=norm.kind == "layer", HELD=block_d >= D, BLOCK_M=block_m,
        BLOCK_D=block_d, num_warps=warps, **tuning.registers(tuning.device_of(token)),
    )  # fmt: skip
    return used, units


def project(used: Tensor, weight: Tensor, units: Tensor | None, which: ProjectedRows, dtype: torch.dtype) -> Tensor:
    """used (P + U, K) · weightᵀ, weight (N, K) of any strides -> (P + U, N) of dtype; rows not in use are not written."""
    (R, K), N = used.shape, weight.shape[0]
    device = tuning.device_of(weight)
    tiles = tuning.project(N, K, weight.dtype, device)
    operand, transposed = tuning.weight_operand(weight, tiles, device)
    out = used.new_empty(R, N, dtype=dtype)
    programs = min(device.multiprocessors, tuning.cdiv(R, tiles.BLOCK_M) * tuning.cdiv(N, tiles.BLOCK_N))
    launch(project_kernel, (programs,))(
        tuning.operand(used, (tiles.BLOCK_M, tiles.BLOCK_K), device), operand, units, which.in_use, out,
        which.P, N, K, TRANSPOSED=transposed, PRECISION=tuning.precision(weight.dtype, device), **tiles._asdict(),
        **tuning.registers(device),
    )  # fmt: skip
    return out


def shift(projection: Projection, norm: Norm) -> Tensor | None:
    """W·β + b (N,), or None where there is neither."""
    (bias,) = tuning.dense(projection.bias)
    if norm.bias is None:
        return bias
    weight, (N, D) = projection.weight, projection.weight.shape
    total = weight.new_empty(N, dtype=wide_dtype(weight.dtype))
    tiles = tuning.fold(weight)
    launch(shift_kernel, (tuning.cdiv(N, tiles["BLOCK_N"]),))(weight, bias, norm.bias, total, N, *weight.stride(), D, **tiles)
    return total


def forward(
    call: Call,
    rows: Tensor | None = None,
    index: Tensor | None = None,
    used: Tensor | None = None,
    report: tuple | None = None,
) -> tuple[Tensor, ...]:
    """hidden, query, key, value, mean and rstd as embed_qkv has them, projected (P + U, N), rows, index and count (1,).

    rows (U,), index (M,) or like ids: the batch's distinct ids and the place of each token's among them, where they are known;
    else they are found here, int32. used (1,): how many of rows count, all by default. Of call.epilogue only the rotary turn is
    applied. report: of tiles.report_absent.
    """
    call = call._replace(terms=contiguous(call.terms), norm=contiguous(call.norm))
    terms, norm, projection = call[:3]
    assert projection is not None
    ids, token, M = terms.ids, terms.token, terms.ids.numel()
    if M == 0:
        rows, index, count = (ids.new_zeros(size, dtype=torch.int32) for size in (0, 0, 1))
        projected = token.new_empty(0, projection.weight.shape[0])
        return *expand(call, projected, None, None, None, 0, False), projected, rows, index, count
    with on_device(token):
        slots = None
        if rows is None:
            rows, count, slots = find(ids, token.shape[0], terms.position_ids, places(terms))
            index = ids.new_empty(M, dtype=torch.int32)
        else:
            rows, index = tuning.dense(rows, index.reshape(-1))
            count = ids.new_full((1,), rows.numel(), dtype=torch.int32) if used is None else used
        which = projected_rows(terms, rows, count)
        used, units = prepare(terms, norm, which)
        # Small projections would lose digits in fp16, so they are kept in fp32.
        dtype = torch.float32 if token.dtype == torch.float16 else token.dtype
        projected = project(used, projection.weight, units, which, dtype)
        offset = shift(projection, norm)
        outputs = expand(call, projected, slots, index, offset, which.P, which.gathered, report=report)
    return *outputs, projected, rows, index, count
