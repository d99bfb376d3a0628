"""Rows of a table and, for some tokens, of another, by one kernel, as pyembed::gather; they are a table of their own then.

Differentiable any number of times.
"""

from typing import Any

import torch
from torch import Tensor

from ..call import Call, as_table
from ..ids import report_of
from ..rows import Extended
from .operators import Operator, launcher, refuse_tangents, save_inputs, saved_inputs


def rows_of(call: Call, token: Extended, observed: bool | None) -> Tensor:
    """Rows (..., T, D) of the call's tokens, before all else is added."""
    return gather(*token.arguments(call.terms.ids), call.id_policy != "trust", observed=observed)


def over(call: Call, rows: Tensor) -> Call:
    """The call over these rows, which are a table of their own then."""
    table, index, distinct = as_table(rows)
    terms = call.terms._replace(ids=index, token=table, scale=None, padding_idx=-1)
    return call._replace(terms=terms, distinct=None if call.projection is None else distinct)


def _run(ids: Tensor, slot: Tensor, token: Tensor, own: Tensor, scale: float | None, padding_idx: int, reports: bool) -> Tensor:
    module, running = launcher("gather", token)
    with running:
        report = report_of(token.device, reports), ids.shape[-1] if ids.dim() else 1
        return module.gather(ids, slot, token, own, scale, report)


def _empty(ids: Tensor, slot: Tensor, token: Tensor, *others: Any) -> Tensor:
    return token.new_empty(*ids.shape, token.shape[1])


_NUMBERS = "float? scale, SymInt padding_idx"
gather = Operator(
    "gather", f"(Tensor ids, Tensor slot, Tensor token, Tensor own, {_NUMBERS}, bool reports) -> Tensor", _run, _empty
)


def _run_backward(
    grad: Tensor, ids: Tensor, slot: Tensor, scale: float | None, padding_idx: int, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    module, running = launcher("gather", grad)
    with running:
        return module.gather_backward(grad, ids, slot, scale, padding_idx, sizes)


def _empty_backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    V, R = others[-1]
    return grad.new_empty(V, grad.shape[-1]), grad.new_empty(R, grad.shape[-1])


gather_backward = Operator(
    "gather_backward",
    f"(Tensor grad, Tensor ids, Tensor slot, {_NUMBERS}, SymInt[] sizes) -> (Tensor, Tensor)",
    _run_backward,
    _empty_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ids, slot, token, own, scale, padding_idx, _ = inputs
    ctx.sizes = token.shape[0], own.shape[0]
    save_inputs(ctx, (ids, slot, scale, padding_idx))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangents(grad)
    fields, _ = saved_inputs(ctx)
    needs = ctx.needs_input_grad[2:4]
    found = gather_backward(grad, *fields, [size if needed else 0 for size, needed in zip(ctx.sizes, needs, strict=True)])
    return None, None, *(x if needed else None for x, needed in zip(found, needs, strict=True)), None, None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    _, *fields, ctx.sizes = inputs
    save_inputs(ctx, tuple(fields))


def _differentiate_backward(ctx: Any, token: Tensor, own: Tensor) -> tuple[Any, ...]:
    """The backward is linear in grad: its transpose gathers what comes for its gradients."""
    refuse_tangents(token, own)
    (ids, slot, scale, padding_idx), _ = saved_inputs(ctx)
    V, R = ctx.sizes
    if not V:
        ids, token = torch.zeros_like(ids), own.new_zeros(1, own.shape[1])
    elif padding_idx >= 0:
        token = token.masked_fill((torch.arange(V, device=token.device) == padding_idx)[:, None], 0.0)
    if not R:
        slot, own = slot.clamp(max=0), token.new_zeros(1, token.shape[1])
    return gather(ids, slot, token, own, scale, -1, False), None, None, None, None, None


gather.register_autograd(_save, _differentiate)
gather_backward.register_autograd(_save_backward, _differentiate_backward)
