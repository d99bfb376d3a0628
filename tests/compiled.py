"""The compiled kernels' way without a device: what Triton compiles for Hopper is launched in the interpreter, over CPU tensors.

It sees what a launch is given: whether the host's memory of calls gives a kernel what Triton itself would.
"""

import pytest
import triton
from pyembed.kernels import interpreter, launch, tuning
from triton.backends.compiler import GPUTarget

import pyembed
from pyembed import ops, planner, replays


class Launcher:
    """Of a kernel compiled from src, as Triton's launcher is called: all of its arguments in order, constants too."""

    def __init__(self, src, metadata):
        self.function = src.fn.fn

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        kernel = getattr(interpreter.load(self.function.__module__.rpartition(".")[2]), self.function.__name__)
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


@pytest.fixture
def compiled(monkeypatch):
    """Within it, calls over CPU tensors take the way of those over CUDA tensors, and nothing is remembered before or after."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(tuning, "device_of", lambda tensor: tuning.H100)
    monkeypatch.setattr(ops, "is_compiled", lambda tensor: True)
    monkeypatch.setattr(planner, "looks", lambda tensor: False)
    monkeypatch.setattr(launch, "_kinds", {})
    monkeypatch.setattr(replays, "_replays", {})
    with pyembed.backend("triton"):
        yield
