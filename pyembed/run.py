"""run(call): checks, plans and runs a call; the one memory of calls.

The first call of a kind is checked, its plan is chosen and its kernels are compiled. Others of the same signature only run what
was found then, their runner: PyTorch's composition, a kernel launch, an operator with its gradients, or a choice between plans
where that depends on the ids. While a compiler, tracer, mode or profiler is at work, the operators run and nothing is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import settings
from .call import FRONT_END, Call, Called, HiddenQKV
from .checks import check, check_distinct, check_ranges
from .ids import apply_policy, look, report_of
from .modes import autocast_dtype, can_read, has_process_group, is_dtensor
from .plans import distinct, one_pass
from .plans.choice import settle, weigh_now, why_composed
from .plans.operators import is_compiled, is_observed, is_strange, kernels
from .reference import compose

Runner = Callable[[Call], Any]
SIGNATURES = 4096  # that are kept: more than a training run has shapes
_runners: dict[tuple, Runner] = {}
_TENSORS = (Tensor, nn.Parameter)  # no subclass, which may bring operators of its own
_KINDS = frozenset((*_TENSORS, type(None), bool, int, float, str, Called))


def run(call: Call) -> Any:
    """hidden (..., T, D) of a call without a projection, else HiddenQKV. Errors: those of checks.py, and of a forced plan."""
    key = None if is_observed() else _signature(call)
    runner = None if key is None else _runners.get(key)
    return _run_first(call, key) if runner is None else runner(call)


def _signature(call):
    """All that checks, plans and launches look at, but for the values of ids; None: there is a value of another kind."""
    terms, norm, projection, epilogue, *options, given, concat = call
    values = (*terms, *norm, *(projection or ()), *epilogue, *(given or ()))
    kinds = tuple(map(type, values))
    if not _KINDS.issuperset(kinds):
        return None
    grads, kernels = torch.is_grad_enabled(), settings.current.backend == "triton" or not terms.ids.is_cpu
    key = [settings.current, grads, kinds, given is None, concat, *options]
    for value, kind in zip(values, kinds, strict=True):
        if kind in _TENSORS:
            key += (value.shape, value.dtype, value.device, grads and value.requires_grad)
            if kernels:  # what they are compiled for
                if is_strange(value):
                    return None
                key += (value.stride(), value.data_ptr() % 16)
        elif kind is Called:
            weight = value.weight
            key.append(None if weight is None else (weight.shape, weight.dtype, weight.device))
        else:
            key.append(value)
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            key.append((device, torch.get_autocast_dtype(device)))
    if kernels:
        key.append(torch.backends.cuda.matmul.fp32_precision)
    return tuple(key)


def _run_first(call, key):
    """A call of a kind that was not seen before, or that cannot be remembered."""
    if _is_distributed(call):
        from .sharding import localise  # which imports torch.distributed.tensor

        local, gather = localise(call)
        return gather(run(local))
    check(call, autocast_dtype(_token(call)))
    runner = _runner_of(call, key is None)
    result = runner(call)
    if key is not None:
        if len(_runners) >= SIGNATURES:
            _runners.clear()
        _runners[key] = runner
    return result


def _token(call):
    token = call.terms.token
    return token.weight if isinstance(token, Called) else token


def _is_distributed(call):
    """Whether a field is a DTensor."""
    return has_process_group() and any(map(is_dtensor, call.values())) and not _has_modules(call)


def _has_modules(call):
    return any(isinstance(value, Called) for value in call.values())


def _runner_of(call, observed):
    """What runs calls like this one: by which plan, and by kernels or PyTorch's operators, is decided here.

    observed: whether operators must run, which somebody sees."""
    if call.id_policy in ("clamp", "zero"):
        runner = _runner_of_plan(apply_policy(call), observed)
        return lambda call: runner(apply_policy(call))
    return _runner_of_plan(call, observed)


def _runner_of_plan(call, observed):
    composed = why_composed(call)
    one = _kernel_runner(call, observed) if composed is None else _composition_runner(call)
    if call.projection is None or call.concat or _has_modules(call):
        return one
    plan = settle(call)
    if plan is not None and plan.name == "one_pass":
        return one
    other = _explained(partial(distinct.front_end, kernels=composed is None, observed=observed))
    if call.distinct is not None or composed is None and _must_check(call):
        other = _checked(other)
    if plan is not None:
        return other
    return lambda call: (other if weigh_now(call).name == "distinct" else one)(call)


def _composition_runner(call):
    if call.batch_invariant and torch.compiler.is_compiling():
        raise RuntimeError("batch_invariant: expected the kernels or no compiler, which orders PyTorch's sums as it likes")
    # PyTorch accepts any position for computed sines, and a module may add to positions before it looks them up.
    position = call.terms.position
    is_lenient = isinstance(position, Called) or position is not None and not position.is_floating_point()
    runner = _explained(compose)
    return _checked(runner) if is_lenient and call.terms.position_ids is not None and _must_check(call) else runner


def _kernel_runner(call, observed):
    """By the fused kernel; calls without gradients that are one launch, and nothing else, repeat that launch."""
    function = one_pass.hidden if call.projection is None else one_pass.front_end
    runner: Runner = partial(function, observed=observed)
    wants_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in call.values())
    if not observed and not wants_grad and is_compiled(call.terms.token) and one_pass.is_one_launch(call):
        runner = _Launch(1 if call.projection is None else 4)
    return _checked(runner) if _must_check(call) else runner


def _must_check(call):
    """Whether values of ids are looked at before the call: where that costs no synchronisation."""
    return call.id_policy == "raise" and can_read(call.terms.ids)


def _checked(runner):
    def checked(call):
        check_distinct(call.distinct, call.terms.ids)
        check_ranges(call)
        return runner(call)

    return checked


def _explained(runner):
    """PyTorch's operators look at every id on a CPU, but their messages lack what is wrong where."""

    def explained(call):
        try:
            return runner(call)
        except (IndexError, RuntimeError, TypeError):
            token = _token(call)
            check(call, autocast_dtype(token))
            check_ranges(call)
            if has_process_group() and is_dtensor(token) != is_dtensor(call.terms.ids):
                from .sharding import localise

                localise(Call(call.terms._replace(token=token)))  # says which of the two is no DTensor
            raise

    return explained


class _Launch:
    """Calls that are one launch of a compiled kernel: the first records it, the others make outputs and repeat it."""

    def __init__(self, outputs: int):
        self._outputs, self._repeat = outputs, None

    def __call__(self, call):
        call, launch = _dense(call), kernels("launch")
        words = report_of(call.terms.token.device, call.id_policy != "trust")
        inputs = (*FRONT_END.tensors(call), words)
        if self._repeat is not None:
            look(call.terms.token.device)
            with launch.on_device(call.terms.token):
                found = self._repeat(*inputs)
        else:
            with launch.recorded() as launches:
                outputs = one_pass.outputs(call)
            self._repeat = launch.replay(launches, inputs, outputs, self._outputs)
            found = outputs[: self._outputs]
        return found[0] if self._outputs == 1 else HiddenQKV(*found)


def _dense(call):
    """Ids and turns with their elements in order: kernels would copy them, and a launch that is repeated cannot."""
    terms, epilogue = call.terms, call.epilogue
    ids, position_ids, segment_ids, cos, sin, turn_ids = (
        x if x is None else x.contiguous()
        for x in (terms.ids, terms.position_ids, terms.segment_ids, epilogue.cos, epilogue.sin, epilogue.turn_ids)
    )
    return call._replace(
        terms=terms._replace(ids=ids, position_ids=position_ids, segment_ids=segment_ids),
        epilogue=epilogue._replace(cos=cos, sin=sin, turn_ids=turn_ids),
    )
