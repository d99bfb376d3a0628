"""Launches, whose host time is a decode step's: of the first of a kind alone Triton looks at the arguments.

A call that is one launch can be had as a function of its tensors, for calls that differ in nothing else: see replay.
"""

import contextlib
import functools
import threading

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

KINDS = 1024  # that are remembered, some 20 KB each; Triton's knobs count as they are at the first of a kind
_kinds = {}
_recording = threading.local()


def launch(kernel, grid):
    """kernel[grid], whose call runs what Triton compiled for a call before that it could not tell from this one.

    grid: up to three sizes. Keyword arguments of the call: the kernel's last parameters, and options of the launch.
    """
    return functools.partial(_launch, kernel, grid)


def _launch(kernel, grid, *args, **constants):
    if torch.version.hip or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        kernel[grid](*args, **constants)  # HIP looks at the sizes of whole allocations too
        _record(None)
        return
    kind = [kernel.fn, driver.active.get_current_device(), tuple(constants), *constants.values()]
    _tell(kind, args)
    kind = tuple(kind)
    compiled, rest = _kinds.get(kind, (None, None))
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
    else:
        compiled = kernel[grid](*args, **constants)
        rest = [constants[name] for name in kernel.arg_names[len(args) :]]
        remember(_kinds, kind, (compiled, rest))
    _record(None if compiled is None else (compiled, (*grid, 1, 1)[:3], (*args, *rest)))


def remember(memory, key, value):
    """In a dictionary that does not grow for ever."""
    if len(memory) >= KINDS:
        memory.clear()
    memory[key] = value


def _record(launched):
    launches = getattr(_recording, "launches", None)
    if launches is not None:
        launches.append(launched)


@contextlib.contextmanager
def recorded():
    """The list of what this thread launches within, for replay."""
    _recording.launches = []
    try:
        yield _recording.launches
    finally:
        _recording.launches = None


def replay(launches, inputs, outputs, count):
    """A function of other inputs, which Triton and the launcher would not tell from these -> the first `count` outputs anew.

    None: the call was more than one launch of its inputs and outputs, as where a Tensor had to be copied first.
    """
    if len(launches) != 1 or launches[0] is None or not all(x.is_contiguous() for x in outputs):
        return None
    (compiled, grid, arguments), given = launches[0], [x for x in inputs if x is not None]
    names = {id(x): f"input{place}" for place, x in enumerate(inputs) if x is not None}
    if len(names) < len(given):  # one Tensor in two places, which another call may have two for
        return None
    names |= {id(x): f"output{place}" for place, x in enumerate(outputs)}
    constants = {"launch": compiled[grid]}

    def write(argument):
        if isinstance(argument, tuple):
            return "(" + "".join(f"{write(part)}, " for part in argument) + ")"
        if isinstance(argument, torch.Tensor | TensorDescriptor):
            return names[id(argument)]
        name = f"constant{len(constants)}"
        constants[name] = argument
        return name

    try:
        call = f"    launch{write(arguments)}\n"
    except KeyError:
        return None
    lines = [f"def run({', '.join(f'input{place}' for place in range(len(inputs)))}):\n"]
    for place, x in enumerate(outputs):
        if f"output{place}," in call or place < count:
            dtype = "" if x.dtype == given[1].dtype else f", dtype=dtype{place}"
            constants[f"dtype{place}"] = x.dtype
            lines.append(f"    output{place} = input1.new_empty({', '.join(map(str, x.shape))}{dtype})\n")
    lines += [call, f"    return {''.join(f'output{place}, ' for place in range(count))}\n"]
    exec("".join(lines), constants)
    return constants["run"]


def _tell(kind, arguments):
    """Appends what Triton compiles arguments for, and more of integers: their values."""
    append = kind.append
    for argument in arguments:
        of = type(argument)
        if of is int or argument is None:
            append(argument)
        elif of is tuple:
            append((tuple, len(argument)))
            _tell(kind, argument)
        elif isinstance(argument, torch.Tensor):
            append(argument.dtype)
            append(argument.data_ptr() % 16)
        elif of is TensorDescriptor:
            append((argument.base.dtype, *argument.block_shape))
        else:
            append(of if isinstance(argument, float) else (of, argument))


def on_device(tensor):
    """Triton launches on the current device: make the tensor's device current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
