"""How long the kernels should take on GPUs that are not there: a MODEL, from compiled kernels. It measures nothing.

    python bench/predict.py [--device h100|h200|a100|4090|all] [--case NAME] [--json FILE]
    python bench/predict.py --measure        on a GPU: its predictions, and beside them in columns of their own what it measures

The launches that the one-pass launcher makes at a case are compiled ahead of time, and their machine code, trip counts and
bytes are turned into seconds as bench/model.py says. Each is compared with a bound for cuBLAS' product alone, from the same
rates: FLOPs at the rate that large products sustain, or bytes at that of a large copy; and with that bound where
multiprocessors share no tile of the output, so that the last wave of tiles takes as long as the others ("whole tiles").
"""

# ruff: noqa: E402  the readers of machine code are the tests'

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "helpers")]

import aot
import model
import pytest
import torch
import typer
from every_call import meta, norm_of
from pyembed.kernels import embed_qkv, tuning
from pyembed.kernels.tuning import cdiv
from rich.console import Console
from rich.table import Table

import pyembed
from pyembed.benchmark import cases, timing
from pyembed.call import Call, Epilogue, Projection, Terms
from pyembed.kept import Kept, Sources

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))  # of cuBLAS: assumed


class Case(NamedTuple):
    """The one-pass forward of a model's front end, without gradients."""

    model: cases.Model
    M: int
    dtype: torch.dtype = torch.bfloat16
    keeps: bool = False  # the folded weight between calls, as front.keep_folded() asks for

    @property
    def name(self):
        how = ", fp32 with tf32" if self.tf32 else ", folded weight kept" if self.keeps else ""
        return f"{self.model.name}, M {self.M}{how}"

    @property
    def T(self):
        """Sequences as long as a learned position table lets them be."""
        return min(self.M, self.model.L or self.M)

    D = property(lambda self: self.model.D)
    N = property(lambda self: self.model.N)
    itemsize = property(lambda self: self.dtype.itemsize)
    tf32 = property(lambda self: self.dtype == torch.float32)

    def column_tiles(self, width):
        return sum(cdiv(heads * self.model.head_dim, width) for heads in self.model.groups)

    def call(self):
        """Its Call, over meta tensors."""
        each, D, N, dtype = self.model, self.D, self.N, self.dtype
        terms = Terms(
            meta(self.M // self.T, self.T), meta(each.V, D, dtype=dtype), meta(each.L, D, dtype=dtype) if each.L else None
        )
        cos = None if each.L else meta(8192, each.head_dim // 2, dtype=torch.float32)
        projection = Projection(meta(N, D, dtype=dtype), meta(N, dtype=dtype) if each.bias else None, *each.groups[:2])
        kept = Kept(Sources("", [])) if self.keeps else None
        return Call(terms, norm_of(each.norm, D, dtype), projection, Epilogue(cos=cos, sin=cos), kept=kept)


SMALL, LARGE = cases.MODELS["GPT-2 small"], cases.MODELS["Llama-3-8B"]
CASES = [
    *(Case(SMALL, M) for M in (4096, 8192, 16384, 32768)),
    *(Case(LARGE, M) for M in (4096, 8192)),
    *(Case(LARGE, M) for M in (1, 2, 4, 8, 16)),
    *(Case(each, M) for each in (SMALL, LARGE) for M in (64, 256, 512)),
    *(Case(each, 4096, torch.float32) for each in (SMALL, LARGE)),
    *(Case(each, M, keeps=True) for each in (SMALL, LARGE) for M in (4096, 8192)),
]


class Prediction(NamedTuple):
    """A case on a device; times in seconds."""

    device: str
    case: Case
    launches: list  # (kernel's name, programs, tiles, [model.Cost])
    cublas: float
    whole: float  # the same with whole tiles

    @property
    def seconds(self):
        return sum(model.LAUNCH + sum(cost.time for cost in costs) for *_, costs in self.launches)

    @property
    def traffic(self):
        """Share of the rate of a large copy, which decode is to reach."""
        needed = sum(cost.dram for *_, costs in self.launches for cost in costs)
        return needed / (self.seconds * model.DEVICES[self.device].dram * model.COPY)

    @property
    def worst(self):
        """(kernel, cost) that is furthest above what FLOPs or DRAM alone ask of it."""
        every = [(kernel, cost) for kernel, *_, costs in self.launches for cost in costs]
        return max(every, key=lambda pair: pair[1].time - max(pair[1].seconds.get("tensor", 0), pair[1].seconds["DRAM"]))


def cublas(rates, case):
    """(bound, bound of whole tiles) in seconds of the product alone, by rates of cuBLAS."""
    speed = rates.tensor * rates.sustained * rates.clock / (2 if case.tf32 else 1)  # of a multiprocessor
    nbytes = (case.M * case.D + case.N * case.D + case.M * case.N) * case.itemsize
    read = nbytes / (rates.dram * model.COPY)
    ideal = 2 * case.M * case.N * case.D / (speed * rates.multiprocessors)
    waves = min(cdiv(cdiv(case.M, m) * cdiv(case.N, n), rates.multiprocessors) * m * n for m, n in TILES)
    return model.LAUNCH + max(ideal, read), model.LAUNCH + max(read, 2 * waves * case.D / speed if case.M > 64 else ideal)


@contextlib.contextmanager
def tf32(wanted):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def launches_of(case, arch):
    """What the launcher launches at a second call, when it has kept what it keeps."""
    call, device = case.call(), tuning.DEVICES[arch]
    with pytest.MonkeyPatch.context() as patch, tf32(case.tf32):
        for _ in range(2):
            found = aot.record(patch, tuning, device, functools.partial(embed_qkv.embed_qkv, call))
    return found


COMPILED = {}  # of (device, launch), which cases share: registers, shared memory, machine code


def code_of(launch, arch):
    device = tuning.DEVICES[arch]
    key = launch.key(device)
    if key not in COMPILED:
        compiled = launch.compile(device)
        registers, blocks = aot.resources(compiled)
        COMPILED[key] = registers, compiled.metadata.shared, blocks
    return COMPILED[key]


def predict(device, case):
    rates, found = model.DEVICES[device], []
    for launch in launches_of(case, rates.arch):
        tiles = {axis: launch.constant(f"BLOCK_{axis}") for axis in "MNK"}
        costs = model.priced(launch, rates, case, *code_of(launch, rates.arch))
        found.append((launch.kernel.__name__, launch.grid[0], "×".join(str(size) for size in tiles.values() if size), costs))
    return Prediction(device, case, found, *cublas(rates, case))


def us(seconds):
    return f"{seconds * 1e6:,.1f}"


def summary(predictions, measured):
    """measured: {case's name: what measure() gives}; empty without a GPU."""
    table = Table(title="PREDICTED by a model, not measured" + (" (but the columns that say so)" if measured else ""))
    columns = [
        "device",
        "case",
        "one_pass, µs",
        "cuBLAS' bound, µs",
        "whole tiles, µs",
        "ratio",
        "to whole tiles",
        "% of copy rate",
    ]
    for column in columns + (["MEASURED one_pass, µs", "MEASURED cuBLAS, µs", "MEASURED ratio"] if measured else []):
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for each in predictions:
        ratios = (f"{each.seconds / bound:.2f}" for bound in (each.cublas, each.whole))
        row = [
            each.device,
            each.case.name,
            *map(us, (each.seconds, each.cublas, each.whole)),
            *ratios,
            f"{100 * each.traffic:.0f}",
        ]
        if measured:
            ours, theirs = (measured[each.case.name][variant] for variant in ("one_pass", "cuBLAS"))
            row += [us(ours), us(theirs), f"{ours / theirs:.2f}"]
        table.add_row(*row)
    return table


LIMITS = ("issue", "tensor", "shared", "warp", "latency", "L2", "DRAM")


def details(predictions):
    table = Table(title="PREDICTED by a model, not measured: phases, what goes in, and µs by each limit")
    inputs = ("programs", "trips", "instructions", "MFLOP", "L2, MB", "DRAM, MB")
    for column in ("kernel", "phase", *inputs, *LIMITS, "µs"):
        table.add_column(column, justify="left" if column in ("kernel", "phase") else "right")
    for each in predictions:
        table.add_row(f"[bold]{each.device}: {each.case.name}", *[""] * (len(inputs) + len(LIMITS) + 1), us(each.seconds))
        for kernel, programs, tiles, costs in each.launches:
            name, count = f"{kernel.removesuffix('_kernel')} {tiles}", f"{programs:,}"
            for cost in costs:
                values = (f"{cost.trips:,.1f}", str(cost.instructions), f"{cost.flops / 1e6:.3f}", f"{cost.l2 / 1e6:,.1f}",
                          f"{cost.dram / 1e6:,.2f}")  # fmt: skip
                limits = (us(cost.seconds[limit]) if limit in cost.seconds else "" for limit in LIMITS)
                table.add_row(name, cost.name, count, *values, *limits, us(cost.time))
                name = count = ""
        table.add_section()
    return table


def rates_table(devices):
    table = Table("device", *model.Rates._fields, title="Rates of the model, with their sources in bench/model.py")
    for name in devices:
        table.add_row(name, *(f"{x:.4g}" for x in model.DEVICES[name]))
    return table


def as_json(each):
    launches = [
        {"kernel": kernel, "programs": programs, "tiles": tiles, "phases": [cost._asdict() for cost in costs]}
        for kernel, programs, tiles, costs in each.launches
    ]
    times = {"predicted": each.seconds, "cublas_bound": each.cublas, "cublas_bound_whole_tiles": each.whole}
    return {
        "device": each.device,
        "case": each.case.name,
        "seconds": times,
        "copy_rate_share": each.traffic,
        "launches": launches,
    }


def at_hand():
    """The name of this machine's device; None: there are no rates of it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((device for device in model.DEVICES if device.upper() in name), None)


def variants(case, device):
    """{name: timing.Variant} of the case, and of cuBLAS' product alone."""
    front = cases.Stock(case.model, case.T, device, case.dtype).fused()
    if case.keeps:
        front.keep_folded()
    ids = torch.randint(case.model.V, (case.M // case.T, case.T), device=device)
    x, weight = (torch.randn(rows, case.D, device=device, dtype=case.dtype) for rows in (case.M, case.N))
    return {
        "one_pass": timing.Variant(lambda: front(ids), [], lambda: pyembed.plan("one_pass")),
        "cuBLAS": timing.Variant(lambda: (x @ weight.T,), []),
    }


def measure(case):
    """{variant: median seconds} on the GPU at hand, each from a CUDA graph, with a cold L2."""
    device = torch.device("cuda")
    with tf32(case.tf32):
        pool = torch.cuda.graph_pool_handle()
        captured = {name: timing.capture(variant, pool) for name, variant in variants(case, device).items()}
        found = timing.compare(captured, None, timing.clock(device), seconds=1)
    return {name: row["seconds"]["forward"]["median"] for name, row in found.items()}


app = typer.Typer(add_completion=False)


@app.command(help=__doc__.split("\n")[0])
def main(
    device: Annotated[str, typer.Option(help="h100, h200, a100, 4090 or all")] = "h100",
    case: Annotated[str, typer.Option(help='only cases whose name has this, as "8B, M 1"')] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the predictions there, with all inputs")] = None,
    measures: Annotated[
        bool, typer.Option("--measure", help="predict for the GPU at hand, and time the same calls on it")
    ] = False,
):
    if measures and at_hand() is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        print(f"nothing to compare: expected one of {', '.join(model.DEVICES)}, got {name}")
        return
    devices = [at_hand()] if measures else [*model.DEVICES] if device == "all" else [device]
    if not set(devices) <= model.DEVICES.keys():
        raise typer.BadParameter(f"expected one of {', '.join(model.DEVICES)}, all, got {device}", param_hint="--device")
    chosen = [each for each in CASES if case in each.name]
    if not chosen:
        raise typer.BadParameter(
            f"expected part of one of: {'; '.join(each.name for each in CASES)}; got {case}", param_hint="--case"
        )
    found = [predict(name, each) for name in devices for each in chosen]
    measured = {each.name: measure(each) for each in chosen} if measures else {}
    if json_file:
        document = {"what": "rows: predicted by a model, not measured", "rows": [as_json(each) for each in found]}
        document["rates"] = {name: model.DEVICES[name]._asdict() for name in devices}
        document |= {"measured": {"device": torch.cuda.get_device_name(), "seconds": measured}} if measures else {}
        json_file.write_text(json.dumps(document, indent=1))
    console = Console(width=200)
    for table in (rates_table(devices), details(found), summary(found, measured)):
        console.print(table)
    worst = max(found, key=lambda each: each.seconds / each.cublas)
    kernel, cost = worst.worst
    console.print(
        f"Worst row, to be mended next: {worst.device}, {worst.case.name}: "
        f"{worst.seconds / worst.cublas:.2f} times cuBLAS' bound. Most that is not product or traffic: {kernel}, {cost.name}: "
        f"{us(cost.time)} µs, limited by {cost.limit}, in {cost.trips:,.1f} trips."
    )
    console.print("All of these are a model's predictions, not measurements, but for columns named MEASURED.")


if __name__ == "__main__":
    app()
