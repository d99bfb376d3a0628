"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: the products that the plan runs, two operations for
each multiplication and addition; gathers, norms and rotary turns count nothing, as PyTorch's own."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .call import LEARNED, PROJECTING
from .plans import distinct, one_pass
from .plans.operators import FrontEnd, Operator


def _register(plan: FrontEnd, rows: Callable[[dict[str, Any]], int]) -> None:
    """rows(shapes by name, of arguments and results): how many rows the products have."""

    def count(operator: Operator, results: tuple[str, ...]) -> None:
        @register_flop_formula(getattr(torch.ops.pyembed, operator.op._schema.name.rpartition(":")[2]))
        def formula(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
            named = dict(zip(operator.names, shapes, strict=False)) | dict(zip(results, out_shape, strict=False))
            weights = [named[name] for name in ("weight", "key_weight", "value_weight") if named[name] is not None]
            return _products(named) * 2 * rows(named) * sum(map(math.prod, weights))

    count(plan.forward, plan.outputs)
    count(plan.backward, ())


def _products(named: dict[str, Any]) -> int:
    """Of a backward: one for the weight, one for what lies before the projection."""
    if "needs" not in named:
        return 1
    if all(named[f"grad_{output}"] is None for output in ("query", "key", "value")):
        return 0
    needs = dict(zip(LEARNED, named["needs"], strict=True))
    before = any(needs[name] for name in LEARNED if name not in PROJECTING)
    return any(needs[name] for name in PROJECTING if name.endswith("weight")) + before


_register(one_pass.embed_qkv, lambda named: math.prod(named["ids"]))
_register(distinct.distinct_qkv, lambda named: named["projected"][0])
