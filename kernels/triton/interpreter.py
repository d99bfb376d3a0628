"""Run the kernels in Triton's interpreter, on CPU tensors, in a process that may also compile them.

triton.jit decides when it decorates whether a function is compiled or interpreted, so the kernels are imported a second time
with the interpreter switched on. Triton's library functions (tl.sum and so on) are replaced for the time of a launch.
"""

import contextlib
import functools
import importlib
import sys
import threading
import types
from pathlib import Path

import triton
import triton.experimental.gluon
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

for _file in Path(__file__).parent.glob("[!_]*.py"):  # what another thread imports while the interpreter is on is interpreted
    importlib.import_module(f"{__package__}.{_file.stem}")
_lock = threading.RLock()  # the interpreter's state is global
_interpreted = functools.cache(lambda function: InterpretedFunction(function))


@functools.cache
def load(name):
    """This package's module of that name, with its kernels interpreted."""
    package = f"{__package__}.interpreted"
    with _lock, triton.knobs.runtime.scope():
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(Path(__file__).parent)]
        triton.knobs.runtime.interpret = True
        return importlib.import_module(f"{package}.{name}")


# The interpreter patches these for a launch, and fails to restore them where one library function calls another.
_PATCHED = (tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)


@contextlib.contextmanager
def running():
    """Within it, interpreted kernels may call the jitted functions of triton.language; one thread at a time."""
    with _lock, triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        before = [(owner, dict(vars(owner))) for owner in _PATCHED]
        try:
            for owner in (tl, tl.standard, tl.random):
                for name, member in dict(vars(owner)).items():
                    if isinstance(member, JITFunction):
                        setattr(owner, name, _interpreted(member.fn))
            yield
        finally:
            for owner, members in before:
                for name, member in members.items():
                    if vars(owner).get(name) is not member:
                        setattr(owner, name, member)
