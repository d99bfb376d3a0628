"""hidden's first term where some tokens take rows of another table, in one memory-bound pass:

rows[m] = own[keys[m] − V] where keys[m] >= V, else scale·token[keys[m]]; NaN where keys[m] = −1
"""

import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Terms

from . import tuning
from .embed_grad import embed_backward
from .launch import launch, on_device
from .table_grad import table_grad


@triton.jit
def gather_kernel(
    keys,  # (M,)
    token,  # (V, D)
    own,  # (R, D)
    scale,  # of the rows of token, or None
    rows,  # (M, D) out
    shape,  # M, V
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, V = shape
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = tl.load(keys + m, mask=m < M, other=-1).to(tl.int64)
    columns = (d < D)[None, :]
    in_table = (key >= 0) & (key < V)
    x = tl.load(token + key[:, None] * D + d[None, :], mask=in_table[:, None] & columns, other=0.0)
    if scale is not None:
        x = (x.to(ACC) * scale).to(x.dtype)
    y = tl.load(own + (key - V)[:, None] * D + d[None, :], mask=(key >= V)[:, None] & columns, other=0.0)
    x = tl.where((key >= 0)[:, None], tl.where((key >= V)[:, None], y, x), float("nan"))
    tl.store(rows + m[:, None] * D + d[None, :], x, mask=(m < M)[:, None] & columns)


def gather(keys: Tensor, token: Tensor, own: Tensor, scale: float | None) -> Tensor:
    """Rows (..., D) for keys (...), as in keys.py, of token (V, D) and own (R, D)."""
    M, (V, D) = keys.numel(), token.shape
    rows = token.new_empty(*keys.shape, D)
    if rows.numel() == 0:
        return rows
    block_m, block_d = tuning.streaming(D, rows.dtype)
    keys, token, own = tuning.dense(keys, token, own)
    with on_device(token):
        launch(gather_kernel, (tuning.cdiv(M, block_m), tuning.cdiv(D, block_d)))(
            keys, token, own, scale, rows, (M, V), D=D, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
            **tuning.registers(tuning.device_of(token)),
        )  # fmt: skip
    return rows


def gather_backward(
    grad: Tensor, keys: Tensor, scale: float | None, padding_idx: int, size: int, needs: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of token and own, of these sizes (0: not wanted), by that of rows (..., D), of any strides. size: V."""
    grad, (V, R) = grad.reshape(keys.numel(), grad.shape[-1]), needs
    terms = Terms(keys, None, scale=scale, padding_idx=padding_idx)
    found = embed_backward(grad, terms, {"token": V, "position": 0, "segment": 0})
    return found["token"] if V else grad.new_empty(0, grad.shape[1]), table_grad(grad, keys.reshape(-1) - size, R)
