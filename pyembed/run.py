"""run(call): checks, plans and runs a call; the one memory of calls.

The first call of a kind is checked, its plan is chosen and its kernels are compiled. Others of the same signature only run what
was found then, their runner: PyTorch's composition, a kernel launch, an operator with its gradients, or a choice between plans
where that depends on the ids. While a compiler, tracer, mode or profiler is at work, the operators run and nothing is kept.
"""

import itertools
import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import settings
from .call import LOOKUPS, NO_EPILOGUE, SCHEMA, Call, Called, DistinctIds, HiddenQKV
from .checks import check, check_distinct, check_ranges, compare_ranges
from .ids import apply_policy, look, report_of, write_out
from .modes import TENSORS, autocast_dtype, can_read, has_process_group, is_dtensor, is_recorded, unrecorded
from .plans import distinct, gathered, one_pass
from .plans.choice import NO_BF16, as_if_of_table, calls_modules, extended, settle, weigh_now, weigh_rows, why_composed
from .plans.operators import is_compiled, is_observed, is_profiled, is_strange, kernels
from .reference import compose, compose_hidden
from .rows import Extended

Runner = Callable[[Call], Any]
SIGNATURES = 4096  # that are kept: more than a training run has shapes
UNDER_ONE_KEY = 16  # of them, which are gone through one by one
NUMBERS = (bool, int, float, str)


_CALLED = frozenset((Called, Extended))


class _Kind:
    """Calls whose fields have the same classes: which fields are tensors, and what runs calls of the signatures seen so far."""

    def __init__(self, classes: tuple[type, ...]) -> None:
        self.tensors = _getter(classes, TENSORS)
        self.called = _getter(classes, _CALLED) if not _CALLED.isdisjoint(classes) else None
        self.numbers = _getter(classes, NUMBERS)
        # Under a key that is cheap to hash: guards, which compare the rest, and the runner.
        self.runners: dict[tuple[Any, ...], list[tuple[TensorGuards | _Repeated, GlobalStateGuard, Runner]]] = {}


_kinds: dict[tuple[type, ...], _Kind] = {}
_count = itertools.count()


def _getter(classes, wanted):
    """A function of values -> a tuple of those whose class is wanted."""
    places = [place for place, of in enumerate(classes) if of in wanted]
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


def run(call: Call) -> Any:
    """hidden (..., T, D) of a call without a projection, else HiddenQKV. Errors: those of checks.py, and of a forced plan."""
    if is_compiling():  # first, so that a compiler does not trace the rest
        return _run_first(call, None)
    terms, norm, projection, epilogue, policy, invariant, given, concat, kept = call
    values: tuple[Any, ...]
    if projection is None:
        values = terms
    elif epilogue is NO_EPILOGUE and given is None:
        values = terms + norm + projection
    elif given is None or type(given) is DistinctIds:
        values = terms + norm + projection + epilogue + (given or ())
    else:
        return _run_first(call, None)
    classes = tuple(map(type, values))
    kind = _kinds.get(classes)
    if kind is None:
        if not _KNOWN.issuperset(classes) or not _TABLES.issuperset(classes[:2]):  # ids and token
            return _run_first(call, None)
        kind = _kinds[classes] = _Kind(classes)
    tensors, current = kind.tensors(values), settings.current
    more: tuple[tuple[bool, bool], ...] | None = None
    if kind.called is not None:
        modules = kind.called(values)
        tensors += tuple([called.weight for called in modules if called.weight is not None])
        more = tuple([(called.weight is None, called.has_rows) for called in modules])
    # The second tensor is mostly the token table, of which a process may have many.
    try:
        shapes = terms.ids.shape, tensors[1].shape
    except RuntimeError:  # a nested tensor has none
        return _run_first(call, None)
    key: tuple[Any, ...] = (current, policy, invariant, concat, kept is None, shapes, kind.numbers(values), more)
    if current.backend == "triton" or not terms.ids.is_cpu:  # what kernels are compiled for, beside the guards
        try:
            key += (torch.backends.cuda.matmul.fp32_precision, *map(_alignment, tensors))
        except RuntimeError:  # a tensor without memory, as torch.autograd's own vmap has them
            return _run_first(call, None)
    for guard, state, runner in kind.runners.get(key, ()):
        if guard.check(*tensors) and state.check():
            # Modes change dispatch keys, which the guards compare; PyTorch's own operators see profilers and forward-mode AD.
            if runner is not compose and runner is not compose_hidden and _is_watched():
                break
            try:
                return runner(call)
            except (IndexError, RuntimeError, TypeError):
                _explain(call)
                raise
    return _run_first(call, (kind, key, tensors))


def _is_watched():
    """Whether something watches operators that the guards do not tell: a profiler, forward-mode AD, a selective checkpoint."""
    return is_profiled() or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


_TABLES = _CALLED.union(TENSORS)
_KNOWN = _TABLES.union((*NUMBERS, type(None)))


def _run_first(call, home):
    """A call of a new signature. home: its kind, key and tensors, where its runner is kept; None: it is not kept."""
    if is_observed():
        home = None
    if _is_distributed(call):
        from .sharding import localise  # which imports torch.distributed.tensor

        local, gather = localise(call)
        return gather(run(local))
    if is_recorded():
        with unrecorded():
            check(call)
            if call.id_policy == "raise":
                check_ranges(call)
        call = write_out(call)
    else:
        check(call)
    keeps = home is not None and all(type(tensor) in TENSORS and not is_strange(tensor) for tensor in home[2])
    runner = _runner_of(call, not keeps or not _has_schema_types(call))
    try:
        result = runner(call)
    except (IndexError, RuntimeError, TypeError):
        _explain(call)
        raise
    if keeps:
        kind, key, tensors = home
        if next(_count) % SIGNATURES == SIGNATURES - 1:
            for each in list(_kinds.values()):
                each.runners.clear()
        guard = _guard(tensors) if len(set(map(id, tensors))) == len(tensors) else _Repeated(tensors)
        runners = kind.runners.setdefault(key, [])
        runners.insert(0, (guard, GlobalStateGuard(), runner))
        del runners[UNDER_ONE_KEY:]
    return result


def _guard(tensors):
    """Ids may have any strides: those of `ids[:, -1:]` are others in every step of a decode."""
    strides: Any = [list(t.stride()) if t.is_floating_point() else [None] * t.dim() for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=strides)


class _Repeated:
    """Guards of tensors of which some stand in two places, as positions of a table and of a Rotary; PyTorch's refuse these."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        first: dict[int, int] = {}
        self._first = [first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors)]
        self._places = list(first.values())
        self._guard = _guard([tensors[place] for place in self._places])

    def check(self, *tensors: Tensor) -> bool:
        same = all(tensor is tensors[place] for tensor, place in zip(tensors, self._first, strict=True))
        return same and self._guard.check(*[tensors[place] for place in self._places])


def _alignment(tensor):
    """Address modulo 16, by which Triton specialises kernels; −1: ids that are not contiguous, which are copied first."""
    return tensor.data_ptr() % 16 if tensor.is_floating_point() or tensor.is_contiguous() else -1


def _token(call):
    token = call.terms.token
    return token.weight if isinstance(token, Called) else token


def _is_distributed(call):
    """Whether a field is a DTensor."""
    return has_process_group() and any(map(is_dtensor, call.values())) and not calls_modules(call)


def _runner_of(call, observed):
    """What runs calls like this one: by which plan, and by kernels or PyTorch's operators, is decided here.

    observed: whether to go through PyTorch's dispatcher, because a mode watches it."""
    if call.id_policy in ("clamp", "zero"):
        inner = _runner_of_plan(apply_policy(call), observed)

        def runner(call):
            return inner(apply_policy(call))

        return runner if call.distinct is None else _checked(runner, False)
    return _runner_of_plan(call, observed)


def _warn_once():
    """What was asked for by name does not run: the modules do, by themselves, which are right."""
    plan, backend = settings.current.plan, settings.current.backend
    asked = [f"pyembed.plan({plan!r})"] * (plan != "auto") + [f"pyembed.backend({backend!r})"] * (backend == "triton")
    if not asked or _warned or is_compiling():
        return
    _warned.append(asked)
    why = "PyTorch's operators run it, since it calls modules that do more than apply their weights: see explain(ids)"
    warnings.warn(f"{' and '.join(asked)} has no effect on this call: {why}", stacklevel=2)


_warned: list[Any] = []


def _runner_of_plan(call, observed):
    composed = why_composed(call)
    if extended(call) is not None:
        return _extended_runner(call, observed)
    if composed is not None and calls_modules(call):
        _warn_once()
    one = _kernel_runner(call, observed) if composed is None else _composition_runner(call)
    if call.projection is None or call.concat or calls_modules(call):
        return one
    plan = settle(call)
    if plan is not None and plan.name == "one_pass":
        return one
    other = partial(distinct.front_end, kernels=composed is None, observed=observed, grads=call.wants_grad())
    if call.distinct is not None or composed is None and _must_check(call):
        other = _checked(other, composed is None and _must_check(call))
    return other if plan is not None else _weighed(one, other)


def _weighed(one, other):
    """Of calls whose plan depends on the values of their ids."""
    return lambda call: (other if weigh_now(call).name == "distinct" else one)(call)


def _extended_runner(call, observed):
    """Of rows of two tables: by kernels, or the composition, over a table of all tokens' rows; or `distinct` over one of the
    rows in use."""
    kernels = why_composed(as_if_of_table(call)) is None
    ranges = kernels and _must_check(call)
    one = partial(_run_gathered, observed) if kernels else _composition_runner(call)
    if ranges or kernels and call.distinct is not None:
        one = _checked(one, ranges)
    plan = None if call.projection is None or call.concat else settle(call)
    if call.projection is None or call.concat or plan is not None and plan.name == "one_pass":
        return one
    if kernels:
        other = _checked(lambda call: gathered.front_end(call, call.terms.token, observed), ranges)
        return other if plan is not None else _weighed(one, other)

    def runner(call):
        compare_ranges(call)  # beyond the table's ids are those of other rows
        token = call.terms.token
        found = token.find(call)
        if plan is None and weigh_rows(call, token, found[0].numel()).name != "distinct":
            return one(call)
        small = token.small(call, found)
        return distinct.front_end(small, kernels=False, observed=observed, grads=small.wants_grad())

    return _checked(runner, False)


def _run_gathered(observed, call):
    terms = call.terms
    rows = gathered.rows_of(call, terms.token, observed)
    is_all = call.projection is None and terms.position is None and terms.segment is None and not terms.dropout
    return rows if is_all else run(gathered.over(call, rows))


def _composition_runner(call):
    if call.batch_invariant and (torch.compiler.is_compiling() or is_recorded()):
        raise RuntimeError(
            "batch_invariant: expected the kernels or no compiler, which orders PyTorch's sums as it likes, and no tracer"
        )
    # PyTorch accepts any position for computed sines, and a module may add to positions before it looks them up.
    position = call.terms.position
    is_lenient = isinstance(position, Called) or position is not None and not position.is_floating_point()
    must_check = is_lenient and call.terms.position_ids is not None and _must_check(call)
    composition = compose_hidden if call.projection is None else compose
    return _checked(composition, must_check) if must_check or call.distinct is not None else composition


def _kernel_runner(call, observed):
    """By the fused kernel; calls without gradients that are one launch, and nothing else, repeat that launch."""
    token, function = call.terms.token, one_pass.hidden if call.projection is None else one_pass.front_end
    if call.projection is not None and autocast_dtype(token) == torch.bfloat16 and not token.is_cuda:
        raise TypeError(f"autocast: {NO_BF16}")
    runner: Runner = partial(function, observed=observed)
    kernel = None if observed or call.wants_grad() else one_pass.kernel_of(call)
    if kernel is not None:
        outputs = 1 if call.projection is None else len(HiddenQKV._fields)
        runner = _Launch(kernel, outputs) if is_compiled(token) else _launched(kernel, outputs)
        if call.packed() is not call:
            runner = partial(_packed_first, runner)
    must_check = _must_check(call)
    return _checked(runner, must_check) if must_check or call.distinct is not None else runner


def _launched(kernel, outputs):
    if outputs == 1:
        return kernel
    return lambda call: HiddenQKV(*kernel(call)[:outputs])


def _packed_first(runner, call):
    """Packing is no part of the launch that is repeated."""
    return runner(call.packed())


def _must_check(call):
    """Whether values of ids are looked at before the call: where that costs no synchronisation."""
    return call.id_policy == "raise" and can_read(call.terms.ids)


def _checked(runner, ranges):
    """runner after checks of values: of given distinct ids, and of the ranges of ids."""

    def checked(call):
        if call.distinct is not None:
            check_distinct(call.distinct, call.terms.ids)
        if ranges:
            compare_ranges(call)
        return runner(call)

    return checked


def _explain(call):
    """After an error: PyTorch's message does not say which id is out of range, or which argument is wrong; our checks do."""
    token = _token(call)
    check(call)
    if not torch.compiler.is_compiling():
        check_ranges(call)
    if has_process_group() and is_dtensor(token) != is_dtensor(call.terms.ids):
        from .sharding import localise

        localise(Call(call.terms._replace(token=token)))  # says which of the two is no DTensor


def _has_schema_types(call):
    """Whether numbers are of the types that operators declare; else the dispatcher converts them, an int to a float."""
    return not any(
        kind.startswith("float") and type(value) not in (float, type(None))
        for kind, value in zip(SCHEMA.values(), call.values(), strict=True)
    )


class _Launch:
    """Calls that are one launch of a compiled kernel: the first records it, the others make outputs and repeat it."""

    def __init__(self, kernel: Runner, outputs: int):
        self._kernel, self._outputs, self._repeat, self._copies = kernel, outputs, None, True
        self._places: list[int] = []

    def __call__(self, call):
        launch, token = kernels("launch"), call.terms.token
        words = report_of(token.device, call.id_policy != "trust")
        if self._copies:
            call = _dense(given := call)
            self._copies = call is not given
        values = call.values()
        if self._repeat is not None:
            look(token.device)
            with launch.on_device(token):
                found = self._repeat(*[values[place] for place in self._places], words)
        else:
            self._places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
            with launch.recorded() as launches:
                outputs = self._kernel(call)
                outputs = (outputs,) if self._outputs == 1 else outputs
            inputs = (*(values[place] for place in self._places), words)
            self._repeat = launch.replay(launches, inputs, outputs, self._outputs)
            found = outputs[: self._outputs]
        return found[0] if self._outputs == 1 else HiddenQKV(*found)


def _dense(call):
    """The call with contiguous ids and rotary tables: kernels would copy others, and a repeated launch cannot."""
    fields = [(lookup.part, lookup.ids) for lookup in LOOKUPS] + [("epilogue", "cos"), ("epilogue", "sin")]
    for part, field in fields:
        of = getattr(call, part)
        tensor = getattr(of, field)
        if tensor is not None and not tensor.is_contiguous():
            call = call._replace(**{part: of._replace(**{field: tensor.contiguous()})})
    return call
