"""The `distinct` plan: each distinct token and position is projected once, then gathered, as pyembed::distinct_qkv.

Kernels run it on a GPU (kernels/triton/distinct.py), PyTorch's operators on a CPU (distinct_cpu.py, which has the formula).
"""

from typing import Any

import torch
from torch import Tensor

from ..call import NO_EPILOGUE, Call, HiddenQKV, wide_dtype
from ..reference import finish
from . import distinct_cpu
from .choice import remember_count
from .operators import FrontEnd, launch, launcher


def front_end(call: Call, kernels: bool, observed: bool, grads: bool, used: Tensor | None = None) -> HiddenQKV:
    """The whole call; the part of the epilogue that the plan cannot do follows by PyTorch's operators. used: (1,) how many of
    call.distinct count, where the device alone knows it, which then belong to no table of the user's."""
    given = (None, None) if call.distinct is None else (call.distinct.ids, call.distinct.inverse.reshape(-1))
    fused, rest = call.epilogue.split_turns() if kernels else (NO_EPILOGUE, call.epilogue)
    call = call._replace(epilogue=fused)
    *outputs, count = distinct_qkv(call, *given, used, kernels, observed=observed, grads=grads)
    if kernels and used is None:
        remember_count(call.terms.token, count, call.terms.ids.numel())
    found = HiddenQKV._make(outputs[: len(HiddenQKV._fields)])
    return found if rest is NO_EPILOGUE else finish(found, rest)


def _forward(call: Call, rows: Tensor | None, index: Tensor | None, used: Tensor | None, kernels: bool) -> tuple[Tensor, ...]:
    """The last results: projected (·, N), of distinct positions and then of tokens; rows of the token table and each token's
    index (M,) among them, empty where they were given; count (1,) of the rows in use, where the device alone knows it."""
    ids = call.terms.ids
    if kernels:
        *results, found_rows, found_index, count = launch("distinct", "forward", call, rows, index, used)
    else:
        *results, found_rows, found_index = distinct_cpu.forward(call, rows, index)
        count = ids.new_empty(0, dtype=torch.int32)
    found = (found_rows, found_index) if rows is None else (ids.new_empty(0), ids.new_empty(0))
    return *results, *found, count if used is None else count.new_empty(0)  # an operator returns no argument


def _backward(call: Call, grads: Any, results: Any, options: Any, needs: set[str], into: Tensor | None) -> dict[str, Tensor]:
    mean, rstd, projected, found_rows, found_index, count = results
    rows, index, used, kernels = options
    if rows is None:
        rows, index = found_rows, found_index
    if not kernels:
        return distinct_cpu.backward(call, grads, rstd, projected, rows, index, needs, into)
    module, running = launcher("distinct_grad", call.terms.token)
    with running:
        count = count if used is None else used
        return module.backward(call, grads, mean, rstd, projected, rows, index, count, needs, into)


def _empty(call: Call, rows: Tensor | None, index: Tensor | None, used: Tensor | None, kernels: bool) -> tuple[Tensor, ...]:
    """Sizes that depend on the values of ids are new symbols."""
    assert call.projection is not None
    ids, token, *_ = call.terms
    M, size = ids.numel(), torch.library.get_ctx().new_dynamic_size
    found: tuple[Tensor, ...] = (ids.new_empty(0), ids.new_empty(0))
    if rows is None:
        most, dtype = (torch.sym_min(M, token.shape[0]), torch.int32) if kernels else (size(), torch.int64)
        found = ids.new_empty(most, dtype=dtype if kernels else ids.dtype), ids.new_empty(M, dtype=dtype)
    hidden, query, key, value, mean, rstd = call.empty_outputs()
    projected = token.new_empty(
        size(), call.projection.weight.shape[0], dtype=wide_dtype(token.dtype) if token.dtype == torch.float16 else None
    )
    mean = mean if kernels else token.new_empty(0, dtype=mean.dtype)
    count = ids.new_empty(1 if kernels and used is None else 0, dtype=torch.int32)
    return hidden, query, key, value, mean, rstd, projected, *found, count


distinct_qkv = FrontEnd(
    "distinct_qkv",
    "Tensor? rows, Tensor? index, Tensor? used, bool kernels",
    "mean rstd projected found_rows found_index count",
    _forward,
    _backward,
    _empty,
)
