"""hidden = token[ids] + position[places]: the gather and the positional add in one pass, bound by memory alone."""

import triton
import triton.language as tl

from . import tuning
from .tiles import load_hidden, load_places, load_rows


@triton.jit
def embed_kernel(
    ids,  # (M,)
    position_ids,  # (T,) or (M,), or None: the place in the sequence
    token,  # (V, D)
    position,  # (L, D) or None
    hidden,  # (M, D) out
    shape,  # M, T, V, L
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, T, V, L = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, known = load_rows(ids, m, m < M, V)
    place = None
    if position is not None:
        place, placed = load_places(position_ids, m, m < M, T, L)
        known &= placed
    h = load_hidden(token, position, row, place, d, D)
    h = tl.where(known[:, None], h, float("nan"))
    tl.store(hidden + m[:, None] * D + d[None, :], h, mask=(m < M)[:, None] & (d < D)[None, :])


def embed(ids, token, position, position_ids):
    """ids (..., T), token (V, D), position (L, D) or None, position_ids (T,) or like ids -> hidden (..., T, D)."""
    M, T = ids.numel(), ids.shape[-1] if ids.dim() else 1
    V, D = token.shape
    hidden = token.new_empty(*ids.shape, D)
    if hidden.numel() == 0:
        return hidden
    rows, columns = tuning.streaming(D, token.dtype)
    with tuning.on_device(token):
        embed_kernel[(triton.cdiv(M, rows), triton.cdiv(D, columns))](
            *tuning.dense(ids, position_ids, token, position),
            hidden,
            (M, T if position_ids is None else position_ids.numel(), V, 0 if position is None else position.shape[0]),
            D=D,
            BLOCK_M=rows,
            BLOCK_D=columns,
            num_warps=4,
        )
    return hidden
