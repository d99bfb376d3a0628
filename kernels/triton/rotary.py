"""Backward of the rotary embedding: gradients of query and key are rotated by the opposite angles."""

import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Epilogue

from . import tuning
from .arguments import epilogue_arguments
from .epilogue import find_halves, find_pairs, load_turns, store_pairs, turn
from .launch import launch, on_device


@triton.jit
def turn_back_kernel(
    grad,  # (M, n)
    out,  # (M, n) out
    rotary,  # as in epilogue.store_projected
    M,
    width,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(1) * BLOCK_N
    row, _ = load_turns(rotary, m, m < M)
    inside = (m < M)[:, None]
    rows = grad + m[:, None] * width
    if HALF > 0:
        first, second, pair = find_halves(n0, HEAD_DIM, HALF, BLOCK_N)
        x = tl.load(rows + first[None, :], mask=inside & (first < width)[None, :], other=0.0).to(ACC)
        y = tl.load(rows + second[None, :], mask=inside & (second < width)[None, :], other=0.0).to(ACC)
    else:
        first, second, pair = find_pairs(n0, HEAD_DIM, HALF, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        z = tl.load(rows + n[None, :], mask=inside & (n < width)[None, :], other=0.0).to(ACC)
        x, y = tl.split(tl.reshape(z, (BLOCK_M, BLOCK_N // 2, 2)))
    y, x = turn(y, x, rotary, row, pair, True, HALF)
    store_pairs(out, x, y, m, M, n0, width, None, first, second, HEAD_DIM, HALF)


def turn_back(grad: Tensor, epilogue: Epilogue) -> Tensor:
    """The gradient (..., h, d_h) of heads after their rotary turn -> that of the heads before it."""
    head_dim = grad.shape[-1]
    M, width = grad[..., 0, 0].numel() if grad.numel() else 0, grad.shape[-2] * head_dim
    out = grad.new_empty(grad.shape)
    if out.numel() == 0:
        return out
    (_, _, rotary, _), pairs = epilogue_arguments(epilogue, M, head_dim)
    block_m, block_n = tuning.streaming(width, grad.dtype)
    with on_device(grad):
        launch(turn_back_kernel, (tuning.cdiv(M, block_m), tuning.cdiv(width, block_n)))(
            *tuning.dense(grad), out, rotary, M, width, **pairs, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
        )
    return out
