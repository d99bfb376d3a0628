"""Ahead-of-time compilation of exactly what the launchers launch, for GPUs that need not be there.

A launcher runs over meta tensors with `tuning` told which device it is on; each launch is recorded, turned into the
signature that Triton would specialise it to, and compiled for that device.
"""

import os
import re
import subprocess
import tempfile
from types import SimpleNamespace

import torch
import triton
from pyembed.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
}  # fmt: skip


def target(arch):
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


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

    def __init__(self, kernel, args, kwargs):
        names = [p.name for p in kernel.params]
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        self.kernel = kernel
        self.options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "maxnreg")}
        self.signature, self.constants, self.attributes = {}, {}, {}
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
        return kind

    def key(self):
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.kernel.__name__, *(str(part) for part in parts))

    def compile(self, arch):
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target(arch), options=self.options)


def record(monkeypatch, tuning, device, call):
    """The launches of call(), which runs over meta tensors as if on `device`."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "device_of", lambda tensor: device)
        patch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: None)))
        patch.setattr(launch, "_kinds", {})
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kw: launches.append(Launch(self, args, kw)))
        call()
    return launches


def report(compiled, arch):
    """Registers spilled, bytes of shared memory, and the tensor cores' instruction (None: none is there)."""
    if not isinstance(arch, int):
        assembly = compiled.asm["amdgcn"]
        spills = int(re.search(r"ScratchSize: (\d+)", assembly).group(1))  # scalars kept in vector lanes stay on chip
        instruction = re.search(r"v_mfma_\w+", assembly)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            run = {"capture_output": True, "text": True, "check": True}
            usage = subprocess.run([f"{BIN}/cuobjdump", "--dump-resource-usage", file.name], **run).stdout
            sass = subprocess.run([f"{BIN}/nvdisasm", "-c", file.name], **run).stdout
        spills = int(re.search(r"STACK:(\d+)", usage).group(1)) + len(re.findall(r"\bSTL\b|\bLDL\b", sass))
        instruction = re.search(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", sass)
    return {"spills": spills, "shared": compiled.metadata.shared, "instruction": instruction and instruction.group(0)}
