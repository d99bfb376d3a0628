"""hidden's first term where some tokens take rows of another table, in one memory-bound pass:

rows[m] = own[slot[m]] where slot[m] >= 0, else scale·token[ids[m]]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import Terms

from . import tuning
from .embed_grad import embed_backward
from .launch import launch, on_device
from .table_grad import table_grad
from .tiles import load_rows


@triton.jit
def gather_kernel(
    ids,  # (M,), any where slot is not negative
    slot,  # (M,)
    token,  # (V, D)
    own,  # (R, D)
    scale,  # of the rows of token, or None
    report,  # as in tiles.report_absent, or None
    rows,  # (M, D) out, NaN where an id has no row
    shape,  # M, V
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M, V = shape
    ACC: tl.constexpr = tl.float64 if token.dtype.element_ty == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(slot + m, mask=m < M, other=-1).to(tl.int64)
    in_table = (m < M) & (place < 0)
    row, known = load_rows(ids, m, in_table, V, report, m)
    columns = (d < D)[None, :]
    x = tl.load(token + row[:, None] * D + d[None, :], mask=(in_table & known)[:, None] & columns, other=0.0)
    if scale is not None:
        x = (x.to(ACC) * scale).to(x.dtype)
    y = tl.load(own + place[:, None] * D + d[None, :], mask=(place >= 0)[:, None] & columns, other=0.0)
    x = tl.where(known[:, None], tl.where((place >= 0)[:, None], y, x), float("nan"))
    tl.store(rows + m[:, None] * D + d[None, :], x, mask=(m < M)[:, None] & columns)


def gather(ids: Tensor, slot: Tensor, token: Tensor, own: Tensor, scale: float | None, report: tuple | None = None) -> Tensor:
    """Rows (..., D) for ids (..., T) and slot (M,), of token (V, D) and own (R, D). report: of tiles.report_absent."""
    M, (V, D) = ids.numel(), token.shape
    rows = token.new_empty(*ids.shape, D)
    if rows.numel() == 0:
        return rows
    block_m, block_d = tuning.streaming(D, rows.dtype)
    ids, slot, token, own = tuning.dense(ids, slot, token, own)
    with on_device(token):
        launch(gather_kernel, (tuning.cdiv(M, block_m), tuning.cdiv(D, block_d)))(
            ids, slot, token, own, scale, report, rows, (M, V), D=D, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
            **tuning.registers(tuning.device_of(token)),
        )  # fmt: skip
    return rows


def gather_backward(
    grad: Tensor, ids: Tensor, slot: Tensor, scale: float | None, padding_idx: int, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of token and own, of these sizes (0: not wanted), by that of rows (..., D), of any strides."""
    grad, (V, R) = grad.reshape(ids.numel(), grad.shape[-1]), sizes
    terms = Terms(torch.where(slot < 0, ids.reshape(-1), -1), None, scale=scale, padding_idx=padding_idx)
    found = embed_backward(grad, terms, {"token": V, "position": 0, "segment": 0})
    return found["token"] if V else grad.new_empty(0, grad.shape[1]), table_grad(grad, slot, R)
