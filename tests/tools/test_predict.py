"""bench/predict.py and bench/model.py: counts of hand-made machine code, how times scale, and one kernel that is compiled."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from machine_code import Instruction, sass
from typer.testing import CliRunner

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("model")


@pytest.fixture
def predict(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module("predict")


def control(stall=1, sets=7, waits=()):
    """As in an instruction's encoding: `sets` is the scoreboard that its result clears."""
    return stall | sets << 5 | 7 << 8 | sum(1 << 11 + board for board in waits)


def code(*lines):
    """nvdisasm's text; a line may be (instruction, control)."""
    text = []
    for line in lines:
        line, encoded = line if isinstance(line, tuple) else (line, control())
        if line.endswith(":"):
            text.append(line)
        else:
            text += [f"        /*0000*/   {line} ;   /* 0x00000000fffff984 */", f"    /* 0x{encoded << 41:016x} */"]
    return sass("\n".join(text))


COPY, WAIT = ["LDGSTS.E.BYPASS.128 [R5], [R6.64]", "LDGDEPBAR"], "DEPBAR.LE SB0, 0x1"
HGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0"
KERNEL = (  # a pass over rows; column tiles, in each a product and a store; a wait between, as for TMA
    "S2R R0, SR_TID.X", "LDG.E R2, [R2.64]",
    ".L_x_0:", WAIT, "LDS.128 R8, [R1]", "FFMA R1, R2, R3, R1", *COPY, *["STG.E.128 [R2.64], R4"] * 2, "@P0 BRA `(.L_x_0)",
    ".L_x_1:", "MOV R1, RZ",
    ".L_x_2:", WAIT,
    ".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R6", "@!P4 BRA `(.L_x_3)",
    HGMMA, HGMMA, *COPY, "@P1 BRA `(.L_x_2)",
    "F2FP R1, R2, R3", "STG.E.128 [R2.64], R4", "@P2 BRA `(.L_x_1)", "EXIT",
)  # fmt: skip


def test_phases(model):
    """What each loop is, and how many instructions a trip has, those of a wait too, once."""
    found = {phase.name: phase for phase in model.phases(code(*KERNEL), lambda name, own, nested: len(own) * 10)}
    counts = {name: len(phase.instructions) for name, phase in found.items()}
    assert counts == {"prologue": 3, "statistics": 8, "epilogue": 4, "main": 8}
    assert {name: phase.trips for name, phase in found.items()} == {"prologue": 1, "statistics": 80, "epilogue": 40, "main": 80}
    assert sum(map(model.flops_of, found["main"].instructions)) == 2 * 2 * 64 * 256 * 16


def test_phases_of_tiles_and_steps_in_one_loop(model):
    store = "STG.E.128 [R2.64], R4"
    lines = [
        "NOP", ".L_x_0:", HGMMA, *COPY, "@P1 BRA `(.L_x_1)", "F2FP R1, R2, R3", store,
        ".L_x_1:", "IADD3 R1, R1, 1", "@P2 BRA `(.L_x_0)", "EXIT",
    ]  # fmt: skip
    counts = [(phase.name, len(phase.instructions)) for phase in model.phases(code(*lines), lambda *_: 1)]
    assert counts == [("prologue", 2), ("main", 6), ("epilogue", 2)]
    copies = ["@P3 BRA `(.L_x_2)", *COPY, ".L_x_2:"]  # by one thread, as TMA's are
    counts = [
        (phase.name, len(phase.instructions)) for phase in model.phases(code(*lines[:2], *copies, *lines[2:]), lambda *_: 1)
    ]
    assert counts == [("prologue", 2), ("main", 9), ("epilogue", 2)]
    lines[lines.index(store)] = "NOP"  # a block that is left out now and then, and writes nothing, belongs to the step
    counts = [(phase.name, len(phase.instructions)) for phase in model.phases(code(*lines), lambda *_: 1)]
    assert counts == [("prologue", 2), ("main", 8)]


@pytest.mark.parametrize(
    "name, flops",
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HMMA.1684.F32.TF32", 2 * 16 * 8 * 4),
        ("HGMMA.64x128x8.F32.TF32", 2 * 64 * 128 * 8),
        ("FFMA", 0),
    ],
)
def test_flops(model, name, flops):
    assert model.flops_of(Instruction(name, "R4, R8, R12, R4")) == flops


def test_tensor_cycles(model):
    """At the data sheet's rate an H100 takes 128 cycles for 64 × 256 × 16, tf32 twice as long; mma.sync is slower there."""
    rates = model.DEVICES["h100"]._replace(sustained=1.0)
    wide, half, legacy = (
        [Instruction(name, "")] for name in ("HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x8.F32.TF32", "HMMA.16816.F32.BF16")
    )
    assert model.tensor_cycles(wide, 4, rates) == model.tensor_cycles(half, 4, rates) == 128
    assert model.tensor_cycles(wide, 8, rates) == 256
    assert model.tensor_cycles(legacy, 8, rates) == pytest.approx(8 * 4096 / 4096 / 0.629)


def test_shared_bytes(model):
    names = {
        "LDS.128": 512,
        "LDS": 128,
        "STS.U16": 64,
        "LDSM.16.M88.4": 512,
        "LDSM.16.M88": 128,
        "LDGSTS.E.BYPASS.128": 512,
        "LDG.E": 0,
    }
    for name, nbytes in names.items():
        assert model.shared_bytes([Instruction(name, "R4, [R1]")]) == nbytes, name
    assert model.shared_bytes([Instruction("LDS", "RZ, [RZ]")]) == 0


def test_a_warp_waits(model):
    """Stalls add up; a result is waited for where it is used, and what runs before that covers it."""

    def cycles(*lines, latency=300):
        (block, *_) = code(*lines)
        return model.warp_cycles(block.instructions, latency)

    add = ("FADD R1, R2, R3", control(stall=4))
    use = ("FADD R1, R2, R3", control(stall=1, waits=[2]))
    load, read = (("LDG.E R2, [R2.64]", control(sets=2)), ("LDS R2, [R2]", control(sets=2)))
    assert cycles(add, add, add) == 12
    assert cycles(load, use) == 301 and cycles(load, use, latency=700) == 701
    assert cycles(load, *[add] * 10, use) == 301
    assert cycles(load, *[add] * 100, use) == 402
    assert cycles(read, use) == 31
    assert cycles(load, read, use) == 301  # both by one scoreboard
    assert cycles(use, *[add] * 10, load) == 341  # by the next trip
    assert cycles(add, "BAR.SYNC.DEFER_BLOCKING 0x0") == 5 + model.BARRIER


@pytest.mark.parametrize(
    "ahead, lines",
    [
        (2, [WAIT, *COPY]),
        (1, ["DEPBAR.LE SB0, 0x0", *COPY]),
        (2, ["DEPBAR.LE SB0, 0x2", *COPY, *COPY]),
        (3, ["UTMALDG.2D [UR8], [UR4]"]),
    ],
)
def test_steps_ahead(model, ahead, lines):
    assert model.steps_ahead(code(*lines)[0].instructions, stages=4) == ahead


def launch_of(M, N, D, itemsize=2, programs=None, kernel=KERNEL):
    """(launch, case, blocks): as of a launcher, of 128 × 256 × 32, whose machine code is KERNEL's."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]

    def meta(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    values = {"token": meta(50_000, D), "weight": (meta(N, D), D, 1), "hidden": meta(M, D), "qkv": (meta(M, N),)}
    constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32}
    launch = SimpleNamespace(
        options={"num_warps": 8, "num_stages": 3}, constant=constants.get, values=values, signature={},
        grid=(programs or M // 128,), kernel=SimpleNamespace(__name__="made_by_hand"),
    )  # fmt: skip
    case = SimpleNamespace(M=M, T=M, N=N, D=D, itemsize=itemsize, column_tiles=lambda width: N // width)
    return launch, case, code(*kernel)


def priced(model, M, N, D, rates="h100", shared=200_000, **more):
    rates = model.DEVICES[rates] if isinstance(rates, str) else rates
    launch, case, blocks = launch_of(M, N, D, **more)
    return {cost.name: cost for cost in model.priced(launch, rates, case, 128, shared, blocks)}


def total(costs):
    return sum(cost.time for cost in costs.values())


M, N, D = 128 * 132, 4096, 1024


def test_trips_do_the_products(model):
    """Whatever the tiles: programs × trips × FLOPs are the product's, and DRAM's bytes those of the tensors."""
    for programs in (M // 128, M // 128 * 4, M // 128 * 64):  # a program a row of tiles; a quarter; tiles shared by four
        costs = priced(model, M, N, D, programs=programs)
        main = costs["main"]
        assert main.trips * main.flops * programs == 2 * M * N * D
        assert costs["statistics"].trips == 32
        assert sum(cost.dram for cost in costs.values()) == 2 * (M * D + N * D + M * D + M * N)
    wider = [*KERNEL[:8], *[KERNEL[8]] * 2, *KERNEL[8:]]  # twice the columns of BLOCK_K in a step
    assert KERNEL[8].startswith("STG") and priced(model, M, N, D, kernel=wider)["statistics"].trips == 16
    first, tiles = KERNEL.index(".L_x_0:"), KERNEL.index(".L_x_1:")
    within = [
        *KERNEL[:first],
        *KERNEL[tiles : tiles + 2],
        *KERNEL[first:tiles],
        *KERNEL[tiles + 2 :],
    ]  # rows read again for each
    assert priced(model, M, N, D, kernel=within)["statistics"].trips == 32 * 16


def test_time_grows_with_work(model):
    once = total(priced(model, M, N, D))
    assert total(priced(model, 2 * M, N, D)) == pytest.approx(2 * once, rel=0.02)
    assert total(priced(model, M, 2 * N, D)) == pytest.approx(2 * once, rel=0.1)
    assert total(priced(model, M, N, 2 * D)) == pytest.approx(2 * once, rel=0.1)


def test_time_grows_with_waves(model):
    """One program more than there are multiprocessors takes as long as twice as many; two at once on one are no slower."""
    full, more, twice = (total(priced(model, count * 128, N, D)) for count in (132, 133, 264))
    assert more > 1.9 * full and twice == pytest.approx(more, rel=0.05)
    assert total(priced(model, 264 * 128, N, D, shared=100_000)) <= twice


def test_rounds_of_programs(model):
    """Of three on a multiprocessor that holds two: first two share its rate, then one waits for its own copies."""
    rates = model.DEVICES["h100"]._replace(l2=1e16, dram=1e16, latency_dram=0)
    alone = priced(model, M, N, D, rates)["statistics"].seconds
    busy = max(alone["issue"], alone["shared"])
    rates = rates._replace(latency_dram=2 * 1.5 * busy / 32 * rates.clock)  # over two steps, 1.5 times as long as it is busy
    found = priced(model, 3 * M, N, D, rates, shared=100_000)["statistics"]
    assert found.time == pytest.approx((2 + 1.5) * busy)
    assert found.seconds["issue"] == pytest.approx(3 * alone["issue"])


def test_time_falls_with_rates(model):
    rates = model.DEVICES["h100"]
    slow = rates._replace(dram=rates.dram / 50)
    assert total(priced(model, M, N, D, slow)) > total(priced(model, M, N, D))
    assert priced(model, M, N, D, slow)["statistics"].limit == "DRAM"
    assert total(priced(model, M, N, D, slow)) >= 2 * (2 * M * D + N * D + M * N) / (slow.dram * model.COPY)
    assert total(priced(model, M, N, D, slow, itemsize=4)) == pytest.approx(2 * total(priced(model, M, N, D, slow)), rel=0.1)
    assert priced(model, M, N, D, rates._replace(l2=rates.l2 / 50))["main"].limit == "L2"
    assert priced(model, M, N, D, rates._replace(tensor=64))["main"].limit == "tensor"
    assert priced(model, M, N, D, rates._replace(latency_dram=50_000))["statistics"].limit == "latency"
    lines = ["FFMA R1, R2, R3, R1" if line == "MOV R1, RZ" else line for line in KERNEL]
    busy = [*lines[: lines.index(HGMMA)], *["FFMA R1, R2, R3, R1"] * 500, *lines[lines.index(HGMMA) :]]
    assert priced(model, M, N, D, kernel=busy)["main"].limit == "issue"


def test_a_program_that_does_not_fit(model):
    with pytest.raises(ValueError, match="made_by_hand: expected a program that fits"):
        priced(model, M, N, D, shared=250_000)


def test_bound_of_cublas(predict):
    """GPT-2 small, by hand: 2·M·N·D over 80 % of 989 TFLOP/s; a token of Llama-3-8B: its weight over 90 % of 3.35 TB/s."""
    model, rates = predict.model, predict.model.DEVICES["h100"]
    ideal, whole = predict.cublas(rates, predict.Case(predict.SMALL, 32768))
    assert ideal - model.LAUNCH == pytest.approx(2 * 32768 * 2304 * 768 / 791.5e12, rel=1e-3) and ideal <= whole < 1.1 * ideal
    ideal, _ = predict.cublas(rates, predict.Case(predict.LARGE, 1))
    assert ideal - model.LAUNCH == pytest.approx(2 * 4096 * 6144 / (0.9 * 3.35e12), rel=1e-3)
    products = [predict.cublas(rates, predict.Case(predict.LARGE, 4096, dtype))[0] for dtype in (torch.bfloat16, torch.float32)]
    assert products[1] - model.LAUNCH == pytest.approx(2 * (products[0] - model.LAUNCH))


def test_a_compiled_kernel(predict, tmp_path):
    """Decode of GPT-2 small, by the command: it says what it is, what goes in, and what to mend."""
    case, file = predict.Case(predict.SMALL, 16), tmp_path / "predicted.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "CASES", [case])
        done = CliRunner().invoke(predict.app, ["--case", "small, M 16", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "model, not measured" in done.output and "MEASURED one_pass" not in done.output
    last = done.output[done.output.index("Worst row, to be mended next: h100, GPT-2 small, M 16") :]
    assert last.rstrip().endswith("not measurements, but for columns named MEASURED.")
    document = json.loads(file.read_text())
    (row,) = document["rows"]
    (launch,) = row["launches"]
    phases = {phase["name"]: phase for phase in launch["phases"]}
    assert phases.keys() == {"prologue", "statistics", "main", "epilogue", "drain"} and "not measured" in document["what"]
    assert phases["main"]["trips"] * phases["main"]["flops"] * launch["programs"] >= 2 * 16 * 2304 * 768
    assert sum(phase["dram"] for phase in phases.values()) == pytest.approx(2 * (2304 + 2 * 16 + 16) * 768, rel=0.05)
    seconds = row["seconds"]
    assert seconds["cublas_bound"] < seconds["predicted"] < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("device", ["h100", "a100", "4090"])
def test_every_case(predict, device):
    """Each loop is understood: the trips of all programs do the product, and little more, and no time is below the bound."""
    for case in predict.CASES:
        found = predict.predict(device, case)
        for kernel, programs, _, costs in found.launches:
            products = sum(cost.trips * cost.flops for cost in costs) * programs
            if "embed" in kernel:
                assert 2 * case.M * case.N * case.D <= products < 2 * max(case.M, 64) * case.N * case.D * 1.6, case.name
            assert all(
                cost.time >= 0 and cost.name in ("drain", "prologue", "statistics", "main", "epilogue") for cost in costs
            )
        assert found.cublas < found.seconds < 20 * found.cublas, case.name


def test_measurements_have_columns_of_their_own(predict):
    case = predict.Case(predict.SMALL, 16)
    cost = predict.model.Cost("main", 1, 10, 0.0, 0.0, 0.0, {"tensor": 10e-6, "DRAM": 0.0})
    found = [predict.Prediction("h100", case, [("kernel", 1, "16", [cost])], 5e-6, 5e-6)]
    cells = {
        column.header: [*column.cells]
        for column in predict.summary(found, {case.name: {"one_pass": 20e-6, "cuBLAS": 8e-6}}).columns
    }
    assert cells["one_pass, µs"] == ["11.3"] and cells["ratio"] == ["2.26"]
    assert cells["MEASURED one_pass, µs"] == ["20.0"] and cells["MEASURED ratio"] == ["2.50"]
    table = predict.summary(found, {})
    assert not any("MEASURED" in column.header for column in table.columns)
    assert all("PREDICTED by a model, not measured" in each.title for each in (table, predict.details(found)))


def test_what_is_measured(predict):
    """One call of a front end as wide as the case's, and the product of as many rows; here on a CPU."""
    small = predict.SMALL.__class__("small", V=50, D=32, heads=4, layers=1, mlp=1, L=8, kv_heads=2, head_dim=16)
    for M, shape in ((4, (1, 4)), (16, (2, 8))):
        case = predict.Case(small, M, torch.float32)
        made = predict.variants(case, torch.device("cpu"))
        with torch.no_grad(), made["one_pass"].context():
            hidden, query, key, value = made["one_pass"].forward()
        assert hidden.shape == (*shape, 32) and [x.shape[-2] for x in (query, key, value)] == [4, 2, 2]
        assert made["cuBLAS"].forward()[0].shape == (M, case.N) == (M, 128)


def test_what_is_not_there_is_refused(predict):
    for arguments, message in ((["--device", "v100"], "h100"), (["--case", "GPT-5"], "GPT-2 small, M 4096")):
        done = CliRunner().invoke(predict.app, arguments)
        assert done.exit_code == 2 and message in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_measured(predict):
    done = CliRunner().invoke(predict.app, ["--measure"])
    assert done.exit_code == 0 and "nothing to compare: expected one of h100" in done.output
