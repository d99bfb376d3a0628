"""Ahead-of-time compilation of exactly what the launchers launch, for GPUs that need not be there.

A launcher runs over meta tensors with `tuning` told which device it is on; each launch is recorded, turned into the
signature that Triton would specialise it to, and compiled for that device.
"""

from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .kernels import launch, tuning

DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
}  # fmt: skip


def target(device):
    return GPUTarget("cuda" if isinstance(device.arch, int) else "hip", device.arch, device.lanes)


def _typed(argument):
    """(type, constant, divisible by 16) as Triton specialises an argument."""
    if isinstance(argument, torch.Tensor):
        return f"*{DTYPES[argument.dtype]}", None, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{DTYPES[argument.base.dtype]}{argument.block_shape}>".replace(" ", ""), None, False
    if argument is None or argument == 1 and isinstance(argument, int):
        return "constexpr", argument, False
    if isinstance(argument, int):
        return "i32" if abs(argument) < 2**31 else "i64", None, argument % 16 == 0
    return "fp32", None, False


class Launch:
    """One launch: a kernel with its specialised signature, compile-time constants and options; hashable."""

    def __init__(self, kernel, args, kwargs, grid=()):
        names = [p.name for p in kernel.params]
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        self.kernel, self.grid, self.values = kernel, grid, bound
        self.options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "maxnreg")}
        self.signature, self.constants, self.attributes = {}, {}, {}
        self.small = []  # tensors of less than 2 GB, whose elements AMD's buffer instructions reach
        for index, parameter in enumerate(kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                self.signature[parameter.name], self.constants[(index,)] = "constexpr", value
                continue
            self.signature[parameter.name] = self._specialise(value, (index,))

    def _specialise(self, value, path):
        if isinstance(value, tuple):
            return tuple(self._specialise(item, (*path, place)) for place, item in enumerate(value))
        kind, constant, divisible = _typed(value)
        if kind == "constexpr":
            self.constants[path] = constant
        elif divisible:
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor) and value.untyped_storage().size() < 2**31:
            self.small.append(path)
        return kind

    def _attributes(self, device):
        if isinstance(device.arch, int):
            return self.attributes
        return self.attributes | {path: [*self.attributes.get(path, []), ["tt.pointer_range", 32]] for path in self.small}

    def key(self, device):
        parts = (self.signature, self.constants, self._attributes(device), self.options)
        return (device.arch, self.kernel.__name__, *(str(part) for part in parts))

    def constant(self, name):
        """The value of a compile-time constant; None: the kernel has no such parameter."""
        return next((self.constants.get((i,)) for i, each in enumerate(self.kernel.params) if each.name == name), None)

    def compile(self, device):
        source = ASTSource(self.kernel, self.signature, self.constants, self._attributes(device))
        return triton.compile(source, target=target(device), options=self.options)


def record(device, call):
    """The launches of call(), which runs over meta tensors as if on `device`. One thread at a time."""
    launches = []

    def run(self, *args, grid, warmup, **options):
        launches.append(Launch(self, args, options, grid))

    no_driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: None))
    with (
        mock.patch.object(tuning, "device_of", lambda tensor: device),
        mock.patch.multiple(launch, driver=no_driver, _kinds={}),
        mock.patch.object(JITFunction, "run", run),
    ):
        call()
    return launches
