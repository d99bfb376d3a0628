"""What kernels that were compiled ahead of time (pyembed.ahead) take of their device, and what is wrong with them."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import machine_code
import triton

from pyembed import ahead
from pyembed.ahead import DTYPES, Launch

__all__ = ["BIN", "DTYPES", "Launch", "Report", "faults", "record", "report", "resources"]
BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def record(_monkeypatch, _tuning, device, call):
    """pyembed.ahead.record, as the tests call it."""
    return ahead.record(device, call)


class Report(NamedTuple):
    """What a compiled kernel takes of its device, and what its machine code does."""

    threads: int
    registers: int  # of a thread, as they are handed out
    spills: int  # bytes of a thread's stack, on which ptxas and LLVM put registers and nothing else here
    shared: int  # bytes
    instruction: str | None  # the first of the matrix units'
    warnings: list[str]  # of ptxas
    loops: list[machine_code.Loop]  # that have matrix instructions


def report(compiled, device):
    """The Report of a kernel that was compiled for this device."""
    threads, shared = compiled.metadata.num_warps * device.lanes, compiled.metadata.shared
    if isinstance(device.arch, int):
        registers, spills, text, warnings = _of_cubin(compiled, device.arch)
        blocks = machine_code.sass(text)
    else:
        text, warnings = compiled.asm["amdgcn"], []
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])
        spills = int(re.search(r"ScratchSize: (\d+)", text)[1])  # scalars kept in vector lanes stay on chip
        blocks = machine_code.amdgcn(text)
    instructions = (each.name for block in blocks for each in block.instructions if machine_code.MATRIX.match(each.name))
    handed_out = -(-registers // 8) * 8
    return Report(threads, handed_out, spills, shared, next(instructions, None), warnings, machine_code.loops(blocks))


def faults(found, device, aligned=True, widest=16):
    """{what is wrong with a compiled kernel on this device: where it shows}, empty where nothing is.

    aligned: rows start at multiples of 16 bytes, so that a thread can read and write as much at once, and copy it.
    widest: bytes that a thread can read at once, where an operand's tile has no 16 for each.
    """
    wrong = {}
    if found.registers * found.threads > device.registers:
        wrong["registers"] = f"{found.threads} threads of {found.registers} share {device.registers}"
    if found.shared > device.shared_memory:
        wrong["shared memory"] = f"{found.shared} of {device.shared_memory} bytes"
    if found.spills:
        wrong["spills"] = f"{found.spills} bytes"
    if found.warnings:
        wrong["serialised products"] = found.warnings[0]
    through_registers = not isinstance(device.arch, int)  # as loads on AMD pass them; but they should be wide
    for loop in found.loops:
        narrow = [each for each in loop.body if (machine_code.width(each) or 4) < 4]
        vectors = 0 if loop.innermost else 2  # after the products: a bias and a norm, of which a thread may have one element
        if aligned and len(narrow) > (vectors if all(map(machine_code.is_load, narrow)) else 0):
            wrong["narrow access"] = f"{len(narrow)} of {len(loop.body)} instructions, as {' '.join(narrow[0][:2])}"
        if not loop.innermost:
            continue
        loads = [each for each in loop.body if machine_code.is_load(each)]
        pieces = [each for each in loads if not through_registers or machine_code.width(each) < widest]
        if 2 * len(pieces) > len(loads) * through_registers and aligned:  # those of the norm are small, and few
            wrong["synchronous loads"] = f"{len(pieces)} of {len(loop.body)} instructions, as {' '.join(pieces[0][:2])}"
        copies = [machine_code.width(each) or 16 for each in loop.body if machine_code.is_copy(each)]
        small = [size for size in copies if size < 16]
        if 2 * len(small) > len(copies) and aligned:
            wrong["narrow copies"] = f"{len(small)} of {len(copies)} copies are of {min(small)} bytes"
        if aligned and not machine_code.matrix_overlaps(loop):
            wrong["nothing in flight"] = f"{len(loop.matrix())} products in a loop of {len(loop.body)} instructions"
    return wrong


def _run(tool, *arguments):
    return subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def resources(compiled):
    """(registers of a thread as they are handed out, blocks of SASS with what its encoding says) of a kernel for NVIDIA."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernel.cubin"
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = _run(f"{BIN}/cuobjdump", "--dump-resource-usage", cubin)
        text = _run(f"{BIN}/nvdisasm", "-c", "-ndf", "-hex", cubin)
    return -(-int(re.search(r"REG:(\d+)", usage)[1]) // 8) * 8, machine_code.sass(text)


def _of_cubin(compiled, arch):
    """Registers, bytes of stack, SASS where there may be matrix instructions (nvdisasm takes 0.3 s), and ptxas' warnings, for
    which it runs again where there is a wgmma to warn of."""
    ptx, text, warnings = compiled.asm["ptx"], "", []
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernel.cubin"
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = _run(f"{BIN}/cuobjdump", "--dump-resource-usage", cubin)
        if re.search(r"mma[._]", ptx):
            text = _run(f"{BIN}/nvdisasm", "-c", "-ndf", cubin)
        if "wgmma" in ptx:
            Path(f"{folder}/kernel.ptx").write_text(ptx)
            told = _run(f"{BIN}/ptxas", f"--gpu-name=sm_{arch}a", f"{folder}/kernel.ptx", "-o", cubin)
            warnings = re.findall(r".*Performance Loss.*", told)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, text, warnings
