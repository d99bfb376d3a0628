"""Calls by kernels over rows of two tables: of the token table, and those that train or stand in place of tokens.

    keys       which row of either table each token takes                    pyembed::find_keys
    used       the keys that occur, for `distinct`                           pyembed::find_used
    rows       of all tokens, or of the keys in use, which then are a table  pyembed::gather, differentiable any number of times

and the kernels that there are run over that table.
"""

from typing import Any

import torch
from torch import Tensor

from ..call import LOOKUPS, Call, DistinctIds, HiddenQKV, as_table
from ..ids import report_of
from ..rows import Extended
from . import distinct
from .operators import Operator, launcher, refuse_tangents, save_inputs, saved_inputs


def rows_of(call: Call, token: Extended, observed: bool | None) -> Tensor:
    """Rows (..., T, D) of the call's tokens, before all else is added."""
    assert token.table is not None
    return gather(keys_of(call, token, observed), *token.tables(), observed=observed)


def keys_of(call: Call, token: Extended, observed: bool | None) -> Tensor:
    """The keys of the call's tokens, like ids. What kernels report: ids without a row, and wrong counts."""
    assert token.table is not None
    ids, none, policy = token.ids.view(call.terms.ids.shape), token.ids.new_empty(0), call.id_policy
    numbers, sizes, placeholders, values, orders = map(list, zip(*token.streams, strict=True))
    values, orders = ([none if x is None else x for x in tensors] for tensors in (values, orders))
    tables = [len(LOOKUPS) + number for number in numbers]
    streams = placeholders, sizes, values, orders, tables
    return find_keys(ids, token.table.shape[0], *streams, policy == "clamp", policy != "trust", observed=observed)


def over(call: Call, rows: Tensor) -> Call:
    """The call over these rows, which are a table of their own then."""
    table, index, distinct = as_table(rows)
    terms = call.terms._replace(ids=index, token=table, scale=None, padding_idx=-1)
    return call._replace(terms=terms, distinct=None if call.projection is None else distinct)


def front_end(call: Call, token: Extended, observed: bool) -> HiddenQKV:
    """The call by `distinct`: each key in use is projected once."""
    assert token.table is not None
    keys, size = keys_of(call, token, observed), token.table.shape[0] + token.own.shape[0]
    used, index, count = find_used(keys, size, observed=observed)
    table, _, places = as_table(gather(used, *token.tables(), observed=observed))
    terms = call.terms._replace(ids=index.view(keys.shape), token=table, scale=None, padding_idx=-1)
    # What has no row was told of by the keys.
    call = call._replace(terms=terms, distinct=DistinctIds(places.ids, index.view(keys.shape)), id_policy="trust")
    return distinct.front_end(call, True, observed, call.wants_grad(), count)


def _run_keys(*arguments: Any) -> Tensor:
    *fields, reports = arguments
    ids = fields[0]
    module, running = launcher("keys", ids)
    with running:
        return module.find_keys(*fields, (report_of(ids.device, reports), ids.shape[-1] if ids.dim() else 1))


def _empty_keys(ids: Tensor, size: int, placeholders: list[int], rows: list[int], *others: Any) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int32 if size + sum(rows) < 2**31 else torch.int64)


_STREAMS = "SymInt[] placeholders, SymInt[] rows, Tensor[] values, Tensor[] orders, SymInt[] tables"
find_keys = Operator(
    "find_keys", f"(Tensor ids, SymInt size, {_STREAMS}, bool clamp, bool reports) -> Tensor", _run_keys, _empty_keys
)


def _run_used(keys: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    module, running = launcher("keys", keys)
    with running:
        return module.find_used(keys, size)


def _empty_used(keys: Tensor, size: int) -> tuple[Tensor, ...]:
    M = keys.numel()
    return tuple(keys.new_empty(n, dtype=torch.int32) for n in (torch.sym_min(M, size), M, 1))


find_used = Operator("find_used", "(Tensor keys, SymInt size) -> (Tensor, Tensor, Tensor)", _run_used, _empty_used)


def _run(keys: Tensor, token: Tensor, own: Tensor, scale: float | None, padding_idx: int) -> Tensor:
    module, running = launcher("gather", token)
    with running:
        return module.gather(keys, token, own, scale)


def _empty(keys: Tensor, token: Tensor, *others: Any) -> Tensor:
    return token.new_empty(*keys.shape, token.shape[1])


_NUMBERS = "float? scale, SymInt padding_idx"
gather = Operator("gather", f"(Tensor keys, Tensor token, Tensor own, {_NUMBERS}) -> Tensor", _run, _empty)


def _run_backward(
    grad: Tensor, keys: Tensor, scale: float | None, padding_idx: int, size: int, needs: list[int]
) -> tuple[Tensor, Tensor]:
    module, running = launcher("gather", grad)
    with running:
        return module.gather_backward(grad, keys, scale, padding_idx, size, needs)


def _empty_backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    V, R = others[-1]
    return grad.new_empty(V, grad.shape[-1]), grad.new_empty(R, grad.shape[-1])


gather_backward = Operator(
    "gather_backward",
    f"(Tensor grad, Tensor keys, {_NUMBERS}, SymInt size, SymInt[] needs) -> (Tensor, Tensor)",
    _run_backward,
    _empty_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    keys, token, own, scale, padding_idx = inputs
    ctx.sizes = token.shape[0], own.shape[0]
    save_inputs(ctx, (keys, scale, padding_idx))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangents(grad)
    fields, _ = saved_inputs(ctx)
    wanted = ctx.needs_input_grad[1:3]
    needs = [size if needed else 0 for size, needed in zip(ctx.sizes, wanted, strict=True)]
    found = gather_backward(grad, *fields, ctx.sizes[0], needs)
    return None, *(x if needed else None for x, needed in zip(found, wanted, strict=True)), None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    _, *fields, ctx.size, ctx.needs = inputs
    save_inputs(ctx, tuple(fields))


def _differentiate_backward(ctx: Any, token: Tensor, own: Tensor) -> tuple[Any, ...]:
    """The backward is linear in grad: its transpose gathers what comes for its gradients."""
    refuse_tangents(token, own)
    (keys, scale, padding_idx), _ = saved_inputs(ctx)
    V, R = ctx.needs
    if not V:  # its keys name a row of zeros
        keys, token = (keys - (ctx.size - 1)).clamp(min=0), own.new_zeros(1, own.shape[1])
    elif padding_idx >= 0:
        token = token.masked_fill((torch.arange(V, device=token.device) == padding_idx)[:, None], 0.0)
    if not R:
        keys, own = keys.clamp(max=token.shape[0]), token.new_zeros(1, token.shape[1])
    return gather(keys, token, own, scale, -1), None, None, None, None, None


gather.register_autograd(_save, _differentiate)
gather_backward.register_autograd(_save_backward, _differentiate_backward)
