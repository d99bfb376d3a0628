"""Gradients of the front end, without atomics or host synchronisation: every sum has a fixed order, so results are repeatable.

    grad_normed = grad_qkv · weight                  grad_weight = grad_qkvᵀ · normed          torch's matrix products
    grad_sum    = norm's backward (grad_normed) + grad_hidden                     (M, D), hidden is gathered again, not saved
    grad_token[v] = Σ grad_sum[m] over the tokens m with ids[m] = v               likewise for the position table

Table gradients sort the ids (stable: the order of each sum is fixed) and sum runs of equal ids. Runs are split at multiples of
CHUNK: a run inside one chunk is summed and written at once; the partial sums of a longer run go to a buffer, which a second
launch adds up in order. So the time does not depend on how often an id repeats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import TABLES, Call, Terms, wide_dtype

from . import tuning
from .arguments import dropout, period, places, terms_arguments
from .embed import drop_again, embed
from .launch import launch, on_device
from .rotary import turn_back
from .tiles import computes, drop, find_rows, lanes, load_hidden, load_vector

CHUNK = 64


@triton.jit
def normed_columns(token, terms, mean, scale, rows, known, d, M, D):
    """Columns d of (hidden − mean)·scale, 0 past column D and for tokens without a row. rows, known: of find_rows."""
    m = rows[0]
    h = load_hidden(token, terms, rows, d, D).to(scale.dtype)
    if mean is not None:
        h -= tl.load(mean + m, mask=m < M, other=0.0)[:, None]
    return tl.where((known & (m < M))[:, None] & (d < D)[None, :], h * scale[:, None], 0.0)


@triton.jit
def store_pulls(
    ids,
    terms,
    token,
    norm_weight,
    mean,
    rstd,
    grad_normed,
    pulls,
    first,
    last,
    shape,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For tokens first … last: means over the columns of γ·grad_normed times the normed row, and of γ·grad_normed."""
    M, T, V, L = shape
    ACC: tl.constexpr = rstd.dtype.element_ty
    LANE: tl.constexpr = 128 // token.dtype.element_ty.primitive_bitwidth
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        rows, known = find_rows(ids, terms, m, M, T, V, L)
        scale = tl.load(rstd + m, mask=m < M, other=0.0)
        pull = tl.zeros((BLOCK_M, BLOCK_D // LANE), ACC)
        drift = tl.zeros((BLOCK_M, BLOCK_D // LANE), ACC)
        for d0 in tl.range(0, D, BLOCK_D, num_stages=2 if computes(terms[1], terms[4]) else 3):
            d = d0 + tl.arange(0, BLOCK_D)
            x = normed_columns(token, terms, mean, scale, rows, known, d, M, D)
            inside = (m < M)[:, None] & (d < D)[None, :]
            dy = tl.load(grad_normed + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(ACC)
            dy *= load_vector(norm_weight, d, D, 1.0, ACC)[None, :]
            pull += tl.sum(lanes(dy * x, token), 2)
            drift += tl.sum(lanes(dy, token), 2)
        tl.store(pulls + m, tl.sum(pull, 1) / D, mask=m < M)
        tl.store(pulls + M + m, tl.sum(drift, 1) / D, mask=m < M)


@triton.jit
def norm_backward_kernel(
    ids,  # (M,)
    terms,  # of hidden, as in tiles.find_rows
    token,  # (V, D)
    norm_weight,  # (D,) or None
    norm_bias,  # (D,) or None
    mean,  # (M,), or None: RMSNorm
    rstd,  # (M,)
    grad_normed,  # (M, D), or None: only normed is computed
    grad_hidden,  # (M, D) or None
    grad_sum,  # (M, D) out, or None
    normed,  # (M, D) out, or None
    partials,  # (2, programs, D) out, or None: each program's share of the gradients of norm_weight and norm_bias
    pulls,  # (2, M) for store_pulls, or None: the sums of a row are not wanted, or it is HELD
    shape,  # M, T, V, L
    D,
    HELD: tl.constexpr,  # whether BLOCK_D columns hold a whole row
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L = shape
    ACC: tl.constexpr = rstd.dtype.element_ty
    AHEAD: tl.constexpr = 1 if computes(terms[1], terms[4]) else 2
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(0)) * BLOCK_M
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, M)
    if pulls is not None:
        store_pulls(ids, terms, token, norm_weight, mean, rstd, grad_normed, pulls, first, last, shape, D, BLOCK_M, BLOCK_D)
        tl.debug_barrier()  # the program's threads read below what others of them wrote
    for d0 in range(0, BLOCK_D if HELD else D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        gamma = load_vector(norm_weight, d, D, 1.0, ACC)
        beta = load_vector(norm_bias, d, D, 0.0, ACC)
        grad_gamma = tl.zeros((BLOCK_D,), ACC)
        grad_beta = tl.zeros((BLOCK_D,), ACC)
        for m0 in tl.range(first, last, BLOCK_M, num_stages=AHEAD):
            m = m0 + tl.arange(0, BLOCK_M)
            inside = (m < M)[:, None] & (d < D)[None, :]
            places = m[:, None] * D + d[None, :]
            rows, known = find_rows(ids, terms, m, M, T, V, L)
            scale = tl.load(rstd + m, mask=m < M, other=0.0)
            x = normed_columns(token, terms, mean, scale, rows, known, d, M, D)
            if normed is not None:
                tl.store(normed + places, (x * gamma + beta).to(normed.dtype.element_ty), mask=inside)
            if grad_normed is not None:
                dy = tl.load(grad_normed + places, mask=inside, other=0.0).to(ACC)
                grad_gamma += tl.sum(dy * x, 0)
                grad_beta += tl.sum(dy, 0)
                if grad_sum is not None:
                    dy *= gamma
                    if pulls is not None:
                        pull = tl.load(pulls + m, mask=m < M, other=0.0)
                        drift = tl.load(pulls + M + m, mask=m < M, other=0.0)
                    elif mean is not None:
                        pull, drift = tl.split(tl.sum(tl.join(dy * x, dy), 1) / D)  # both sums in one exchange among threads
                    else:
                        pull = tl.sum(dy * x, 1) / D
                    dx = dy - x * pull[:, None]
                    if mean is not None:
                        dx -= drift[:, None]
                    dx *= scale[:, None]
                    if grad_hidden is not None:
                        dx += tl.load(grad_hidden + places, mask=inside, other=0.0).to(ACC)
                    if terms[4] is not None:
                        dx = drop(dx, terms[4], m, d, ACC)
                    tl.store(grad_sum + places, dx.to(grad_sum.dtype.element_ty), mask=inside)
        if partials is not None:
            tl.store(partials + tl.program_id(0) * D + d, grad_gamma, mask=d < D)
            tl.store(partials + (tl.num_programs(0) + tl.program_id(0)) * D + d, grad_beta, mask=d < D)


@triton.jit
def segment_kernel(
    rows,  # (M, D)
    ids,  # (M,) sorted
    order,  # (M,) index of each sorted id before sorting
    weights,  # (M,) factors of the rows, or None
    grad,  # (V, D) out, rows stride_gv apart
    pieces,  # (2, chunks, D) out: each chunk's sum of the run that began before it, and of the run that goes on after it
    M,
    V,
    padding_idx,
    stride_gv,
    D,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = start // CHUNK
    end = tl.minimum((chunk + 1) * CHUNK, M)
    lane = start + tl.arange(0, CHUNK)
    here = tl.load(ids + lane, mask=lane < end, other=-1)  # before it is known whether a run begins: one wait for all ids
    row = tl.load(ids + start).to(tl.int64)
    opens = (start == 0) | (tl.load(ids + tl.maximum(start - 1, 0)) != row)
    if (opens | (start % CHUNK == 0)) & (row >= 0) & (row < V) & (row != padding_idx):
        count = tl.sum((here == row).to(tl.int32), 0)
        total = tl.zeros((BLOCK_M, BLOCK_D), pieces.dtype.element_ty)
        for i in tl.range(0, count, BLOCK_M, num_stages=2):
            step = i + tl.arange(0, BLOCK_M)
            source = tl.load(order + start + step, mask=step < count, other=0)
            inside = (step < count)[:, None] & (d < D)[None, :]
            x = tl.load(rows + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(total.dtype)
            if weights is not None:
                x *= tl.load(weights + source, mask=step < count, other=0.0)[:, None]
            total += x
        acc = tl.sum(total, 0)
        leaves = (start + count == end) & (tl.load(ids + tl.minimum(end, M - 1)) == row) & (end < M)
        if opens & (leaves == 0):
            tl.store(grad + row * stride_gv + d, acc.to(grad.dtype.element_ty), mask=d < D)
        else:
            side = tl.where(opens, tl.cdiv(M, CHUNK), 0).to(tl.int64)
            tl.store(pieces + (side + chunk) * D + d, acc, mask=d < D)


@triton.jit
def join_kernel(
    ids,  # (M,) sorted
    grad,  # (V, D) out
    pieces,  # (2, chunks, D)
    M,
    V,
    padding_idx,
    stride_gv,
    D,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(M, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    next_chunk = (chunk + 1) * CHUNK
    row = tl.load(ids + tl.minimum(next_chunk, M) - 1).to(tl.int64)
    leaves = (next_chunk < M) & (tl.load(ids + tl.minimum(next_chunk, M - 1)) == row)
    entered = (chunk > 0) & (tl.load(ids + tl.maximum(chunk * CHUNK - 1, 0)) == row)
    if leaves & (entered == 0) & (row >= 0) & (row < V) & (row != padding_idx):
        acc = tl.load(pieces + (chunks + chunk) * D + d, mask=d < D, other=0.0)
        more = 1
        while more > 0:
            later = chunk + 1 + tl.arange(0, BLOCK_M)
            same = tl.load(ids + later * CHUNK, mask=later < chunks, other=-1) == row
            inside = same[:, None] & (d < D)[None, :]
            acc += tl.sum(tl.load(pieces + later[:, None] * D + d[None, :], mask=inside, other=0.0), 0)
            more = tl.min(same.to(tl.int32), 0)
            chunk += BLOCK_M
        tl.store(grad + row * stride_gv + d, acc.to(grad.dtype.element_ty), mask=d < D)


def table_grad(
    rows: Tensor,
    ids: Tensor,
    size: int,
    padding_idx: int = -1,
    dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient (size, D) of a table: rows (M, D), times weights (M,), summed by ids (M,); ids without a row are left out.

    order: torch.sort(ids, stable=True), where it is known. out: (size, D), of which only rows that an id names are written.
    """
    M, D = rows.shape
    rows = rows.contiguous()  # sum().backward() passes an expanded gradient of stride 0
    grad = rows.new_zeros(size, D, dtype=dtype or rows.dtype) if out is None else out
    if M == 0 or D == 0:
        return grad
    ids, order = torch.sort(ids, stable=True) if order is None else order
    chunks = tuning.cdiv(M, CHUNK)
    pieces = rows.new_empty(2, chunks, D, dtype=wide_dtype(rows.dtype))
    block_m, block_d = tuning.segment(D)
    tiles = {"D": D, "CHUNK": CHUNK, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": 4}
    with on_device(rows):
        launch(segment_kernel, (M, tuning.cdiv(D, block_d)))(
            rows, ids, order, weights, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles
        )
        launch(join_kernel, (chunks, tuning.cdiv(D, block_d)))(ids, grad, pieces, M, size, padding_idx, grad.stride(0), **tiles)
    return grad


def position_grad(rows: Tensor, T: int, position_ids: Tensor | None, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient (size, D) of a position table: rows (M, D) of sequences of T tokens, summed by position."""
    dtype = dtype or rows.dtype
    if position_ids is not None and position_ids.numel() == rows.shape[0]:
        return table_grad(rows, position_ids.reshape(-1), size, dtype=dtype)
    wide = wide_dtype(rows.dtype)
    per_place = rows.view(-1, T, rows.shape[1]).sum(0, dtype=wide) if rows.numel() else rows.new_zeros(T, rows.shape[1])
    if position_ids is not None:
        return table_grad(per_place, position_ids.reshape(-1), size, dtype=dtype)
    grad = rows.new_zeros(size, rows.shape[1], dtype=dtype)
    grad[:T] = per_place[:size]
    return grad


def segment_grad(rows: Tensor, T: int, segment_ids: Tensor | None, size: int) -> Tensor:
    """The gradient (size, D) of a segment table; without segment_ids every token takes row 0."""
    if segment_ids is not None:
        return position_grad(rows, T, segment_ids, size)
    grad = rows.new_zeros(size, rows.shape[1])
    grad[0] = rows.sum(0, dtype=wide_dtype(rows.dtype))
    return grad


def norm_backward(
    call: Call,
    mean: Tensor,
    rstd: Tensor,
    grad_normed: Tensor | None,
    grad_hidden: Tensor | None,
    wants_sum: bool,
    normed_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """grad_sum (M, D), which is before dropout, normed (M, D), and the gradients (D,) of the norm's weight and bias.

    None: not wanted (grad_sum without wants_sum, normed without normed_dtype), or the norm has none. grad_normed, grad_hidden:
    (M, D); without grad_normed only normed is computed.
    """
    terms, norm = call.terms, call.norm
    M, (V, D) = terms.ids.numel(), terms.token.shape
    affine_like = norm.bias if norm.weight is None else norm.weight
    wants_affine = grad_normed is not None and affine_like is not None
    ids, token, norm_weight, norm_bias = tuning.dense(terms.ids, terms.token, norm.weight, norm.bias)
    block_m, block_d, warps = tuning.rows(D, token.dtype)
    held = block_d >= D
    programs = min(tuning.cdiv(M, block_m), 2 * tuning.device_of(token).multiprocessors)
    grad_sum = token.new_empty(M, D) if wants_sum else None
    normed = token.new_empty(M, D, dtype=normed_dtype) if normed_dtype else None
    partials = token.new_empty(2, programs, D, dtype=rstd.dtype) if wants_affine else None
    pulls = token.new_empty(2, M, dtype=rstd.dtype) if not held and wants_sum and grad_normed is not None else None
    with on_device(token):
        launch(norm_backward_kernel, (programs,))(
            ids, terms_arguments(terms), token, norm_weight, norm_bias, mean if mean.numel() else None, rstd, grad_normed,
            grad_hidden, grad_sum, normed, partials, pulls, (M, period(terms), V, places(terms)), D=D, HELD=held,
            BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps, **tuning.registers(tuning.device_of(token)),
        )  # fmt: skip
    affine = (None, None) if partials is None else (share.sum(0).to(affine_like.dtype) for share in partials)
    return grad_sum, normed, *affine


def tables_grad(grad_sum: Tensor, terms: Terms, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Gradients of the tables by that of hidden before its dropout (M, D). sizes: rows by name; 0 or missing: not wanted."""
    T, found = terms.length, {}
    if size := sizes.get("token"):
        weights = None
        if terms.scale is not None:
            weights = grad_sum.new_full(grad_sum.shape[:1], terms.scale, dtype=wide_dtype(grad_sum.dtype))
        found["token"] = table_grad(grad_sum, terms.ids.reshape(-1), size, terms.padding_idx, weights=weights)
    if size := sizes.get("position"):
        found["position"] = position_grad(grad_sum, T, terms.position_ids, size)
    if size := sizes.get("segment"):
        found["segment"] = segment_grad(grad_sum, T, terms.segment_ids, size)
    return found


def embed_backward(grad: Tensor, terms: Terms, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Gradients of the tables by that of hidden (..., T, D), of any strides; sizes: as of tables_grad.

    The tables themselves are not read: terms may come without them.
    """
    grad = grad.reshape(terms.ids.numel(), grad.shape[-1])
    return tables_grad(grad if dropout(terms) is None else drop_again(grad, terms), terms, sizes)


def projected_grads(call: Call, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Undo the epilogue: gradients of hidden (M, D), of query, key and value as projected (M, n), and of the second query.

    grads: of hidden, query, key and value, in the shapes in which the forward returned them, of any strides, or None.
    """
    ids, epilogue = call.terms.ids, call.epilogue
    hidden, *heads = grads
    if epilogue.heads_first and ids.dim():
        heads = [None if grad is None else grad.transpose(-3, -2) for grad in heads]
    query, second = heads[0], None
    if query is not None and query.dim() == ids.dim() + 3:
        second = _matrix(query[1], ids)
        heads[0] = query.sum(0)
    if epilogue.cos is not None:
        heads[:2] = [None if grad is None else turn_back(grad, epilogue) for grad in heads[:2]]
    hidden, *heads = (None if grad is None else _matrix(grad, ids) for grad in (hidden, *heads))
    return hidden, heads, second


def _matrix(grad, ids):
    """(..., T, n) or (..., T, h, d_h) -> (M, n)."""
    return grad.reshape(ids.numel(), grad.shape[ids.dim() :].numel())


def concatenated(grads: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """Gradients of query, key and value (M, n), of any strides or None, as one matrix (M, N); None where all are None."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return None
    zeros = (like.new_zeros(like.shape[0], n) if grad is None else grad for grad, n in zip(grads, widths, strict=True))
    return torch.cat(tuple(zeros), 1)


def embed_qkv_backward(
    call: Call, grads: tuple[Tensor | None, ...], mean: Tensor, rstd: Tensor, needs: set[str]
) -> dict[str, Tensor]:
    """Gradients, by name, of those of pyembed.call.LEARNED that are in needs; one that nothing reaches is missing.

    grads: of hidden, query, key and value, in the shapes in which embed_qkv returned them, of any strides, or None. mean, rstd:
    as embed_qkv returned them. The bias and query_offset themselves are not read: their fields may be None.
    """
    terms, norm, projection = call[:3]
    assert projection is not None
    grad_hidden, grads_heads, grad_second = projected_grads(call, grads)
    wants_tables = not needs.isdisjoint(TABLES)
    weight, found = projection.weight, {}
    grad_sum = None if grad_hidden is None else grad_hidden.contiguous()
    grad_qkv = concatenated(grads_heads, [heads * call.head_dim for heads in projection.groups])
    drops = dropout(terms) is not None and wants_tables
    if grad_second is not None and "query_offset" in needs:
        found["query_offset"] = grad_second.sum(0)
    if grad_qkv is not None and terms.ids.numel():
        normed, normed_dtype = None, weight.dtype if "weight" in needs else None
        if norm.kind != "none":
            wants_grad = wants_tables or not needs.isdisjoint(("norm_weight", "norm_bias"))
            if wants_grad or normed_dtype:
                grad_normed = grad_qkv @ weight if wants_grad else None
                grad_sum, normed, found["norm_weight"], found["norm_bias"] = norm_backward(
                    call, mean, rstd, grad_normed, grad_sum, wants_tables, normed_dtype
                )
                drops = False
        else:
            if normed_dtype:
                normed = embed(terms, absent=0.0).view(-1, terms.token.shape[1]).to(normed_dtype)
            if wants_tables and grad_sum is not None and grad_sum.dtype == weight.dtype:
                grad_sum = torch.addmm(grad_sum, grad_qkv, weight)
            elif wants_tables:
                reached = (grad_qkv @ weight).to(terms.token.dtype)
                grad_sum = reached if grad_sum is None else grad_sum + reached
        if normed_dtype:
            found["weight"] = grad_qkv.t() @ normed
        if "bias" in needs:
            found["bias"] = grad_qkv.sum(0)
    if grad_sum is not None:
        if drops:
            grad_sum = drop_again(grad_sum, terms)
        sizes = {"token": terms.token.shape[0], "position": places(terms)}
        sizes["segment"] = 0 if terms.segment is None else terms.segment.shape[0]
        found |= tables_grad(grad_sum, terms, {name: size for name, size in sizes.items() if name in needs})
    return {name: grad for name, grad in found.items() if name in needs and grad is not None}
