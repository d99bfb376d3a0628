"""`pyembed doctor`: what is installed, whether the kernels compile for a device, and whether they compute what they should."""

import functools
import importlib
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import __version__, functional, reference, settings
from .budget import judge
from .call import Call, Epilogue, Norm, Projection, Terms
from .options import UsageError, check_writable
from .plans import rates
from .plot import Report

SIZES = ((2304, 768), (6144, 4096))  # N, D of GPT-2 small and Llama-3-8B
TOKENS = (1, 200, 5000)


def doctor(
    arch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Compile the kernels for this GPU, which need not be there: 80, 90, gfx942 …"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report to FILE; - for stdout.")
    ] = None,
) -> None:
    """Say what is installed, compile the kernels for this GPU, and check their results bit by bit.

    Exit status: 0 all is well, 1 something is not, 2 a wrong argument.
    """
    to_stdout = json_file == Path("-")
    check_writable(None, None if to_stdout else json_file, None)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    target = _target(arch, cuda)
    report: Report = {"versions": _versions(), "device": _described(device), "problems": []}
    problems: list[str] = report["problems"]
    has_triton = report["versions"]["triton"] is not None
    if cuda and not has_triton:
        problems.append("triton is not installed, so that PyTorch's operators run in place of the kernels: pip install triton")
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        if target is not None:
            task = progress.add_task("kernels", total=None)
            report["target"] = target._asdict()
            report["tiles"] = _tiles(target)
            wrong = [name for name, row in report["tiles"].items() if not row["fit"]]
            problems += [f"tiles of {name} do not fit arch {target.arch}" for name in wrong]
            report["kernels"] = _compile(target, functools.partial(progress.update, task))
            problems += [f"{name} did not compile: {row['error']}" for name, row in report["kernels"].items() if row["error"]]
        report["check"] = {}
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            progress.add_task(f"results in {str(dtype)[6:]}", total=None)
            try:
                found = _check(device, dtype, "triton" if has_triton else "torch")
            except Exception as error:  # whatever a driver or a compiler raises: the report says it
                found = {"the call": f"{type(error).__name__}: {error}".splitlines()[0]}
            report["check"][str(dtype)[6:]] = found
            problems += [f"{tensor} in {str(dtype)[6:]}: {verdict}" for tensor, verdict in found.items() if verdict != "ok"]
        report["rates"] = rates.measure(device, torch.bfloat16 if cuda else torch.float32)._asdict()
    report["ok"], report["summary"] = not problems, _summary(report, cuda, has_triton)
    text = json.dumps(report, indent=2)
    if to_stdout:
        print(text)
    else:
        if json_file:
            json_file.write_text(text + "\n", encoding="utf-8")
        _show(report)
    raise typer.Exit(1 if problems else 0)


def _target(arch: str | None, cuda: bool) -> Any:
    """The tuning.Device to compile for: of that name, or this machine's. None: there is none, or no Triton."""
    try:
        from .kernels import tuning
    except ModuleNotFoundError as missing:
        if arch is not None:
            raise UsageError(f"--arch: compiling needs {missing.name}: pip install {missing.name}") from missing
        return None
    if arch is not None:
        known = {str(name): device for name, device in tuning.DEVICES.items()}
        name = arch.lower().removeprefix("sm_").replace(".", "")
        if name not in known:
            raise UsageError(f"--arch: expected one of {', '.join(known)}, got {arch!r}")
        return known[name]
    return tuning.described(torch.cuda.get_device_properties(0)) if cuda else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"pyembed": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"cuda": torch.version.cuda, "rocm": torch.version.hip, "driver": _driver(), "system": platform.platform()}
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _described(device: torch.device) -> Report:
    if device.type == "cpu":
        return {"name": f"{platform.machine()} CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    names = ("total_memory", "multi_processor_count", "shared_memory_per_block_optin", "L2_cache_size", "warp_size")
    found = {name: getattr(properties, name, None) for name in names}
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}", **found}


def _tiles(target: Any) -> Report:
    """{family of tiles: how many configurations there are, and whether the device has the shared memory for all}"""
    from .kernels import tuning

    found: Report = {}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for M, (N, D), dtype, head in itertools.product(TOKENS, SIZES, dtypes, (0, 64, 128)):
        each = {
            "few": (tuning.few(M, N, D, dtype, target, bool(head), head), dtype, 0),
            "product": (tuning.product(M, N, D, dtype, target, bool(head), head), None, 0),
            "folded": (tuning.embed_qkv_folded(M, N, D, dtype, target, bool(head), head), None, 0),
            "project": (tuning.project(N, D, dtype, target), None, 0),
            "weight_grad": (tuning.weight_grad(N, D, dtype, target), None, 1),
        }
        for name, (tiles, table, spare) in each.items():
            row = found.setdefault(name, {"configurations": set(), "fit": True})
            row["configurations"].add((tiles, dtype))
            row["fit"] &= tuning.is_valid(tiles, dtype, target, table, spare)
    return {name: row | {"configurations": len(row["configurations"])} for name, row in found.items()}


def _launches(target: Any) -> list[Any]:
    """What GPT-2 small's front end and Llama-3-8B's launch in bf16: decode, prefill, training, every plan."""
    from . import ahead

    names = ("distinct", "distinct_grad", "embed", "embed_grad", "embed_qkv", "expand", "rotary")
    kernels = SimpleNamespace(**{name: importlib.import_module(f"{__package__}.kernels.{name}") for name in names})

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ids(M: int) -> torch.Tensor:
        return meta(1, M, dtype=torch.int64)

    def gpt(M: int) -> Call:
        terms = Terms(ids(M), meta(50257, 768), meta(1024 + M, 768))
        return Call(terms, Norm("layer", meta(768), meta(768), 1e-5), Projection(meta(2304, 768), meta(2304), 12, 12))

    def llama(M: int) -> Call:
        cos = meta(8192, 64, dtype=torch.float32)
        projection = Projection(meta(6144, 4096), None, 32, 8)
        return Call(
            Terms(ids(M), meta(128_256, 4096)), Norm("rms", meta(4096), None, 1e-5), projection, Epilogue(cos=cos, sin=cos)
        )

    def run() -> None:
        told = meta(6, dtype=torch.int64)
        for M, make in itertools.product((1, 512, 16_384), (gpt, llama)):
            kernels.embed_qkv.embed_qkv(make(M), (told, M))
        M, call = 4096, gpt(4096)
        kernels.embed.embed(call.terms, (told, M))
        *_, mean, rstd = kernels.embed_qkv.embed_qkv(call, (told, M))
        rows = meta(M, 768)
        kernels.embed_grad.norm_backward(call, mean, rstd, rows, rows, True, torch.bfloat16)
        kernels.embed_grad.table_grad(rows, meta(M, dtype=torch.int64), 50257)
        outputs = kernels.distinct.forward(call, report=(told, M))
        needs = {"token", "position", "weight", "bias", "norm_weight", "norm_bias"}
        kernels.distinct_grad.backward(call, outputs[:4], *outputs[4:], needs)
        table = call._replace(norm=Norm("layer", eps=1e-5))
        kernels.expand.look_up(table, meta(1024 + M + 50257, 2304), meta(2304, dtype=torch.float32), report=(told, M))
        turned = llama(M)
        kernels.rotary.turn_back(meta(1, M, 32, 128), turned.epilogue._replace(turn_ids=ids(M)))

    return list({launch.key(target): launch for launch in ahead.record(target, run)}.values())


def _compile(target: Any, update: Callable[..., None]) -> Report:
    """{kernel: how many variants were compiled, the seconds that took, the most shared memory, and the first error or None}"""
    import triton

    found: Report = {}
    launches = _launches(target)
    for place, launch in enumerate(launches):
        name = launch.kernel.__name__
        update(description=name, total=len(launches), completed=place)
        row = found.setdefault(name, {"variants": 0, "seconds": 0.0, "shared_memory": 0, "error": None})
        began = time.perf_counter()
        try:
            with triton.knobs.compilation.scope():
                triton.knobs.compilation.always_compile = True  # not what an earlier run left in Triton's cache
                shared = launch.compile(target).metadata.shared
            if shared > target.shared_memory:
                raise RuntimeError(f"it takes {shared:,} bytes of shared memory, of {target.shared_memory:,}")
            row["shared_memory"] = max(shared, row["shared_memory"])
        except Exception as error:  # whatever Triton raises: the report says it
            row["error"] = row["error"] or f"{type(error).__name__}: {error}".splitlines()[0]
        row["variants"] += 1
        row["seconds"] += time.perf_counter() - began
    return found


@torch.no_grad()
def _check(device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, str]:
    """{tensor: "ok" or what is wrong} of a small front end: hidden has PyTorch's bits, the others are within the budget of
    pyembed demo, and a second run has the same bits."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    V, D, heads, length = 101, 64, 2, 17
    ids = torch.randint(V, (2, length), generator=generator).to(device)
    tensors = {"token": draw(V, D), "position": draw(length, D), "norm_weight": draw(D), "norm_bias": draw(D)}
    tensors |= {"weight": draw(3 * D, D), "bias": draw(3 * D)}

    def run(embed_qkv: Callable[..., Any], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = embed_qkv(ids, **given, num_heads=heads, norm="layer")._asdict()
        return outputs

    exact = run(reference.embed_qkv, {name: x.double() for name, x in tensors.items()})
    eager = run(reference.embed_qkv, tensors)
    with settings.backend(backend):
        first, second = (run(functional.embed_qkv, tensors) for _ in range(2))
    found = {}
    for name, ours in first.items():
        found[name] = judge(ours, eager[name], exact[name], name == "hidden")["verdict"]
        if not torch.equal(ours.view(torch.uint8), second[name].view(torch.uint8)):
            found[name] = "a second run gives other bits"
    return found


def _summary(report: Report, cuda: bool, has_triton: bool) -> str:
    problems = report["problems"]
    if problems:
        return f"{len(problems)} problem{'s' * (len(problems) > 1)} found: {'; '.join(problems)}."
    compiled = f"the kernels compile for arch {report['target']['arch']}" if "target" in report else ""
    if cuda:
        return f"All is well: {compiled} and give the right results on {report['device']['name']}."
    if has_triton:
        compiled = f", {compiled}" if compiled else ""
        works = f"calls run by PyTorch's operators{compiled}, and the kernels' results are right in Triton's interpreter"
        return f"All is well, without a GPU: {works}."
    return "All is well, without a GPU and without triton: calls run by PyTorch's operators."


def _show(report: Report) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in report["versions"].items():
        facts.add_row(name, Text(value or "none"))
    for name, value in report["device"].items():
        facts.add_row("device" if name == "name" else name, f"{value:,}" if isinstance(value, int) else str(value))
    if "target" in report:
        facts.add_row(
            "compiled for", f"arch {report['target']['arch']}, {report['target']['shared_memory']:,} bytes of shared memory"
        )
        tiles = (
            f"{name} {row['configurations']}{'' if row['fit'] else ' DO NOT FIT'}" for name, row in report["tiles"].items()
        )
        facts.add_row("tiles", f"fit where nothing else is said; configurations: {', '.join(tiles)}")
        for name, row in report["kernels"].items():
            count = f"{row['variants']} variant{'s' * (row['variants'] > 1)}"
            facts.add_row(
                name, Text(row["error"] or f"compiled, {count}, {row['seconds']:.1f} s", "bold red" if row["error"] else "")
            )
    else:
        facts.add_row("kernels", "run in Triton's interpreter here; --arch 90 compiles them for an H100 that need not be there")
    for dtype, found in report["check"].items():
        line = ", ".join(f"{name} {'bit-equal' if name == 'hidden' and said == 'ok' else said}" for name, said in found.items())
        facts.add_row(f"{dtype} results", f"{line}; each twice, with the same bits")
    found = report["rates"]
    line = f"{found['flops'] / 1e12:.3g} TFLOP/s, gather {found['gather'] / 1e9:.3g} GB/s"
    line += f", fresh memory {found['fresh'] / 1e9:.3g} GB/s"
    facts.add_row("rates", f"{line}: what plans are chosen by")
    console = Console()
    console.print(facts)
    console.print(Text(f"\n{report['summary']}", "bold green" if report["ok"] else "bold red"))
