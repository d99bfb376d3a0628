"""The loss of a head whose rows are tokens, in chunks of tokens, so that logits of all tokens are never there at once."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..modes import autocast_dtype, can_read, is_transformed

LOGITS = 2**24  # of a chunk, 64 MiB in fp32
LEAST = 256  # tokens of a chunk, below which a product waits for the weight to be read
REDUCTIONS = ("mean", "sum", "none")
Replaced = tuple[Tensor, Tensor] | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    size: int | None = None,
    replaced: Replaced = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """cross_entropy(hidden · weightᵀ + bias, target), a scalar, or (...) where reduction is "none".

    hidden (..., D); weight (V, D), often the table of tokens too; target (...) int64; bias (V,) or None. size: how many rows
    are tokens; later ones are padding, which is never chosen and has no probability. replaced: (ids (R,), rows (R, D)), rows
    in the place of the weight's at these ids, as those of a TrainableRows; the weight is not copied. ignore_index, reduction
    ("mean", "sum", "none") and label_smoothing as in torch.nn.functional.cross_entropy. chunk: tokens whose logits are there
    at once, in the forward and again in the backward; None: 64 MiB of logits, and at least 256 tokens.

    PyTorch's linear_cross_entropy runs where it can (a torch that has it, eager, without autocast, label_smoothing and
    replaced rows), with our chunk: it has no second derivatives and allows one backward. Else chunks are computed again in the
    backward, by PyTorch's operators.

    TypeError, ValueError: shapes that do not fit, ids of replaced rows that come twice or lie outside, an unknown reduction.
    IndexError: on a CPU, a target that is no token; on a GPU PyTorch asserts, or the loss of a padded row is infinite.
    """
    V = _checked(hidden, weight, target, bias, size, replaced, reduction, ignore_index)
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk: expected a positive int or None, got {chunk!r}")
    rows = chunk or max(LEAST, 1 << (LOGITS // max(V, 1)).bit_length() - 1)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    bias = _masked(weight, bias, V)
    options = None if label_smoothing or replaced is not None or len(flat) == 0 else _options(rows, weight)
    if options is not None:
        loss = F.linear_cross_entropy(
            flat, weight, targets, linear_bias=bias, reduction=reduction, ignore_index=ignore_index, options=options
        )
        return loss.view(target.shape) if reduction == "none" else loss
    loss_of = partial(_loss, size=V, ignore_index=ignore_index, label_smoothing=label_smoothing)
    losses = [
        checkpoint(loss_of, part, weight, bias, replaced, wanted, use_reentrant=False)
        for part, wanted in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    each = torch.cat([loss for loss in losses if loss is not None]) if losses else flat.new_zeros(0)
    if reduction == "none":
        return each.view(target.shape)
    return each.sum() / (targets != ignore_index).sum() if reduction == "mean" else each.sum()


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    replaced: Replaced,
    target: Tensor,
    size: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """(m,) of a chunk of tokens, hidden (m, D), target (m,)."""
    logits = F.linear(hidden, weight, bias)
    if replaced is not None:
        ids, rows = replaced
        logits = logits.index_copy(1, ids, F.linear(hidden, rows, None if bias is None else bias[ids]))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # Padding takes no part of what label_smoothing spreads over all tokens, of which −inf would make an infinite loss.
    logits = logits[:, :size]
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)


def _masked(weight: Tensor, bias: Tensor | None, size: int) -> Tensor | None:
    """The bias, −inf for rows that are padding."""
    V = weight.shape[0]
    if size == V:
        return bias
    padding = weight.new_full((V - size,), -torch.inf)
    return torch.cat([weight.new_zeros(size) if bias is None else bias[:size], padding])


def _options(rows: int, weight: Tensor) -> Any:
    """Of PyTorch's own chunked loss, which takes operands of one dtype and is opaque to compilers; None: it cannot run."""
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if kind is None or torch.compiler.is_compiling() or is_transformed() or autocast_dtype(weight) is not None:
        return None
    return kind(batch_chunk_size=rows, chunking_method=None)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    size: int | None,
    replaced: Replaced,
    reduction: str,
    ignore_index: int,
) -> int:
    """The number of rows that are tokens."""
    for name, value in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: expected (..., D) and (V, D), got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    V = weight.shape[0]
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target: expected int64 of shape {tuple(hidden.shape[:-1])}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias: expected shape ({V},), that of weight's rows, got {tuple(bias.shape)}")
    if size is not None and (not isinstance(size, int) or not 0 < size <= V):
        raise ValueError(f"size: expected 1 to {V}, the number of weight's rows, got {size!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    size = size or V
    if replaced is not None:
        ids, rows = replaced
        if ids.dim() != 1 or rows.shape != (len(ids), weight.shape[1]):
            got = f"{tuple(ids.shape)} and {tuple(rows.shape)}"
            raise ValueError(f"replaced: expected ids (R,) and rows (R, {weight.shape[1]}), got shapes {got}")
        if can_read(ids) and (len(ids.unique()) < len(ids) or len(ids) and not 0 <= ids.min() <= ids.max() < V):
            raise ValueError(f"replaced: expected ids from 0 to {V - 1}, each once, got {ids.tolist()}")
    if can_read(target):
        wrong = ((target < 0) | (target >= size)) & (target != ignore_index)
        if wrong.any():
            raise IndexError(f"target: expected ids below {size} or ignore_index {ignore_index}, got {int(target[wrong][0])}")
    return size
