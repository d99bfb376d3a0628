"""Machine code of the kernels that only stream: rows come 16 bytes at a time, ahead of their use, and threads seldom wait."""

import re
import subprocess

import pytest
import torch
from conftest import full

pytest.importorskip("triton")
import machine_code
from aot import BIN, record
from every_call import FOLDED, backward, distinct_rows, front_end, gathered, turned
from pyembed.kernels import tuning

HALF = torch.bfloat16
BACKWARD, MANY = (backward, HALF, 4097, 2048, "layer", True), (distinct_rows, HALF, 4098, 768, 2304, "layer", True)
TURNED, PLAIN = (turned, HALF, 4097, 64, False), (front_end, HALF, FOLDED, 768, 2304, "layer", True, False)


def compiled(monkeypatch, arch, kernel, function, *arguments):
    """The first launch of this kernel in a call, compiled for a device."""
    device = tuning.DEVICES[arch]
    launches = record(monkeypatch, tuning, device, lambda: function(*arguments))
    return next(launch for launch in launches if launch.kernel.__name__ == kernel).compile(device)


def sass(kernel, folder):
    """Basic blocks of a kernel compiled for an NVIDIA GPU."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [f"{BIN}/nvdisasm", "-c", "-ndf", str(folder / "kernel.cubin")]
    return machine_code.sass(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "kernel, barriers, call",  # of a step of a loop that reads rows
    [
        ("turn_back_kernel", 0, TURNED),
        ("expand_kernel", 2, TURNED),
        full("segment_kernel", 2, BACKWARD),
        full("norm_backward_kernel", 4, BACKWARD),
        full("qkv_kernel", 3, MANY),
        full("table_kernel", 9, MANY),  # the table's dtype and fp32, whose tiles threads share out otherwise
        full("fold_kernel", 2, PLAIN),
        full("prepare_kernel", 0, MANY),
        full("sum_kernel", 0, MANY),
        full("embed_kernel", 0, BACKWARD),
        full("gather_kernel", 0, (gathered, HALF, 4098, 768, 27.7)),
    ],
)
@pytest.mark.parametrize("arch", [80, full(89), full(90)])
def test_rows_are_read_ahead_and_widely(arch, kernel, barriers, call, monkeypatch, tmp_path):
    """Nothing but 16 bytes at a time of a row, which loops copy into shared memory, with few waits of threads for others."""
    blocks = sass(compiled(monkeypatch, arch, kernel, *call), tmp_path)
    accesses = [each for block in blocks for each in block.instructions if machine_code.width(each) is not None]
    assert max(map(machine_code.width, accesses)) == 16
    assert not [each for each in accesses if machine_code.width(each) < 4]
    monkeypatch.setattr(machine_code, "MATRIX", re.compile(""))  # all loops, not only those that multiply
    ahead = [loop for loop in machine_code.loops(blocks) if any(map(machine_code.is_copy, loop.body))]
    assert bool(ahead) == (barriers > 0)
    for loop in ahead:
        assert not [each for each in loop.body if machine_code.is_load(each) and machine_code.width(each) == 16]
        assert sum(each.name.startswith("BAR") for each in loop.body) <= barriers
