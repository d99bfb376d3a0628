"""Every kernel compiled ahead of time for every device, just as the launchers would launch it."""

import itertools
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import examples
from numerics import tf32

pytest.importorskip("triton")
from aot import DTYPES, Report, faults, record, report
from every_call import FOLDED, backward, distinct_rows, ends, every_call, front_end, gathered, look_up, mixed, terms, turned
from machine_code import Instruction, Loop
from pyembed.kernels import distinct_grad, expand, tuning
from triton.runtime.jit import JITFunction

HALF, FLOAT = torch.bfloat16, torch.float32
EVERYWHERE = [  # each kernel that multiplies matrices, by each way in which it reads them
    (False, mixed, FLOAT, 1, "layer"),
    (False, front_end, HALF, FOLDED, 768, 2304, "layer", True),
    (False, distinct_rows, HALF, 4098, 768, 2304, "layer", True),
    (False, mixed, FLOAT, 513, "layer"),
]
DECODE = (False, front_end, HALF, 1, 768, 2304, "layer", True)  # on AMD, rows of fp32 are normalised before the product
ON_HOPPER = [  # every kernel; test_the_sample_has_every_kernel holds it to that
    *EVERYWHERE,
    DECODE,
    (False, front_end, HALF, 17, 768, 2304, "layer", True),
    (False, front_end, HALF, 4097, 771, 2313, "rms", True),
    (False, front_end, torch.float16, 513, 768, 2304, "layer", True),
    (True, front_end, FLOAT, 199, 768, 2304, "layer", True),
    (False, front_end, FLOAT, 17, 771, 2313, "none", False),
    (False, backward, HALF, 4097, 2048, "layer", True),
    (False, backward, FLOAT, 4097, 64, "rms", False),
    (False, look_up, FLOAT, 4098, 768, 2304, "layer", True, HALF),
    (False, turned, torch.float16, 513, 64, False, True),
    (False, terms, HALF, 2, "none"),
    (False, gathered, HALF, 4098, 768, 27.7),
    (False, ends, HALF, 514, 64, True, False, False, True),
]


class Known(NamedTuple):
    """What is wrong with a kernel's machine code and not mended yet: a test fails as soon as it is."""

    kernel: str
    faults: set[str]  # of aot.faults
    archs: tuple
    example: tuple  # a call in which all of it shows
    why: str
    when: Callable = lambda launch: True  # which launches have it


MANY = (False, distinct_rows, HALF, 4098, 768, 2304, "layer", True)
MANY_TF32 = (True, distinct_rows, FLOAT, 4098, 768, 2304, "layer", True)
CONV1D_TF32 = (*MANY_TF32, True, False, torch.int64, True)
TURNED = "wgmma takes no transposed tf32, which goes through registers"
ODD = (False, front_end, HALF, 17, 771, 2313, "layer", True)
CONV1D = (False, front_end, HALF, 17, 768, 2304, "layer", True, True, True, torch.int64, True)
MANY_HEADS = (False, ends, HALF, FOLDED, 128, True, False, None, False)
WIDE_HEADS = (False, ends, HALF, 2, 256, True, False, None, False)
NARROW = "few rows, so that its products wait for the next operands"
FEWER = "a thread has half of the registers that it has elsewhere"
WMMA = "Triton stores products as WMMA holds them, a column in a lane"


def heads(launch):
    return launch.constant("HEAD_DIM") or 0


KNOWN = [
    Known("weight_grad_kernel", {"nothing in flight"}, (90,), MANY_TF32, TURNED),
    Known("project_kernel", {"nothing in flight"}, (90,), CONV1D_TF32, TURNED, lambda launch: launch.constant("TRANSPOSED")),
    Known("project_kernel", {"narrow access"}, ("gfx1100",), MANY, WMMA),
    Known("embed_qkv_folded_kernel", {"narrow access"}, ("gfx1100",), EVERYWHERE[1], WMMA),
    Known("embed_norm_kernel", {"spills"}, ("gfx1100",), ODD, FEWER, lambda launch: not aligned(launch)),
    Known(
        "embed_qkv_folded_kernel", {"nothing in flight"}, ("gfx1100",), MANY_HEADS, NARROW, lambda launch: heads(launch) >= 128
    ),
    Known("project_norm_kernel", {"nothing in flight"}, ("gfx1100",), WIDE_HEADS, NARROW, lambda launch: heads(launch) == 256),
    Known(
        "project_norm_kernel", {"nothing in flight"}, ("gfx1100",), CONV1D, NARROW, lambda launch: launch.constant("TRANSPOSED")
    ),
    Known("embed_kernel", {"spills"}, ("gfx1100",), (False, terms, HALF, 4098, "layer"), FEWER),
    Known("norm_backward_kernel", {"spills"}, ("gfx1100",), (False, backward, HALF, 4097, 771, "layer", True), FEWER),
    Known("expand_kernel", {"spills"}, ("gfx1100",), (False, distinct_rows, HALF, 4098, 771, 2313, "layer", True), FEWER),
]


def name_of(arch, call):
    switch, function, *arguments = call
    return "-".join(str(word).removeprefix("torch.") for word in (arch, function.__name__, *arguments, *["tf32"] * switch))


def sample(arch):
    """The calls that are compiled for a device by default."""
    if arch == 90:
        return ON_HOPPER
    return EVERYWHERE if isinstance(arch, int) else [*EVERYWHERE, DECODE]


def cases():
    found = []
    for arch, call in itertools.product(tuning.DEVICES, every_call()):
        by_default = call in sample(arch)
        found.append(pytest.param(arch, call, marks=() if by_default else pytest.mark.full, id=name_of(arch, call)))
    return found


def launches(monkeypatch, arch, call):
    """What the launchers would launch on this device."""
    switch, function, *arguments = call
    with tf32(switch):
        return record(monkeypatch, tuning, tuning.DEVICES[arch], lambda: function(*arguments))


OF_EVERY_KERNEL = {"arguments", "launch", "tuning"}  # files


def files_of(kernel):
    """The files, as "embed", that a kernel's code and launches come from."""
    names = vars(sys.modules[kernel.__module__]).values()
    modules = {function.__module__ for function in names if isinstance(function, JITFunction)} | {kernel.__module__}
    return {module.rpartition(".")[2] for module in modules} | OF_EVERY_KERNEL


def constants_of(launch):
    return {each.name: launch.constant(each.name) for each in launch.kernel.params if each.is_constexpr}


def multiplies(launch):
    return launch.constant("PRECISION") is not None


def aligned(launch):
    """Whether the rows of its matrices start at multiples of 16 bytes, as far as Triton knows."""
    sizes = [i for i, each in enumerate(launch.kernel.params) if each.name in ("D", "K", "N")]
    return all((i,) in launch.attributes for i in sizes)


def dtype_of(launch, *names):
    """Of the first of these arguments that it has: a pointer, a descriptor or a tuple that begins with one."""
    kinds = {short: dtype for dtype, short in DTYPES.items()}
    text = next(str(launch.signature[name]) for name in names if name in launch.signature)
    return kinds[re.search(r"fp16|bf16|fp32", text)[0]]


REPORTS = {}  # of (device, launch), which many calls share: its faults


def check(device, launch):
    """The launch's faults on this device, by name; an error where it does without the matrix units, or tuning miscounts."""
    case = launch.key(device)
    if case in REPORTS:
        return REPORTS[case]
    found, constants = report(launch.compile(device), device), constants_of(launch)
    what, widest = f"{launch.kernel.__name__}{launch.signature} {constants}: {found._replace(loops=[])}", 16
    if multiplies(launch):
        dtype = dtype_of(launch, "weight", "folded", "used")
        if dtype != torch.float32 or constants["PRECISION"] != "ieee":
            assert found.instruction, what
            # Hopper's and Blackwell's own instructions want 64 rows; decode has fewer, and waits for memory anyway.
            if device.arch == 90 and constants["BLOCK_M"] >= 64:
                assert found.instruction.startswith("HGMMA"), what
            if device.arch == 100 and constants["BLOCK_M"] >= 128:
                assert found.instruction.startswith("UTC"), what
        tiles = tuning.Tiles(
            *(constants[f"BLOCK_{axis}"] for axis in "MNK"), *(launch.options[f"num_{x}"] for x in ("warps", "stages"))
        )
        table = dtype_of(launch, "token") if launch.kernel.__name__ == "embed_qkv_kernel" else None
        spare = int(launch.kernel.__name__ == "weight_grad_kernel")
        assert found.shared <= tuning.shared_memory(tiles, dtype, device, table, spare), what
        widest = min(16, min(tiles.BLOCK_M, tiles.BLOCK_N) * tiles.BLOCK_K * dtype.itemsize // found.threads)
    REPORTS[case] = faults(found, device, aligned(launch), widest)
    return REPORTS[case]


def known(arch, launch):
    fits = [each for each in KNOWN if each.kernel == launch.kernel.__name__ and arch in each.archs and each.when(launch)]
    return set().union(*(each.faults for each in fits))


@pytest.mark.parametrize("arch, call", cases())
def test_ahead_of_time(arch, call, monkeypatch, pytestconfig):
    """It fits the device, spills nothing, multiplies on the matrix units, and reads the next operands meanwhile."""
    files = pytestconfig.getoption("--kernels")  # of the command line: those that have changed
    for launch in launches(monkeypatch, arch, call):
        by_default = arch == 90 or multiplies(launch)
        if (by_default or examples.full) and (files is None or files_of(launch.kernel) & {*files.split(",")}):
            found = check(tuning.DEVICES[arch], launch)
            new = {name: where for name, where in found.items() if name not in known(arch, launch)}
            assert not new, f"{launch.kernel.__name__} {constants_of(launch)} {launch.options} {launch.signature}"


@pytest.mark.parametrize(
    "arch, each",
    [
        pytest.param(arch, each, marks=pytest.mark.full if place else (), id=f"{each.kernel}-{name_of(arch, each.example)}")
        for each in KNOWN
        for place, arch in enumerate(each.archs)
    ],
)
def test_known_faults_are_there(arch, each, monkeypatch):
    """Else they are mended: take them off KNOWN, so that they stay mended."""
    made = [launch for launch in launches(monkeypatch, arch, each.example) if launch.kernel.__name__ == each.kernel]
    found = set().union(*(check(tuning.DEVICES[arch], launch) for launch in made if each.when(launch)))
    assert each.faults <= found, f"{each.why}: mended are {each.faults - found}"


HMMA, LOAD, STORE = (Instruction(f"{name}.E.U16", "R1, R2") for name in ("HMMA", "LDG", "STG"))
COPIES = [Instruction("LDGSTS.E.BYPASS.128", "[R5], [R6.64]"), Instruction("LDGDEPBAR", "")]
STEP = [Instruction("DEPBAR.LE", "SB0, 0x1"), HMMA, *COPIES]
MFMA = Instruction("v_mfma_f32_16x16x16_f16", "v[0:3], v4, v5")


def amd_step(load):
    return [Instruction(load, "v[4:7], v[2:3], off"), MFMA, Instruction("s_waitcnt", "vmcnt(0)")]


@pytest.mark.parametrize(
    "wrong, arch, changes",
    [
        ((), 90, {}),
        ((), 90, {"threads": 512, "registers": 128}),
        (("registers",), 90, {"threads": 512, "registers": 136}),
        (("registers",), 90, {"threads": 512, "registers": 255}),
        ((), "gfx942", {"threads": 512, "registers": 256}),
        (("shared memory",), 86, {"shared": 107_520}),
        ((), 80, {"shared": 107_520}),
        (("spills",), 90, {"spills": 8}),
        (("serialised products",), 90, {"warnings": ["Potential Performance Loss: wgmma is serialized"]}),
        ((), 80, {"loops": [Loop(STEP, True)]}),
        (("narrow access", "synchronous loads"), 80, {"loops": [Loop([*STEP, LOAD], True)]}),
        (("narrow access",), 80, {"loops": [Loop(STEP, True), Loop([*STEP, STORE], False)]}),
        ((), 80, {"loops": [Loop(STEP, True), Loop([*STEP, LOAD, LOAD], False)]}),
        (("narrow access",), 80, {"loops": [Loop(STEP, True), Loop([*STEP, LOAD, LOAD, LOAD], False)]}),
        (("narrow access",), 80, {"loops": [Loop(STEP, True), Loop([*STEP, LOAD, STORE], False)]}),
        (("synchronous loads",), 80, {"loops": [Loop([*STEP, Instruction("LDG.E.128", "R1, R2")], True)]}),
        ((), 80, {"loops": [Loop(STEP, True), Loop([*STEP, Instruction("LDG.E.128", "R1, R2")], False)]}),
        (("narrow copies",), 80, {"loops": [Loop([*STEP, *[Instruction("LDGSTS.E", "[R5], [R6.64]")] * 2], True)]}),
        ((), 80, {"loops": [Loop([*STEP, *COPIES, *[Instruction("LDGSTS.E", "[R5], [R6.64]")] * 2], True)]}),
        (("nothing in flight",), 80, {"loops": [Loop([Instruction("DEPBAR.LE", "SB0, 0x0"), HMMA, *COPIES], True)]}),
        ((), "gfx942", {"loops": [Loop(amd_step("global_load_dwordx4"), True)]}),
        (("synchronous loads",), "gfx942", {"loops": [Loop(amd_step("global_load_dwordx2"), True)]}),
        (("narrow access", "synchronous loads"), "gfx942", {"loops": [Loop(amd_step("global_load_ushort"), True)]}),
    ],
)  # fmt: skip
def test_faults(wrong, arch, changes):
    sound = Report(256, 168, 0, 90_000 if arch != "gfx942" else 60_000, None, [], [])
    found = faults(sound._replace(**changes), tuning.DEVICES[arch])
    assert {*found} == {*wrong} and all(found.values())
    assert ("synchronous loads" in faults(sound._replace(**changes), tuning.DEVICES[arch], widest=8)) == (
        "synchronous loads" in wrong and "dwordx2" not in str(changes)
    )
    of_rows = {"narrow access", "narrow copies", "synchronous loads", "nothing in flight"}
    assert {*faults(sound._replace(**changes), tuning.DEVICES[arch], aligned=False)} == {*wrong} - of_rows


def test_the_sample_has_every_kernel(monkeypatch):
    """Each that any call launches, by a call that is compiled by default; and of those that multiply, each on every device."""
    every, found = (
        {launch.kernel.__name__ for call in calls for launch in launches(monkeypatch, 90, call)}
        for calls in (every_call(), ON_HOPPER)
    )
    assert found == every and {*ON_HOPPER} <= {*every_call()}
    for arch in (90, 80, "gfx942", "gfx1100"):
        every, found = (
            {launch.kernel for call in calls for launch in launches(monkeypatch, arch, call) if multiplies(launch)}
            for calls in (every_call(), sample(arch))
        )
        assert every == found


def test_files_of_kernels():
    assert files_of(expand.expand_kernel) == {"expand", "epilogue", "tiles"} | OF_EVERY_KERNEL
    assert files_of(distinct_grad.table_kernel) == {"distinct_grad", "distinct", "epilogue", "tiles"} | OF_EVERY_KERNEL
