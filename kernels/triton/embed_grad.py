"""Gradients of the front end, without atomics or host synchronisation: every sum has a fixed order, so results are repeatable.

grad_normed = grad_qkv · weight                  grad_weight = grad_qkvᵀ · normed          torch's matrix products
grad_sum    = norm's backward (grad_normed) + grad_hidden                     (M, D), hidden is gathered again, not saved
grad_token[v] = Σ grad_sum[m] over the tokens m with ids[m] = v               likewise for the position table
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
from .table_grad import position_grad, segment_grad, table_grad
from .tiles import computes, drop, find_rows, lane, lanes, load_hidden, load_vector


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
    LANE: tl.constexpr = lane(token)
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


def tables_grad(grad_sum: Tensor, terms: Terms, sizes: dict[str, int], into: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the tables by that of hidden before its dropout (M, D). sizes: rows by name; 0 or missing: not wanted.

    into: (V, D), to which that of the token table is added, and is returned.
    """
    T, found = terms.length, {}
    if size := sizes.get("token"):
        weights = None
        if terms.scale is not None:
            weights = grad_sum.new_full(grad_sum.shape[:1], terms.scale, dtype=wide_dtype(grad_sum.dtype))
        ids, adds = terms.ids.reshape(-1), into is not None
        found["token"] = table_grad(grad_sum, ids, size, terms.padding_idx, weights=weights, out=into, adds=adds)
    if size := sizes.get("position"):
        found["position"] = position_grad(grad_sum, T, terms.position_ids, size)
    if size := sizes.get("segment"):
        found["segment"] = segment_grad(grad_sum, T, terms.segment_ids, size)
    return found


def embed_backward(grad: Tensor, terms: Terms, sizes: dict[str, int], into: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the tables by that of hidden (..., T, D), of any strides; sizes, into: as of tables_grad.

    The tables themselves are not read: terms may come without them.
    """
    grad = grad.reshape(terms.ids.numel(), grad.shape[-1])
    return tables_grad(grad if dropout(terms) is None else drop_again(grad, terms), terms, sizes, into)


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
    call: Call, grads: tuple[Tensor | None, ...], mean: Tensor, rstd: Tensor, needs: set[str], into: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients, by name, of those of pyembed.call.LEARNED that are in needs; one that nothing reaches is missing.

    grads: of hidden, query, key and value, in the shapes in which embed_qkv returned them, of any strides, or None. mean, rstd:
    as embed_qkv returned them; into: as of tables_grad. The bias and query_offset themselves are not read: their fields may be
    None.
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
        found |= tables_grad(grad_sum, terms, {name: size for name, size in sizes.items() if name in needs}, into)
    return {name: grad for name, grad in found.items() if name in needs and grad is not None}
