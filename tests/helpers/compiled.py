"""The compiled kernels' way without a device, over CPU tensors: Triton compiles for Hopper, the interpreter runs the launches.

It shows what the host does of itself: whether its memory of calls gives a kernel what Triton would, and what a call costs it.
"""

import contextlib
from unittest import mock

import aot
import triton
from pyembed.kernels import interpreter, launch, tuning
from triton.backends.compiler import GPUTarget

import pyembed
from pyembed import checks, functional, run
from pyembed.plans import operators


class Launcher:
    """Of a kernel compiled from src, called as Triton's launcher: with all arguments in order, constants too."""

    runs = True  # False: a launch does nothing

    def __init__(self, src, metadata):
        self.source = src

    def __call__(self, x, y, z, stream, handle, metadata, launch_metadata, enter, leave, *arguments):
        if not self.runs:
            return
        source, wanted = self.source, aot.Launch(self.source.fn, arguments, {})
        attributes = {path: attribute for path, attribute in source.attrs.items() if attribute}
        types, right = (str(signature).replace(" ", "") for signature in (source.signature, wanted.signature))
        assert types == right and (source.constants, attributes) == (wanted.constants, wanted.attributes), "another kernel"
        function = source.fn.fn
        kernel = getattr(interpreter.load(function.__module__.rpartition(".")[2]), function.__name__)
        with interpreter.running():
            kernel[(x, y, z)](*arguments)


class Driver:
    launcher_cls = Launcher

    class utils:
        load_binary = staticmethod(lambda *arguments: (1, 1, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": tuning.H100.shared_memory})

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


KINDS, RUNNERS = {}, {}  # what is remembered of launches and calls, from one context to the next


def count_runners():
    """How many signatures of calls are remembered."""
    return sum(len(kind.runners) for kind in run._kinds.values())


@contextlib.contextmanager
def compiled():
    """Within it, calls over CPU tensors take the way of those over CUDA tensors."""
    instead = [
        (triton.runtime.driver, "_active", Driver()),
        (tuning, "device_of", lambda tensor: tuning.H100),
        *((module, "is_compiled", lambda tensor: True) for module in (operators, run)),
        *((module, "can_read", lambda tensor: False) for module in (checks, functional, run)),
        (launch, "_kinds", KINDS),
        (run, "_kinds", RUNNERS),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in instead:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(pyembed.backend("triton"))
        yield
