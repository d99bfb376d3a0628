"""The loss of a head whose rows are tokens, in chunks of tokens, so that logits of all tokens are never there at once."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyembed.tied as tied

from ..call import wide_dtype
from ..modes import TENSORS, autocast_dtype, can_read, is_plain_eager, is_recorded
from ..plans.rates import product_dtype

LOGITS = 2**24  # of a chunk, 64 MiB in fp32
LEAST = 256  # tokens of a chunk, below which a product waits for the weight to be read
BLOCK = 4096  # rows of a table that are computed at once in a wider dtype
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

    float32, bfloat16 and float64 without autocast and replaced rows, in eager mode: "mean" and "sum" compute gradients in the
    forward, so that they allow one backward, "none" in the backward; none has second derivatives. Else PyTorch's operators
    compute chunks again in the backward. bfloat16: the weight's gradient is rounded after each chunk.

    Tied weights: where a lookup of this library (pyembed.Embedding, functional.embedding, embed and embed_qkv, by kernels or on
    a CPU; a fused front end) reads the very tensor that is weight here, both gradients are summed in one buffer from the second
    call on. Autograd gives the gradient of torch.nn.Embedding a buffer of its own.

    TypeError, ValueError: shapes that do not fit, ids of replaced rows that come twice or lie outside, an unknown reduction.
    IndexError: on a CPU, a target that is no token; on a GPU PyTorch asserts.
    """
    V = _checked(hidden, weight, target, bias, size, replaced, reduction, ignore_index, label_smoothing)
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk: expected a positive int or None, got {chunk!r}")
    rows = chunk or chunk_of(V)
    flat, targets = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    if replaced is None and _is_plain(hidden, weight, target, bias):
        options = _Options(V, ignore_index, label_smoothing, rows, reduction)
        return _apply(flat, weight, bias, targets, options).view(target.shape if reduction == "none" else ())
    loss_of = partial(_loss, size=V, ignore_index=ignore_index, label_smoothing=label_smoothing)
    losses = [
        checkpoint(loss_of, part, weight, bias, replaced, wanted, use_reentrant=False)
        for part, wanted in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    each = torch.cat([loss for loss in losses if loss is not None]) if losses else flat.new_zeros(0)
    if reduction == "none":
        return each.view(target.shape)
    return each.sum() / (targets != ignore_index).sum() if reduction == "mean" else each.sum()


def chunk_of(size: int) -> int:
    """Tokens of a chunk by default, of logits for so many rows."""
    return max(LEAST, 1 << max(1, LOGITS // max(size, 1)).bit_length() - 1)


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
    ids, rows = (None, None) if replaced is None else replaced
    if hidden.dtype == torch.float16 == weight.dtype and is_plain_eager() and autocast_dtype(weight) is None:
        dtype = product_dtype(weight.device, weight.dtype)  # on a CPU fp16 may take many times as long
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias, rows = (None if x is None else x.to(dtype) for x in (bias, rows))
    logits = F.linear(hidden, weight, bias)
    if ids is not None and rows is not None:
        logits = logits.index_copy(1, ids, F.linear(hidden, rows, None if bias is None else bias[ids]))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # Padding takes no part of what label_smoothing spreads over all tokens, of which −inf would make an infinite loss.
    logits = logits[:, :size]
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)


class _Options(NamedTuple):
    size: int
    ignore_index: int
    label_smoothing: float
    chunk: int
    reduction: str


def _is_plain(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> bool:
    """Whether _Loss takes them: eager, of one dtype, not fp16, in whose range gradients of a mean may be zero."""
    floats = [x for x in (hidden, weight, bias) if x is not None]
    return (
        all(type(x) in TENSORS and x.dtype == weight.dtype and x.device == target.device for x in floats)
        and weight.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and type(target) is Tensor
        and is_plain_eager()
        and not is_recorded()
        and autocast_dtype(weight) is None
    )


def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options) -> Tensor:
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    waiting = tied.before_head(weight)
    through = weight if waiting is None else waiting.weight
    return _Loss.apply(hidden, through, bias, weight.detach(), target, options, wants, waiting)


class _Loss(torch.autograd.Function):
    """A loss in at least float32. weight: of which gradients are; table: the same, whose values are read."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Any,
        table: Tensor,
        target: Tensor,
        options: Any,
        wants: Any,
        waiting: Any,
    ) -> Tensor:
        ctx.waiting, ctx.options, ctx.wants, ctx.grads = waiting, options, wants, None
        if options.reduction == "none":
            ctx.save_for_backward(hidden, table, bias, target)
            return _compute(hidden, table, bias, target, options)[0]
        kept = (target != options.ignore_index).to(wide_dtype(hidden.dtype))
        count = kept.sum() if options.reduction == "mean" else None
        share = kept if count is None else kept / count.clamp(min=1)
        each, ctx.grads = _compute(hidden, table, bias, target, options, share if any(wants) else None, wants)
        return each.sum() if count is None else each.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            if ctx.options.reduction == "none":
                hidden, table, bias, target = ctx.saved_tensors
                share = grad * (target != ctx.options.ignore_index)
                grads = _compute(hidden, table, bias, target, ctx.options, share, ctx.wants)[1]
            else:
                grads, ctx.grads = ctx.grads, None
                if grads is None:
                    raise RuntimeError(
                        'linear_cross_entropy: expected one backward, got another: reductions "mean" and "sum" hand over the '
                        'gradients that their forward computed, "none" computes them in each backward'
                    )
                for x in grads:
                    _multiply(x, grad)
        if torch.is_grad_enabled():  # they are functions of nothing, which must not pass for second derivatives of zero
            refuse = torch._C._functions.DelayedError(b"linear_cross_entropy: it has no second derivatives", 1)
            grads = [None if x is None else refuse(x.requires_grad_()) for x in grads]
        grad_hidden, grad_weight, grad_bias = grads
        return grad_hidden, tied.hand_over(ctx.waiting, grad_weight), grad_bias, None, None, None, None, None


def _multiply(x: Tensor | None, factor: Tensor) -> None:
    """x *= factor, which is not rounded to x's dtype."""
    if x is not None and x.dtype == factor.dtype:
        x.mul_(factor)
    elif x is not None:
        for part in x.split(BLOCK):
            part.copy_(part * factor.view(1))


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: _Options,
    share: Tensor | None = None,
    wants: Any = (),
) -> tuple[Tensor, list[Any]]:
    """The loss (n,) of each token of hidden (n, D), 0 where it is ignored, and gradients of hidden, weight and bias, each where
    it is wanted, of the losses' sum weighted by share (n,); None: of none."""
    size, ignore_index, smoothing, chunk, _ = options
    wide, dtype = wide_dtype(weight.dtype), product_dtype(weight.device, weight.dtype)
    table, shift = weight[:size].to(dtype), None if bias is None else bias[:size].to(dtype)
    kept, losses = target != ignore_index, hidden.new_empty(len(hidden), dtype=wide)
    grads: list[Any] = [None] * 3
    if share is not None:
        like = (hidden, weight, bias if bias is None else bias.to(wide))
        grads = [torch.zeros_like(x) if want and x is not None else None for x, want in zip(like, wants, strict=True)]
    grad_hidden, grad_weight, grad_bias = grads
    memory = hidden.new_empty(min(chunk, len(hidden)), size, dtype=wide)
    for first in range(0, len(hidden), chunk):
        part = slice(first, first + chunk)
        h, keep = hidden[part].to(dtype), kept[part, None]
        chosen = target[part, None].where(keep, 0)
        logits = _product(h, table, shift, memory[: len(h)])
        logits.sub_(logits.amax(1, keepdim=True))
        right = logits.gather(1, chosen)
        if smoothing:
            right = torch.lerp(right, logits.mean(1, keepdim=True), smoothing)
        sums = logits.exp_().sum(1, keepdim=True)
        losses[part] = torch.where(keep, sums.log() - right, 0.0).view(-1)
        if share is None:
            continue
        # From here on the gradient of the logits, times sums / share: scaling the narrower operands takes less time.
        if smoothing:
            logits.sub_(sums * (smoothing / size))
        logits.scatter_add_(1, chosen, sums * (smoothing - 1))
        scale = share[part, None] / sums
        factor = logits.to(dtype)
        if grad_hidden is not None:
            torch.mul(factor @ table, scale, out=grad_hidden[part])
        if grad_weight is not None:
            _add_product(grad_weight[:size], factor, (h * scale).to(dtype))
        if grad_bias is not None:
            grad_bias[:size] += logits.mul_(scale).sum(0)
    if bias is not None and grad_bias is not None:
        grads[2] = grad_bias.to(bias.dtype)
    return losses, grads


def _product(hidden: Tensor, table: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden · tableᵀ + bias, into out (m, size)."""
    if hidden.dtype != out.dtype:
        return out.copy_(F.linear(hidden, table, bias))
    return torch.mm(hidden, table.t(), out=out) if bias is None else torch.addmm(bias, hidden, table.t(), out=out)


def _add_product(grad: Tensor, factor: Tensor, hidden: Tensor) -> None:
    """grad (size, D) += factorᵀ · hidden, without a second tensor of its size."""
    if grad.dtype == hidden.dtype:
        grad.addmm_(factor.t(), hidden)
        return
    for part, columns in zip(grad.split(BLOCK), factor.split(BLOCK, 1), strict=True):
        part += columns.t() @ hidden


def _checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    size: int | None,
    replaced: Replaced,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
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
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
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
