"""Launch kernels with little host time, which dominates small calls such as a decode step.

The first launch of a signature is compiled by Triton; later ones run the compiled kernel without Triton's look at their
arguments. A whole call that is one launch can be turned into a function of its tensors: see recorded and replay.
"""

import contextlib
import functools
import threading

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

KINDS = 1024  # compiled launches to keep, some 20 KB each; a change of Triton's knobs does not reach those that are kept
_kinds: dict = {}  # (compiled kernel, its trailing arguments) by the launch's signature
_recording = threading.local()


def launch(kernel, grid):
    """kernel[grid], but an earlier launch's compiled kernel is run where Triton would compile the same.

    grid: up to three sizes. What is returned takes the kernel's arguments in order, then as keyword arguments the kernel's last
    parameters and the options of the launch.
    """
    return functools.partial(_launch, kernel, grid)


def _launch(kernel, grid, *args, **constants):
    if torch.version.hip or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        kernel[grid](*args, **constants)  # on HIP Triton also specialises by the sizes of allocations
        _record(None)
        return
    signature = [kernel.fn, driver.active.get_current_device(), tuple(constants), *constants.values()]
    _append_types(signature, args)
    signature = tuple(signature)
    compiled, rest = _kinds.get(signature, (None, None))
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
    else:
        compiled = kernel[grid](*args, **constants)
        rest = [constants[name] for name in kernel.arg_names[len(args) :]]
        remember(_kinds, signature, (compiled, rest))
    _record(None if compiled is None else (compiled, (*grid, 1, 1)[:3], (*args, *rest)))


def remember(memory, key, value):
    """memory[key] = value; a dictionary that is full is emptied first."""
    if len(memory) >= KINDS:
        memory.clear()
    memory[key] = value


def _record(launched):
    launches = getattr(_recording, "launches", None)
    if launches is not None:
        launches.append(launched)


@contextlib.contextmanager
def recorded():
    """Within it, the launches of this thread are added to the list that it gives, for replay."""
    _recording.launches = []
    try:
        yield _recording.launches
    finally:
        _recording.launches = None


def replay(launches, inputs, outputs, count):
    """A function of a call's inputs that repeats its launch and returns the first `count` of its outputs, newly allocated.

    launches: of recorded(). inputs, outputs: of that call; other inputs must equal them in all but their elements (shapes,
    strides, dtypes, devices, alignment). None: the call was no single launch of its inputs and outputs alone, for example
    because a tensor had to be copied first.
    """
    if len(launches) != 1 or launches[0] is None or not all(x.is_contiguous() for x in outputs):
        return None
    (compiled, grid, arguments), given = launches[0], [x for x in inputs if x is not None]
    names = {id(x): f"input{place}" for place, x in enumerate(inputs) if x is not None}
    if len(names) < len(given):  # the same tensor twice: another call may have two different ones
        return None
    names |= {id(x): f"output{place}" for place, x in enumerate(outputs)}
    constants = {"launch": compiled[grid]}

    def source(argument):
        if isinstance(argument, tuple):
            return "(" + "".join(f"{source(part)}, " for part in argument) + ")"
        if isinstance(argument, torch.Tensor | TensorDescriptor):
            return names[id(argument)]
        name = f"constant{len(constants)}"
        constants[name] = argument
        return name

    try:
        call = f"    launch{source(arguments)}\n"
    except KeyError:
        return None
    lines = [f"def run({', '.join(f'input{place}' for place in range(len(inputs)))}):\n"]
    like = next(x for x in given if (x.dtype, x.device) == (outputs[0].dtype, outputs[0].device))
    for place, x in enumerate(outputs):
        if f"output{place}," in call or place < count:
            dtype = "" if x.dtype == like.dtype else f", dtype=dtype{place}"
            constants[f"dtype{place}"] = x.dtype
            lines.append(f"    output{place} = {names[id(like)]}.new_empty({', '.join(map(str, x.shape))}{dtype})\n")
    lines += [call, f"    return {''.join(f'output{place}, ' for place in range(count))}\n"]
    exec("".join(lines), constants)
    return constants["run"]


def _append_types(signature, arguments):
    """Append what Triton compiles a kernel for: types and alignment; of integers the whole value."""
    append = signature.append
    for argument in arguments:
        kind = type(argument)
        if kind is int or argument is None:
            append(argument)
        elif kind is tuple:
            append((tuple, len(argument)))
            _append_types(signature, argument)
        elif isinstance(argument, torch.Tensor):
            append(argument.dtype)
            append(argument.data_ptr() % 16)
        elif kind is TensorDescriptor:
            append((argument.base.dtype, *argument.block_shape))
        else:
            append(kind if isinstance(argument, float) else (kind, argument))


def on_device(tensor):
    """Makes the tensor's device the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
