"""Gradients of the `distinct` plan: both matrix products run over distinct rows only, and every sum has a fixed order.

    total     = Σ grad_qkv[m]                                   gradient of W·β + b                              (N,)
    G[P + u]  = Σ rstd[m]·grad_qkv[m] over the tokens of id u   G[p] likewise over those at position p           (P + U, N)
    dot[m]    = grad_qkv[m] · (projected[P + slot] + projected[position_ids])  the gradient of rstd              (M,)
    grad_sum  = grad_hidden − rstd³/D · dot · (hidden − mean)                                                      (M, D)
    grad_weight = Gᵀ·used + total ⊗ β       grad_used = G·weight              used as in distinct.py
    gradient of a table's row = Σ grad_sum over its tokens + centre(γ ⊙ its row of grad_used)

One pass over grad_qkv computes total, the positions' rows of G and dot; a second one, by sorted ids, the tokens' rows of G.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Call, Norm, Terms, wide_dtype

from . import tuning
from .arguments import contiguous, period, places, terms_arguments
from .distinct import ProjectedRows, find_used, load_used, prepare, project, projected_rows
from .embed_grad import embed_qkv_backward, projected_grads
from .epilogue import find_tile
from .launch import launch, on_device
from .table_grad import position_grad, table_grad
from .tiles import find_rows, load_hidden, load_places, load_rows, load_vector
from .weight_grad import weight_grad


@triton.jit
def qkv_kernel(
    grads,  # of query, key and value, (M, n) each
    projected,  # (P + U, N)
    index,  # (M,) slot of each token: its row of projected is P + slot
    position_ids,  # (T,) or (M,), or None
    rstd,  # (M,), or None: no norm
    dots,  # (column blocks, M) out, or None: each block's share of dot
    sums,  # (step, N) out, rows stride_sn apart, or None: row t is Σ rstd·grad over the tokens t, t + step, t + 2·step, …
    totals,  # (row blocks, N) out: each row block's share of total
    shape,  # M, step, T, L, P, U, widths of query and of key
    stride_sn,
    PLACED: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    M, step, T, L, P, U, query, key = shape
    N = query + 2 * key
    ACC: tl.constexpr = totals.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    grad, n0, width, first = find_tile(grads, tl.program_id(1), query, key, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_N)
    columns = (n < width)[None, :]
    projected += first
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for m0 in tl.range(0, M, step, num_stages=3):
        m = m0 + t
        here = (t < step) & (m < M)
        slot, known = load_rows(index, m, here, U)  # −1: the id is outside its table, its gradient is dropped
        g = tl.load(grad + m[:, None] * width + n[None, :], mask=(here & known)[:, None] & columns, other=0.0).to(ACC)
        total += g
        if dots is not None:
            x = tl.load(projected + (P + slot)[:, None] * N + n[None, :], mask=columns, other=0.0).to(ACC)
            if PLACED:
                place = m % T
                if position_ids is not None and not GATHERED:
                    place, _ = load_places(position_ids, m, here, T, L)
                x += tl.load(projected + place.to(tl.int64)[:, None] * N + n[None, :], mask=columns, other=0.0).to(ACC)
            tl.store(dots + tl.program_id(1).to(tl.int64) * M + m, tl.sum(g * x, 1), mask=here)
        if sums is not None:
            if rstd is not None:
                g *= tl.load(rstd + m, mask=here, other=0.0)[:, None]
            acc += g
    tl.store(totals + tl.program_id(0).to(tl.int64) * N + first + n, tl.sum(total, 0), mask=n < width)
    if sums is not None:
        sums += first
        tl.store(sums + t[:, None] * stride_sn + n[None, :], acc.to(sums.dtype.element_ty), mask=(t < step)[:, None] & columns)


@triton.jit
def sum_kernel(
    ids,  # (M,)
    terms,  # of hidden, as in tiles.find_rows
    token,  # (V, D)
    mean,  # (M,), or None: RMSNorm
    rstd,  # (M,)
    dots,  # (column blocks, M)
    grad_hidden,  # (M, D) or None
    grad_sum,  # (M, D) out
    shape,  # M, T, V, L, column blocks
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L, blocks = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows, _ = find_rows(ids, terms, m, M, T, V, L)
    h = load_hidden(token, terms, rows, d, D).to(rstd.dtype.element_ty)
    if mean is not None:
        h -= tl.load(mean + m, mask=m < M, other=0.0)[:, None]
    pull = tl.zeros((BLOCK_M,), rstd.dtype.element_ty)
    for b0 in range(0, blocks, 16):
        b = b0 + tl.arange(0, 16).to(tl.int64)
        shares = tl.load(dots + b[:, None] * M + m[None, :], mask=(b < blocks)[:, None] & (m < M)[None, :], other=0.0)
        pull += tl.sum(shares, 0)
    scale = tl.load(rstd + m, mask=m < M, other=0.0)
    g = h * (-scale * scale * scale / D * pull)[:, None]
    inside = (m < M)[:, None] & (d < D)[None, :]
    if grad_hidden is not None:
        g += tl.load(grad_hidden + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(g.dtype)
    tl.store(grad_sum + m[:, None] * D + d[None, :], g.to(grad_sum.dtype.element_ty), mask=inside)


@triton.jit
def table_kernel(
    rows,  # (U,) rows of the token table
    place_rows,  # (P,) rows of the position table, or None
    count,  # (1,) U
    token,  # (V, D)
    position,  # (L, D) or None
    norm_weight,  # (D,) or None
    grad_used,  # (P + U, D)
    by_token,  # (U, D) Σ grad_sum over the tokens of each distinct id, or None
    grad_token,  # (V, D) out, or None
    grad_place,  # (P, D) out, or None
    partials,  # (programs, D) out, or None: each program's share of the gradient of norm_weight
    means,  # (2, P + U) for store_means, or None: not centred, or rows are HELD
    shape,  # P, V, L, padding_idx
    D,
    ADDS: tl.constexpr,  # whether rows of grad_token are added to
    CENTRE: tl.constexpr,
    HELD: tl.constexpr,  # whether BLOCK_D columns hold a whole row
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    P, V, L, padding_idx = shape
    ACC: tl.constexpr = grad_used.dtype.element_ty
    total = P + tl.load(count)
    share = tl.cdiv(tl.cdiv(total, BLOCK_M), tl.num_programs(0)) * BLOCK_M
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, total)
    tables = (rows, place_rows, token, position)
    if means is not None:
        store_means(tables, norm_weight, grad_used, means, first, last, total, P, V, L, D, BLOCK_M, BLOCK_D)
        tl.debug_barrier()  # the program's threads read below what others of them wrote
    for d0 in range(0, BLOCK_D if HELD else D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        gamma = load_vector(norm_weight, d, D, 1.0, ACC)[None, :]
        grad_gamma = tl.zeros((BLOCK_D,), ACC)
        for r0 in tl.range(first, last, BLOCK_M, num_stages=2):
            r = r0 + tl.arange(0, BLOCK_M)
            g = tl.load(grad_used + r[:, None] * D + d[None, :], mask=(r < total)[:, None] & (d < D)[None, :], other=0.0)
            x = tl.zeros_like(g)
            if partials is not None:
                x = load_used(token, position, find_used(rows, place_rows, r, total, P, V, L), d, D).to(ACC)
            if CENTRE:
                if means is not None:
                    centre = tl.load(means + r, mask=r < total, other=0.0)
                    drift = tl.load(means + total + r, mask=r < total, other=0.0)
                else:
                    centre, drift = tl.split(tl.sum(tl.join(x, g * gamma), 1) / D)
                grad_gamma += tl.sum(g * (x - centre[:, None]), 0)
                g = g * gamma - drift[:, None]
            else:
                grad_gamma += tl.sum(g * x, 0)
                g *= gamma
            store_rows(g, rows, by_token, grad_token, grad_place, r, d, total, P, V, padding_idx, D, ADDS)
        if partials is not None:
            tl.store(partials + tl.program_id(0) * D + d, grad_gamma, mask=d < D)


@triton.jit
def store_rows(g, rows, by_token, grad_token, grad_place, r, d, total, P, V, padding_idx, D, ADDS: tl.constexpr):
    """Stores columns d of the gradients of rows r of (positions, then distinct tokens), to those of tokens adding by_token."""
    inside = (r < total)[:, None] & (d < D)[None, :]
    if grad_place is not None:
        tl.store(grad_place + r[:, None] * D + d[None, :], g, mask=inside & (r < P)[:, None])
    if grad_token is not None:
        mine = inside & (r >= P)[:, None]
        if by_token is not None:
            g += tl.load(by_token + (r - P)[:, None] * D + d[None, :], mask=mine, other=0.0)
        row, known = load_rows(rows, r - P, (r >= P) & (r < total), V)
        mine &= (known & (row != padding_idx))[:, None]
        if ADDS:
            g += tl.load(grad_token + row[:, None] * D + d[None, :], mask=mine, other=0.0).to(g.dtype)
        tl.store(grad_token + row[:, None] * D + d[None, :], g.to(grad_token.dtype.element_ty), mask=mine)


@triton.jit
def store_means(
    tables,
    norm_weight,
    grad_used,
    means,
    first,
    last,
    total,
    P,
    V,
    L,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of rows first … last of (positions, then distinct tokens): means over the columns of the row, and of γ·grad_used."""
    rows, place_rows, token, position = tables
    ACC: tl.constexpr = grad_used.dtype.element_ty
    for r0 in range(first, last, BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        found = find_used(rows, place_rows, r, total, P, V, L)
        centre = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        drift = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for d0 in tl.range(0, D, BLOCK_D, num_stages=3):
            d = d0 + tl.arange(0, BLOCK_D)
            g = tl.load(grad_used + r[:, None] * D + d[None, :], mask=(r < total)[:, None] & (d < D)[None, :], other=0.0)
            centre += load_used(token, position, found, d, D).to(ACC)
            drift += g * load_vector(norm_weight, d, D, 1.0, ACC)[None, :]
        tl.store(means + r, tl.sum(centre, 1) / D, mask=r < total)
        tl.store(means + total + r, tl.sum(drift, 1) / D, mask=r < total)


def backward(
    call: Call,
    grads: tuple[Tensor | None, ...],
    mean: Tensor,
    rstd: Tensor,
    projected: Tensor,
    rows: Tensor,
    index: Tensor,
    count: Tensor,
    needs: set[str],
    into: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients by name, as embed_qkv_backward returns them; mean … count: as distinct.forward returned them. into: (V, D), to
    which that of the token table is added, and is returned.

    fp16 takes the backward of the one-pass kernel: sums of rstd·grad would leave its range.
    """
    if call.terms.ids.numel() == 0 or call.terms.token.dtype == torch.float16 or all(grad is None for grad in grads[1:]):
        return embed_qkv_backward(call, grads, mean, rstd, needs, into)
    grad_hidden, heads, _ = projected_grads(call, grads)
    call = call._replace(terms=contiguous(call.terms), norm=contiguous(call.norm))
    (terms, norm, projection), found = call[:3], {}
    assert projection is not None
    token, weight = terms.token, projection.weight
    M, D, wide = terms.ids.numel(), token.shape[1], wide_dtype(token.dtype)
    widths = [heads * call.head_dim for heads in projection.groups]
    heads = [token.new_zeros(M, n) if grad is None else grad for grad, n in zip(heads, widths, strict=True)]
    grad_hidden, rows, index, *heads = tuning.dense(grad_hidden, rows, index.reshape(-1), *heads)
    which = projected_rows(terms, rows, count)
    means, scales = mean if norm.kind == "layer" else None, rstd if norm.kind != "none" else None
    wants_tables = "token" in needs or "position" in needs
    with on_device(token):
        order = torch.sort(index, stable=True)
        G = tuning.padded(token, which.P + rows.numel(), sum(widths)).zero_()  # given rows may be more than the batch names
        total, dots = _stream(heads, projected, index, terms, scales, wants_tables, G, which)
        start = 0
        for grad, n in zip(heads, widths, strict=True):
            out = G[which.P :, start : start + n]
            table_grad(grad, index, rows.numel(), weights=scales, order=order, out=out)
            start += n
        if "weight" in needs:
            used, _ = prepare(terms, norm, which)
            found["weight"] = weight_grad(G, used, total, norm.bias, weight, which)
        grad_sum = by_token = grad_token = grad_place = None
        if wants_tables:
            grad_sum = grad_hidden if scales is None else _grad_sum(terms, means, scales, dots, grad_hidden)
        if "token" in needs:
            found["token"] = grad_token = torch.zeros_like(token) if into is None else into
            if grad_sum is not None:
                by_token = token.new_zeros(rows.numel(), D, dtype=wide)
                table_grad(grad_sum, index, rows.numel(), order=order, out=by_token)
        if "position" in needs:
            grad_place = token.new_empty(which.P, D, dtype=wide)
        if wants_tables or "norm_weight" in needs:
            grad_used = project(G, weight.t(), None, which, wide)
            wanted = "norm_weight" in needs, into is not None
            grad_norm_weight = _finish(terms, norm, which, grad_used, by_token, grad_token, grad_place, *wanted)
            if "norm_weight" in needs:
                found["norm_weight"] = grad_norm_weight
        if "position" in needs:
            found["position"] = _position_grad(grad_sum, grad_place, terms, which.gathered)
    if "bias" in needs:
        found["bias"] = total.to(token.dtype)
    if "norm_bias" in needs:
        found["norm_bias"] = (weight * total[:, None]).sum(0).to(norm.bias.dtype)
    return found


def _stream(
    grads: list[Tensor],
    projected: Tensor,
    index: Tensor,
    terms: Terms,
    rstd: Tensor | None,
    wants_dots: bool,
    G: Tensor,
    which: ProjectedRows,
) -> tuple[Tensor, Tensor | None]:
    """One pass over the gradients of query, key and value: fills the positions' rows of G.

    Returns total (N,), and dots (column blocks, M) or None.
    """
    M, N, P, T = index.numel(), projected.shape[1], which.P, period(terms)
    position_ids = terms.position_ids
    by_id = position_ids is not None and not which.gathered  # tokens that are summed together may differ in position
    wide = wide_dtype(projected.dtype)
    block_m, block_n = tuning.stream(N, projected.dtype)
    step, sums = min(M, 1024), None
    if P and not by_id:
        step, sums = T, G[:P]
    elif P and T < M:
        step, sums = T, projected.new_empty(T, N, dtype=wide)
    row_blocks, column_blocks = tuning.cdiv(step, block_m), sum(tuning.cdiv(grad.shape[1], block_n) for grad in grads)
    totals = projected.new_empty(row_blocks, N, dtype=wide)
    dots = projected.new_empty(column_blocks, M, dtype=wide) if rstd is not None and wants_dots else None
    shape = (M, step, T, places(terms), P, projected.shape[0] - P, grads[0].shape[1], grads[1].shape[1])
    launch(qkv_kernel, (row_blocks, column_blocks))(
        tuple(grads), projected, index, position_ids, rstd, dots, sums, totals, shape, 0 if sums is None else sums.stride(0),
        PLACED=P > 0, GATHERED=which.gathered, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        **tuning.registers(tuning.device_of(projected)),
    )  # fmt: skip
    if by_id:
        G[:P].zero_()
        if sums is not None:
            table_grad(sums, position_ids.reshape(-1), P, out=G[:P])
        else:
            start, order = 0, torch.sort(position_ids.reshape(-1), stable=True)
            for grad in grads:
                columns = slice(start, start := start + grad.shape[1])
                table_grad(grad, position_ids.reshape(-1), P, weights=rstd, order=order, out=G[:P, columns])
    return totals.sum(0), dots


def _grad_sum(terms: Terms, mean: Tensor | None, rstd: Tensor, dots: Tensor, grad_hidden: Tensor | None) -> Tensor:
    """grad_hidden − rstd³/D · dot · (hidden − mean): (M, D), hidden gathered again."""
    token, M, (V, D) = terms.token, terms.ids.numel(), terms.token.shape
    block_m, block_d = tuning.streaming(D, token.dtype)
    out = token.new_empty(M, D)
    shape = (M, period(terms), V, places(terms), dots.shape[0])
    launch(sum_kernel, (tuning.cdiv(M, block_m), tuning.cdiv(D, block_d)))(
        terms.ids, terms_arguments(terms), token, mean, rstd, dots, grad_hidden, out, shape, D=D, BLOCK_M=block_m,
        BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def _finish(
    terms: Terms,
    norm: Norm,
    which: ProjectedRows,
    grad_used: Tensor,
    by_token: Tensor | None,
    grad_token: Tensor | None,
    grad_place: Tensor | None,
    wants_norm_weight: bool,
    adds: bool,
) -> Tensor | None:
    """Fills, or adds to, grad_token (V, D), and fills grad_place (P, D); returns the gradient (D,) of the norm's weight, where
    it is wanted."""
    token, (V, D), R = terms.token, terms.token.shape, grad_used.shape[0]
    block_m, block_d, warps = tuning.rows(D, token.dtype)
    programs = min(tuning.cdiv(R, block_m), 2 * tuning.device_of(token).multiprocessors)
    partials = grad_used.new_empty(programs, D) if wants_norm_weight else None
    held, centred = block_d >= D, norm.kind == "layer"
    means = grad_used.new_empty(2, R) if centred and not held else None
    launch(table_kernel, (programs,))(
        which.tokens, which.positions, which.in_use, token, terms.position, norm.weight, grad_used, by_token, grad_token,
        grad_place, partials, means, (which.P, V, places(terms), terms.padding_idx), D=D, ADDS=adds, CENTRE=centred, HELD=held,
        BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps, **tuning.registers(tuning.device_of(token)),
    )  # fmt: skip
    return None if partials is None else partials.sum(0).to(norm.weight.dtype)


def _position_grad(grad_sum: Tensor | None, grad_place: Tensor, terms: Terms, gathered: bool) -> Tensor:
    """(L, D): grad_sum by token, and grad_place (P, D) by projected position."""
    L, wide = places(terms), grad_place.dtype
    grad = grad_place.new_zeros(L, grad_place.shape[1])
    if grad_sum is not None:
        grad = position_grad(grad_sum, terms.length, terms.position_ids, L, dtype=wide)
    if gathered:
        grad.add_(table_grad(grad_place, terms.position_ids.reshape(-1), L))
    else:
        grad[: grad_place.shape[0]] += grad_place
    return grad.to(terms.token.dtype)
