"""Operators over a Call's fields (torch.ops.pyembed.*): what compilers, exporters, profilers and DTensor see of a call.

Where nobody observes operators, the same functions are called without PyTorch's dispatcher, which takes 0.1 ms on the host for
some 30 arguments and 0.5 ms with gradients. CUDA tensors run the compiled kernels, CPU tensors the same kernels in Triton's
interpreter. Kernels are imported at the first call, so that `import pyembed` works where triton is missing.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad, profiler

import pyembed.tied as tied

from ..call import FRONT_END, LEARNED, SOURCES, Call, HiddenQKV
from ..ids import forget, look, report_of

Function = Callable[..., Any]
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # as torch.autograd.grad(is_grads_batched=True) has gradients


def is_profiled() -> bool:
    """Whether PyTorch's profiler is at work, in this thread or in all."""
    return profiler._is_profiler_enabled or _profiler_enabled()


def is_observed() -> bool:
    """Whether a compiler, tracer, dispatch mode, torch.func, forward-mode AD or profiler is at work, which see operators.

    A TorchFunctionMode, which torch.set_default_device is too, and a bare ExecutionTraceObserver are not asked."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or is_profiled()
    )


def is_strange(tensor: Tensor) -> bool:
    """Whether its memory does not hold its elements as they are, so that no kernel may read it."""
    return tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor() or _is_batched(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read it without the dispatcher: no subclass, which may bring operators of its own."""
    return type(tensor) in (Tensor, nn.Parameter) and not is_strange(tensor)


def is_compiled(tensor: Tensor) -> bool:
    """Whether kernels over this tensor are compiled, not interpreted."""
    return tensor.is_cuda


@functools.cache
def kernels(name: str) -> Any:
    """A module of pyembed.kernels."""
    return importlib.import_module(f"pyembed.kernels.{name}")


def launcher(name: str, tensor: Tensor) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """A module of pyembed.kernels for this tensor's device, and the context that its launches need. IndexError: the kernels
    that ran before met an id without a row; on a CPU, those of this call."""
    if is_compiled(tensor):
        look(tensor.device)
        return kernels(name), _without_autocast("cuda")
    return kernels("interpreter").load(name), _interpreting(tensor.device)


def launch(name: str, function: str, call: Call, *arguments: Any) -> Any:
    """function(call, *arguments, report) of a module of pyembed.kernels; of hidden alone, function(terms, report).

    report: where kernels note an absent row, and the length of sequences, by which it is named."""
    ids, token, *_ = call.terms
    words, shape = report_of(token.device, call.id_policy != "trust"), ids.shape
    module, running = launcher(name, token)
    with running:
        return getattr(module, function)(
            call if call.projection else call.terms, *arguments, (words, shape[-1] if shape else 1)
        )


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Products within an operator have the dtypes that it was given."""
    casts = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if casts else contextlib.nullcontext()


@contextlib.contextmanager
def _interpreting(device: torch.device) -> Iterator[None]:
    try:
        with kernels("interpreter").running(), _without_autocast(device.type):
            yield
    except BaseException:
        forget(device)
        raise
    look(device)


class Operator:
    """run(*arguments) as the operator pyembed::name, and as a plain call with the same gradients."""

    def __init__(self, name: str, schema: str, run: Function, fake: Function) -> None:
        """schema: arguments and results as PyTorch writes them. fake: empty results, for tensors without values."""
        self._definition = torch.library.custom_op(f"pyembed::{name}", mutates_args=(), schema=schema)(run)
        self._definition.register_fake(fake)
        self.op, self._run = getattr(torch.ops.pyembed, name).default, run
        self._function: Any = None  # the torch.autograd.Function of the plain call
        self.names = tuple(argument.name for argument in self.op._schema.arguments)

    def register_autograd(self, save: Function, backward: Function, table: str | None = None) -> None:
        """The same rules for the operator and for the plain call. save(ctx, inputs, output); backward(ctx, *gradients). table:
        the argument whose gradient the backward adds to that of a head, where into_of(ctx) says so."""
        self._definition.register_autograd(backward, setup_context=save)
        self._table = None if table is None else self.names.index(table)

        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = self._run(*inputs)
            save(ctx, inputs, outputs)
            ctx.waiting = None if self._table is None else tied.of(inputs[self._table])
            return outputs

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.op._schema.name.rpartition(":")[2], (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any, observed: bool | None = None) -> Any:
        """observed: whether the operator itself must run; None: it is found out, in a backward for example."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if observed is None:
            observed = is_observed() or not all(map(is_plain, tensors))
        if observed:
            return self.op(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            waiting = None if self._table is None else tied.before_lookup(arguments[self._table])
            outputs = self._function.apply(*arguments)
            del waiting  # it lived until the node had it
            return outputs
        return self._run(*arguments)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], results: Iterable[Tensor] = ()) -> None:
    """Keeps an operator's inputs, and those of its results that its backward needs."""
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs), *results)


def saved_inputs(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """-> inputs and results that save_inputs kept."""
    saved = ctx.saved_tensors
    tensors, results = saved[: len(ctx.numbers)], saved[len(ctx.numbers) :]
    return [n if t is None else t for t, n in zip(tensors, ctx.numbers, strict=True)], list(results)


def into_of(ctx: Any) -> Tensor | None:
    """Where a plain call's backward is to add the gradient of its table, and return None for it; None: nowhere."""
    return tied.buffer(getattr(ctx, "waiting", None))


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    """The backward of a backward that has none."""
    raise RuntimeError(
        "pyembed has no gradients of gradients by this plan: run the forward within pyembed.backend('torch') and "
        "pyembed.plan('one_pass')"
    )


def refuse_tangents(*grads: Tensor | None) -> None:
    """RuntimeError: of a graph made before forward-mode AD began the operators would lose tangents silently."""
    tangents = (forward_ad.unpack_dual(grad).tangent for grad in grads if grad is not None)
    if forward_ad._current_level >= 0 and any(tangent is not None for tangent in tangents):
        raise RuntimeError(
            "pyembed's backward has no forward mode: run the forward within it too, or within pyembed.backend('torch')"
        )


# What a backward does not read: its values are not kept, and the user may change them meanwhile.
UNSAVED = ("bias", "key_bias", "value_bias", "query_bias", "query_offset", "query_norm", "key_norm")
PACKED = {"query_bias": "bias"} | {f"{of}_{name}": name for of in ("key", "value") for name in ("weight", "bias")}


def empty_grad(call: Call, name: str, needed: bool) -> Tensor:
    """A gradient of a learned field, or an empty tensor where it is not needed: an operator returns tensors only."""
    assert call.projection is not None
    fields, (query, key, value) = call.named(), (heads * call.head_dim for heads in call.projection.groups)
    if name in UNSAVED:
        sizes = {"bias": query if call.projection.own else query + key + value, "key_bias": key, "value_bias": value}
        return call.projection.weight.new_empty(sizes.get(name, query) if needed else 0)
    like = call.terms.token if fields[name] is None else fields[name]
    return like.new_empty(like.shape if needed else 0)


def result_types(names: tuple[str, ...]) -> str:
    return ", ".join(["Tensor"] * len(names))


class FrontEnd:
    """A plan's two operators: pyembed::name, over a Call's fields and the plan's own options, and its backward.

    options: the schema of the plan's own arguments, if any; results: what the forward returns behind hidden, query, key and
    value, for the backward alone. forward(call, *options) -> all of these. backward(call, gradients of the four, results,
    options, needs: names in LEARNED, into) -> {name: gradient}, without that of the token table where that is added to into
    (V, D). empty(call, *options): the forward's results without values. All three are given calls of one packed weight and
    bias; the operators, whose gradients are those of each weight, any.
    """

    def __init__(self, name: str, options: str, results: str, forward: Function, backward: Function, empty: Function) -> None:
        self._forward, self._backward, self._empty = forward, backward, empty
        kept, arguments = results.split(), ", ".join(filter(None, (FRONT_END.schema, options)))
        self.outputs = (*HiddenQKV._fields, *kept)
        self.forward = Operator(name, f"({arguments}) -> ({result_types(self.outputs)})", self._run_forward, self._fake_forward)
        inputs = [*(f"Tensor? grad_{output}" for output in HiddenQKV._fields), *(f"Tensor {result}" for result in kept)]
        schema = f"({', '.join(inputs)}, {arguments}, bool[] needs) -> ({result_types(LEARNED)})"
        self.backward = Operator(f"{name}_backward", schema, self._run_backward, self._fake_backward)
        self._places = [[[*map(self.forward.names.index, names)] for names in sources] for sources in SOURCES]
        self.forward.register_autograd(self._save, self._differentiate, "token")
        self.backward.register_autograd(lambda ctx, inputs, output: None, refuse_double_backward)

    def __call__(self, call: Call, *options: Any, observed: bool, grads: bool = True) -> tuple[Tensor, ...]:
        """The forward of a call. grads: whether a gradient may be wanted."""
        if observed or grads:
            return self.forward(*FRONT_END.flatten(call), *options, observed=observed)
        return self.without_gradients(call, *options)

    def without_gradients(self, call: Call, *options: Any) -> tuple[Tensor, ...]:
        """The forward of a call, without the operator."""
        return self._forward(call.packed(), *options)

    def _call(self, arguments: Any) -> tuple[Call, Any]:
        fields = len(FRONT_END.names)
        return FRONT_END.rebuild(arguments[:fields]), arguments[fields:]

    def _run_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._call(arguments)
        return self.without_gradients(call, *options)

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._call(arguments)
        return self._empty(call.packed(), *options)

    def _parts(self, arguments: Any) -> tuple[Any, Any, Call, Any, dict[str, bool]]:
        """Of the backward's arguments: gradients, results, the call, options, and {name: whether its gradient is needed}."""
        *arguments, needs = arguments
        first, second = len(HiddenQKV._fields), len(self.outputs)
        call, options = self._call(tuple(arguments[second:]))
        return arguments[:first], arguments[first:second], call, options, dict(zip(LEARNED, needs, strict=True))

    def _run_backward(self, *arguments: Any, into: Tensor | None = None) -> tuple[Tensor, ...]:
        grads, results, call, options, needs = self._parts(arguments)
        wanted = {name for name, needed in needs.items() if needed}
        packed = {PACKED.get(name, name) for name in wanted}
        found = call.unpacked(self._backward(call.packed(), grads, results, options, packed, into), wanted)
        if into is not None:
            needs["token"] = False
        return tuple(
            found[name] if needed and found.get(name) is not None else empty_grad(call, name, needed).zero_()
            for name, needed in needs.items()
        )

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, _, call, _, needs = self._parts(arguments)
        return tuple(empty_grad(call, name, needed) for name, needed in needs.items())

    def _save(self, ctx: Any, inputs: Any, output: Any) -> None:
        outputs, results = output[: len(HiddenQKV._fields)], output[len(HiddenQKV._fields) :]
        ctx.set_materialize_grads(False)
        named = dict(zip(self.forward.names, inputs, strict=True))
        ctx.has_head_norm, ctx.sources = named["query_norm"] is not None, SOURCES[named["key_weight"] is not None]
        wanted, places = ctx.needs_input_grad, self._places[named["key_weight"] is not None]
        constant = (x for x, inputs in zip(outputs, places, strict=True) if not any([wanted[place] for place in inputs]))
        ctx.mark_non_differentiable(*results, *constant)
        save_inputs(ctx, tuple((named | dict.fromkeys(UNSAVED)).values()), results)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_tangents(*grads)
        if ctx.has_head_norm:
            raise RuntimeError("pyembed::embed_qkv has no gradient of normalised heads: pyembed.functional.embed_qkv has")
        wanted = dict(zip(self.forward.names, ctx.needs_input_grad, strict=True))
        outputs = grads[: len(HiddenQKV._fields)]
        if all(grad is None for grad in outputs):
            return (None,) * len(wanted)
        # What the given gradients reach: that of hidden alone only the tables, that of query alone no weight of a key's own.
        reached = {name for grad, names in zip(outputs, ctx.sources, strict=True) if grad is not None for name in names}
        needs = [wanted[name] and name in reached for name in LEARNED]
        inputs, results = saved_inputs(ctx)
        needed, into = dict(zip(LEARNED, needs, strict=True)), None
        if needed["token"]:
            into = into_of(ctx)
        run = self.backward if into is None else partial(self._run_backward, into=into)
        found = dict(zip(LEARNED, run(*outputs, *results, *inputs, needs), strict=True))
        needed["token"] &= into is None
        return tuple(found[name] if needed.get(name) else None for name in wanted)
