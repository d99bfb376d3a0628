"""The command line. `pyembed demo` runs the front end on a text, forward and backward, and checks every output and gradient.

From the same rounded weights it runs the one-pass kernel (`ours`), the plans `distinct` and `table` (by kernels on a GPU, by
PyTorch's operators on a CPU), and the PyTorch composition in the same dtype (`eager`) and in float64 (`exact`). An error is a
distance to `exact`; the budget for ours is derived from eager's error.
"""

import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor

from . import __version__, functional, reference, settings
from .call import HiddenQKV
from .data import get_encoding
from .fuse import fuse as fuse_model
from .fuse.load import load_model
from .modules.front_end import EmbeddingQKV
from .plot import Report, describe, plot_errors

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    print(f"error: the command line needs {missing.name}: pip install 'pyembed[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

from .benchmark.command import bench
from .budget import judge
from .doctor import doctor
from .options import DTYPES, UsageError, check_writable
from .vocabulary.commands import add_commands

T = TypeVar("T")
PARAMETERS = {  # argument of embed_qkv: parameter of EmbeddingQKV
    "token": "token.weight",
    "position": "position.weight",
    "norm_weight": "norm.weight",
    "norm_bias": "norm.bias",
    "weight": "qkv.weight",
    "bias": "qkv.bias",
}
COMPILED_CALLS = 21  # the first compiles; times are medians of the others

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program. Returns its exit status: 0 success, 1 a tensor over budget, 2 a usage error, 130 interrupted."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        return app(arguments or ["--help"], prog_name="pyembed", standalone_mode=False) or 0
    except UsageError as error:
        print("error:", " ".join(error.format_message().split()), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print("error: out of GPU memory, lower --batch, --length or --width:", str(error).split(". ")[0], file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyembed {__version__}")
        raise typer.Exit()


@app.callback()
def _pyembed(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, help="Print the version and exit.")] = False,
) -> None:
    """The front end of a transformer (embedding, position, norm, QKV projection) by fused Triton kernels."""


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; default: Python's manual.")] = None,
    encoding: Annotated[str, typer.Option(metavar="NAME", help="A tiktoken encoding: gpt2, cl100k_base, o200k_base.")] = "gpt2",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 64,
    width: Annotated[int | None, typer.Option(min=1, max=16_384, help="Model width D; default: 768, interpreted 256.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads; default: as many as query heads.")] = None,
    norm: Annotated[Literal["layer", "rms", "none"], typer.Option(help="LayerNorm, RMSNorm or none.")] = "layer",
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME[,NAME]", help="fp32, fp16, bf16 (GPU only); default: all that run here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and incoming gradients.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to FILE.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot the errors: .png, .svg or .pdf.")] = None,
) -> None:
    """Check the kernel on a text: every output and gradient against float64 and against PyTorch.

    Without a GPU the kernel runs in Triton's interpreter: a check of its results, not of its speed.
    Exit status: 0 all within budget, 1 a tensor over budget, 2 a wrong argument.
    """
    try:
        import triton
    except ModuleNotFoundError as error:
        raise UsageError("the kernel needs triton: pip install triton") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = device.type == "cuda" and not triton.knobs.runtime.interpret
    dtypes = _parse_dtypes(dtype, compiled)
    width = width or (768 if compiled else 256)  # interpreted, 768 takes a minute and a half on two cores
    heads = width // 64 if width % 64 == 0 else max(h for h in range(1, max(width // 32, 1) + 1) if width % h == 0)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise UsageError(f"--kv-heads: expected a divisor of the {heads} heads that width {width} has, got {kv_heads}")
    check_writable(text, json_file, plot)

    ids, vocabulary, source = _read_tokens(text, encoding, batch, length)
    shape = {"batch": batch, "length": length, "tokens": ids.numel(), "distinct_tokens": ids.unique().numel()}
    shape |= {"width": width, "heads": heads, "kv_heads": kv_heads, "norm": norm}
    shape |= {"vocabulary": vocabulary, "positions": max(length, 1024)}
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("weights", total=5 * len(dtypes))
        problem = ids.to(device), *_draw(shape, seed, device), shape
        calls, step = COMPILED_CALLS if compiled else 1, functools.partial(progress.update, task, advance=1)
        results = {name: _check(name, *problem, calls, step) for name in dtypes}

    versions = {"pyembed": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "triton": triton.__version__}
    every = [tensors for result in results.values() for tensors in (result["tensors"], *result["plans"].values())]
    verdicts = [row["verdict"] for tensors in every for row in tensors.values()]
    over = sum(verdict != "ok" for verdict in verdicts)
    report = {
        "passed": not over,
        "summary": f"{over or 'none'} of {len(verdicts)} tensors over budget",
        "mode": "compiled" if compiled else "interpreter",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": versions,
        "text": source,
        "shape": shape,
        "seed": seed,
        "dtypes": results,
    }
    try:
        try:
            if json_file:
                finite = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN
                json_file.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
            if plot:
                plot_errors(report, plot)
        finally:
            _show(report)  # last: a closed pipe, as of `| head`, ends the program here
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or 'the report'}: {error.strerror}") from error
    raise typer.Exit(0 if report["passed"] else 1)


@app.command()
def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="module:function that makes one, or GPT2Config, LlamaConfig …")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 8,
) -> None:
    """Fuse a model's front end and print what was found, or why not. Exit status: 0 fused, 1 not, 2 a wrong argument."""
    try:
        found = fuse_model(load_model(model), torch.arange(batch * length).view(batch, length) % 7)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"MODEL: {error}") from error
    Console().print(str(found), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found.why_not is None else 1)


app.command()(doctor)
app.command()(bench)
add_commands(app)


def _parse_dtypes(given: list[str] | None, compiled: bool) -> list[str]:
    if not given:
        return ["fp32", "fp16", "bf16"] if compiled else ["fp32", "fp16"]
    names = list(dict.fromkeys(name.strip() for names in given for name in names.split(",")))
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"--dtype: expected names out of {', '.join(DTYPES)}, got {name!r}")
    if "bf16" in names and not compiled:
        raise UsageError("--dtype bf16: only a GPU can run it, Triton's interpreter multiplies it wrongly; use fp32 or fp16")
    return names


def _read_tokens(path: Path | None, encoding: str, batch: int, length: int) -> tuple[Tensor, int, Report]:
    """-> the text's first ids (batch, length), the encoding's vocabulary size, and the report's entry about the text."""
    if path is None:
        import pydoc_data.topics

        name, text = "Python's manual (pydoc_data.topics)", "\n".join(pydoc_data.topics.topics.values())
    else:
        name = str(path).encode(errors="replace").decode()  # a file name may be invalid UTF-8
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--text: cannot read {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--text: {name} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        encoder = get_encoding(encoding)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UsageError(f"--encoding: {error}") from error
    ids = encoder.encode(text, allowed_special="all")
    if len(ids) < batch * length:
        raise UsageError(
            f"--text: {name} holds {len(ids):,} tokens of {encoding}, and {batch} x {length} = {batch * length:,} are needed: "
            "lower --length or --batch"
        )
    source = {"name": name, "encoding": encoding, "tokens": len(ids)}
    return torch.tensor(ids[: batch * length]).view(batch, length), encoder.n_vocab, source


def _draw(shape: Report, seed: int, device: torch.device) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Random weights, N(0, 0.02²) as in GPT-2, biases and norm not the identity, and incoming gradients, N(0, 1); all fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, mean: float = 0.0, std: float = 0.02) -> Tensor:
        return torch.empty(size).normal_(mean, std, generator=generator).to(device)

    D, heads, kv_heads = shape["width"], shape["heads"], shape["kv_heads"]
    N = (heads + 2 * kv_heads) * (D // heads)
    parameters = {"token": normal(shape["vocabulary"], D), "position": normal(shape["positions"], D)}
    if shape["norm"] != "none":
        parameters["norm_weight"] = normal(D, mean=1.0, std=0.1)
    if shape["norm"] == "layer":
        parameters["norm_bias"] = normal(D)
    parameters |= {"weight": normal(N, D), "bias": normal(N)}
    batch, length = shape["batch"], shape["length"]
    incoming = [normal(batch, length, D, std=1.0)]
    incoming += [normal(batch, length, h, D // heads, std=1.0) for h in (heads, kv_heads, kv_heads)]
    return parameters, incoming


def _check(
    name: str,
    ids: Tensor,
    parameters: dict[str, Tensor],
    incoming: list[Tensor],
    shape: Report,
    calls: int,
    step: Callable[..., None],
) -> Report:
    """Errors and verdicts of every plan, and seconds, for one dtype. Calls step(description=…) five times."""
    parameters = {key: value.to(DTYPES[name]) for key, value in parameters.items()}
    incoming = [gradient.to(DTYPES[name]) for gradient in incoming]
    norm = None if shape["norm"] == "none" else shape["norm"]
    options = {"num_heads": shape["heads"], "num_kv_heads": shape["kv_heads"], "norm": norm}
    step(description=f"{name}: PyTorch in float64")
    wide = {key: value.double() for key, value in parameters.items()}, [gradient.double() for gradient in incoming]
    exact, _ = _run(reference.embed_qkv, ids, *wide, options, 1)
    del wide  # a table of 309 MB at the default shape
    step(description=f"{name}: PyTorch")
    eager, eager_seconds = _run(reference.embed_qkv, ids, parameters, incoming, options, calls)
    step(description=f"{name}: Triton")
    with settings.backend("triton"):
        ours, ours_seconds = _run(functional.embed_qkv, ids, parameters, incoming, options, calls)
    step(description=f"{name}: the other plans")
    others = {}
    with settings.plan("distinct"):
        others["distinct"], _ = _run(functional.embed_qkv, ids, parameters, incoming, options, 1)
    others["table"] = _look_up(ids, parameters, shape, norm)
    step(description=f"{name}: comparing")

    def judged(found: dict[str, Tensor]) -> Report:
        return {key: judge(found[key], eager[key], exact[key], key == "hidden") for key in found}

    plans = {plan: judged(found) for plan, found in others.items()}
    return {"tensors": judged(ours), "plans": plans, "seconds": {"ours": ours_seconds, "eager": eager_seconds}}


@torch.no_grad()
def _look_up(ids: Tensor, parameters: dict[str, Tensor], shape: Report, norm: str | None) -> dict[str, Tensor]:
    """Outputs of the `table` plan, which has no gradients."""
    sizes = shape["vocabulary"], shape["width"], shape["heads"]
    options = {"num_kv_heads": shape["kv_heads"], "max_length": shape["positions"], "norm": norm}
    front = EmbeddingQKV(*sizes, **options, device="meta", dtype=parameters["token"].dtype)
    front.load_state_dict({PARAMETERS[key]: value for key, value in parameters.items()}, assign=True)
    with settings.plan("table"):
        return front(ids)._asdict()


def _run(
    embed_qkv: Callable[..., HiddenQKV],
    ids: Tensor,
    parameters: dict[str, Tensor],
    incoming: Sequence[Tensor],
    options: dict[str, Any],
    calls: int,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """-> outputs and gradients by name, and the seconds of forward and backward."""
    parameters = {key: value.detach().requires_grad_() for key, value in parameters.items()}
    outputs, forward = _time(lambda: embed_qkv(ids, **parameters, **options), calls)
    leaves = tuple(parameters.values())
    grads, backward = _time(lambda: torch.autograd.grad(outputs, leaves, incoming, retain_graph=True), calls)
    named = {name: output.detach() for name, output in outputs._asdict().items()}
    named |= {f"{PARAMETERS[name]}.grad": grad for name, grad in zip(parameters, grads, strict=True)}
    return named, {"forward": forward, "backward": backward}


def _time(call: Callable[[], T], calls: int) -> tuple[T, float]:
    """The last result and the median seconds of a call, without the first call if there are several."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    result: Any = None
    for _ in range(calls):
        result = None  # freed before the next one is computed
        synchronise()
        start = time.perf_counter()
        result = call()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds[1:] or seconds)


def _show(report: Report) -> None:
    console = Console()
    console.width = max(console.width, 60)  # in a narrower terminal lines wrap, instead of columns being dropped
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Largest error against float64", title_justify="left")
    table.add_column(no_wrap=True, min_width=4)
    table.add_column("tensor", overflow="fold")
    for column in ("ours", "eager", "budget"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=5)
    for name, result in report["dtypes"].items():
        for tensor, row in result["tensors"].items():
            errors = [f"{row[who]['max']:.1e}" for who in ("ours", "eager", "budget")]
            ok = row["verdict"] == "ok"
            verdict = "ok, bit-equal" if ok and "bit_equal" in row else row["verdict"]
            table.add_row(name if tensor == "hidden" else "", tensor, *errors, Text(verdict, "green" if ok else "bold red"))
        table.add_section()
    console.print(table)

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("ours", "the fused kernels, by the plan one_pass (other plans: below)")
    facts.add_row("eager", "PyTorch's operators")
    facts.add_row("budget", "2 x eager's error + eps x the largest value; likewise for the RMS")
    for key, value in describe(report).items():
        facts.add_row(key, Text(value.encode(console.encoding, "backslashreplace").decode(console.encoding)))
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for name, result in report["dtypes"].items():
        for plan, tensors in result["plans"].items():
            over = [f"{tensor} {row['verdict']}" for tensor, row in tensors.items() if row["verdict"] != "ok"]
            share, worst = max((row["ours"]["max"] / (row["budget"]["max"] or 1.0), tensor) for tensor, row in tensors.items())
            line = ", ".join(over) or f"{len(tensors)} tensors within budget, closest to it at {share:.0%}: {worst}"
            facts.add_row(f"{name} {plan}", Text(line, "bold red" if over else ""))
        for direction in ("forward", "backward"):
            ours, eager = (result["seconds"][who][direction] for who in ("ours", "eager"))
            line = f"ours {ours:.1f} s (interpreted, not a speed), eager {eager:.3f} s (cold)"
            if report["mode"] == "compiled":
                line = f"ours {ours * 1e3:.3f} ms, eager {eager * 1e3:.3f} ms (medians of {COMPILED_CALLS - 1} calls)"
            facts.add_row(f"{name} {direction}", line)
    console.print(facts)
    console.print(Text(f"\n{report['summary']}", "bold green" if report["passed"] else "bold red"))
