"""Proofs of what a module computes: the functions of trials.py try it, and a finding is kept with all that it depends on.

A finding holds while the module's class, the functions and plain values of its classes, its attributes, and the names and
dtypes of its weights are those of the trial. Not seen: other state of the process that a forward reads. What is not proved is
called as it is.
"""

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .trials import OWN

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


class Proof:
    """A finding, and what it depends on. finding: None where nothing could be proved."""

    def __init__(self, module: nn.Module, finding: Any) -> None:
        self.finding, self._kind = finding, type(module)
        self._code = _code_of(type(module))
        self._names = [name for name, value in module.__dict__.items() if name not in OWN and _is_plain(value)]
        self._size = len(module.__dict__)
        self._values = [module.__dict__[name] for name in self._names]
        self._weights = [(name, None if p is None else p.dtype) for name, p in module._parameters.items()]
        self._others = len(module._buffers), len(module._modules)

    def holds(self, module: nn.Module) -> bool:
        """Whether module still is as it was when the proof was made."""
        state, parameters = module.__dict__, module._parameters
        if type(module) is not self._kind or len(state) != self._size or len(parameters) != len(self._weights):
            return False
        for name, value in zip(self._names, self._values, strict=True):
            now = state.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for name, dtype in self._weights:
            weight = parameters.get(name)
            if (None if weight is None else weight.dtype) != dtype:
                return False
        for kind, name, function in self._code:
            if getattr(kind, name, None) is not function:
                return False
        return (len(module._buffers), len(module._modules)) == self._others


def _code_of(kind: type) -> list[tuple[type, str, Any]]:
    """(class, name, value) of what a forward may use: functions and plain values of its classes, and PyTorch's forward."""
    found = dict[tuple[type, str], Any]()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        own = not base.__module__.startswith("torch.nn.modules.")
        for name, value in vars(base).items():
            is_code = isinstance(value, FunctionType | property) or not isinstance(value, str) and _is_plain(value)
            if name == "forward" or own and not name.startswith("__") and is_code:
                for where in (base, kind):  # what super() finds, and what the module's own lookup finds
                    found[where, name] = getattr(where, name)
    return [(*key, value) for key, value in found.items()]


def prove(function: Callable[[nn.Module], Any], module: nn.Module) -> Proof | None:
    """A Proof by one of the functions of trials.py, of the forward of the module's class; None: it cannot be tried now.

    It is tried in a thread of its own, where no mode, tracer, autocast or hook of the caller's is at work."""
    if torch.compiler.is_compiling() or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    is_alone = not module._modules or is_parametrized(module) and len(module._modules) == 1
    is_simple = all(name in OWN or _is_plain(value) or isinstance(value, Tensor) for name, value in module.__dict__.items())
    if not is_alone or not (is_simple or is_patched(module)):
        return Proof(module, None)
    found: list[Any] = []

    def attempt() -> None:
        devices = {p.device for p in module.parameters() if p.is_cuda}
        with torch.random.fork_rng([device.index for device in devices]), torch.cuda.device(next(iter(devices), -1)):
            try:
                found.append(function(module))
            except torch.OutOfMemoryError:
                pass
            except Exception:  # whatever it takes, it is something else
                found.append(None)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return Proof(module, found[0]) if found else None


def is_patched(module: nn.Module) -> bool:
    """Whether more than its class's forward runs, hooks aside."""
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl:
        return True
    if torch.compiler.is_compiling():
        module.forward  # noqa: B018  a compiler guards this lookup, not the question below
    return "forward" in module.__dict__


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or type(value) is tuple and all(map(_is_plain, value))
