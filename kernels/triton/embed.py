"""hidden = dropout(scale·token[ids] + segment[segment_ids] + position[places]) in one memory-bound pass, and dropout again in
the backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Terms

from . import tuning
from .arguments import dropout, period, places, terms_arguments
from .launch import launch, on_device
from .tiles import drop, find_rows, load_hidden


@triton.jit
def embed_kernel(
    ids,  # (M,)
    terms,  # of hidden, as in tiles.find_rows
    token,  # (V, D)
    hidden,  # (M, D) out
    absent,  # value of hidden for tokens whose rows do not all exist
    shape,  # M, T, V, L
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows, known = find_rows(ids, terms, m, M, T, V, L)
    h = load_hidden(token, terms, rows, d, D)
    h = tl.where(known[:, None], h, absent)
    tl.store(hidden + m[:, None] * D + d[None, :], h, mask=(m < M)[:, None] & (d < D)[None, :])


def embed(terms: Terms, report: tuple | None = None, absent: float = float("nan")) -> Tensor:
    """hidden (..., T, D) in token's dtype. absent: its elements where an id has no row; report: of tiles.report_absent."""
    M, (V, D) = terms.ids.numel(), terms.token.shape
    hidden = terms.token.new_empty(*terms.ids.shape, D)
    if hidden.numel() == 0:
        return hidden
    rows, columns = tuning.streaming(D, hidden.dtype)
    ids, token = tuning.dense(terms.ids, terms.token)
    with on_device(token):
        launch(embed_kernel, (tuning.cdiv(M, rows), tuning.cdiv(D, columns)))(
            ids, terms_arguments(terms, report), token, hidden, absent, (M, period(terms), V, places(terms)), D=D, BLOCK_M=rows,
            BLOCK_D=columns, num_warps=4, **tuning.registers(tuning.device_of(token)),
        )  # fmt: skip
    return hidden


@triton.jit
def drop_kernel(
    x,  # (M, D)
    out,  # (M, D) out
    dropout,  # as in tiles.find_rows
    M,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m[:, None] * D + d[None, :]
    tl.store(out + place, drop(tl.load(x + place, mask=inside, other=0.0), dropout, m, d, ACC), mask=inside)


def drop_again(grad: Tensor, terms: Terms) -> Tensor:
    """The gradient (M, D) of hidden -> that of hidden before dropout, which draws the same elements again from the seed."""
    (M, D), (grad,) = grad.shape, tuning.dense(grad)
    out = torch.empty_like(grad)
    rows, columns = tuning.streaming(D, grad.dtype)
    with on_device(grad):
        launch(drop_kernel, (tuning.cdiv(M, rows), tuning.cdiv(D, columns)))(
            grad, out, dropout(terms), M, D, BLOCK_M=rows, BLOCK_D=columns, num_warps=4
        )
    return out
