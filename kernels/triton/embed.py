"""hidden = dropout(scale·token[ids] + segment[segment_ids] + position[places]) in one memory-bound pass, and dropout again in
the backward."""

import torch
import triton
import triton.language as tl

from . import tuning
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


def embed(ids, token, terms, absent=float("nan")):
    """ids (..., T), token (V, D), terms: Terms -> hidden (..., T, D), `absent` where a row is."""
    M, T = ids.numel(), ids.shape[-1] if ids.dim() else 1
    V, D = token.shape
    hidden = token.new_empty(*ids.shape, D)
    if hidden.numel() == 0:
        return hidden
    rows, columns = tuning.streaming(D, token.dtype)
    ids, token = tuning.dense(ids, token)
    with on_device(token):
        launch(embed_kernel, (tuning.cdiv(M, rows), tuning.cdiv(D, columns)))(
            ids, terms.arguments(), token, hidden, absent, (M, terms.period(T), V, terms.places), D=D, BLOCK_M=rows,
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


def drop_again(grad, dropout):
    """The gradient (M, D) of hidden after its dropout -> before: the same elements are dropped."""
    (M, D), (grad,) = grad.shape, tuning.dense(grad)
    out = torch.empty_like(grad)
    rows, columns = tuning.streaming(D, grad.dtype)
    with on_device(grad):
        launch(drop_kernel, (tuning.cdiv(M, rows), tuning.cdiv(D, columns)))(
            grad, out, dropout, M, D, BLOCK_M=rows, BLOCK_D=columns, num_warps=4
        )
    return out
