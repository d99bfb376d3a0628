"""The gradient of the weight in the `distinct` plan, a product over distinct rows only.

grad_weight = Gᵀ·used + total ⊗ β                  (N, D): G (P + U, N) and used (P + U, D) as in distinct_grad.py
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .distinct import ProjectedRows
from .launch import launch
from .tiles import dot, load_tile


@triton.jit
def weight_grad_kernel(
    grad_rows,  # G (P + U, N), as in tiles.load_tile
    used,  # (P + U, D), as in tiles.load_tile
    tails,  # G and used, and their row strides: memory past the last row is uninitialised, so the last block needs a mask
    total,  # (N,) or None
    norm_bias,  # (D,) or None
    count,  # (1,) U
    grad_weight,  # (N, D) out
    P,
    N,
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    G, rows_of_used, stride_gr, stride_ur = tails
    ACC: tl.constexpr = tl.float64 if grad_weight.dtype.element_ty == tl.float64 else tl.float32
    across = tl.cdiv(D, BLOCK_N)
    n0 = tl.program_id(0) // across * BLOCK_M
    d0 = tl.program_id(0) % across * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_M)
    d = d0 + tl.arange(0, BLOCK_N)
    rows = P + tl.load(count)
    whole = rows // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    # The last block first: after the loop, its product would make the loop's wait for one another on Hopper.
    g = load_tile((G, rows, N, stride_gr), whole, n0, BLOCK_K, BLOCK_M, True)
    acc = dot(g, load_tile((rows_of_used, rows, D, stride_ur), whole, d0, BLOCK_K, BLOCK_N), acc, PRECISION)
    for r0 in range(0, whole, BLOCK_K):
        g = load_tile(grad_rows, r0, n0, BLOCK_K, BLOCK_M, True)
        acc = dot(g, load_tile(used, r0, d0, BLOCK_K, BLOCK_N), acc, PRECISION)
    if norm_bias is not None:
        beta = tl.load(norm_bias + d, mask=d < D, other=0.0).to(ACC)
        acc += tl.load(total + n, mask=n < N, other=0.0)[:, None] * beta[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    tl.store(grad_weight + n[:, None].to(tl.int64) * D + d[None, :], acc.to(grad_weight.dtype.element_ty), mask=inside)


def weight_grad(
    G: Tensor, used: Tensor, total: Tensor, norm_bias: Tensor | None, weight: Tensor, which: ProjectedRows
) -> Tensor:
    """Gᵀ·used + total ⊗ β: (N, D) in weight's dtype."""
    N, D = weight.shape
    device = tuning.device_of(weight)
    tiles = tuning.weight_grad(N, D, weight.dtype, device)
    grad = weight.new_empty(N, D)
    launch(weight_grad_kernel, (tuning.cdiv(N, tiles.BLOCK_M) * tuning.cdiv(D, tiles.BLOCK_N),))(
        tuning.operand(G, (tiles.BLOCK_K, tiles.BLOCK_M), device), tuning.operand(used, (tiles.BLOCK_K, tiles.BLOCK_N), device),
        (G, used, G.stride(0), used.stride(0)), total, norm_bias, which.in_use, grad, which.P, N, D,
        PRECISION=tuning.precision(weight.dtype, device), **tiles._asdict(), **tuning.registers(device),
    )  # fmt: skip
    return grad
