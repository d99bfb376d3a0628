"""`pyembed bench`: a front end of one's own widths, or a model of one's own, timed beside stock modules and torch.compile."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .. import __version__
from ..fuse.load import load_model
from ..options import DTYPES, UsageError, check_writable
from ..plans.table import available
from ..plot import Report, plot_times
from . import cases, peers, rows

STOCK = "stock modules"  # what the benchmark's rows call eager


def bench(
    shape: Annotated[str | None, typer.Option(metavar="V,D,HEADS[,KV_HEADS],B,T", help="A front end of these sizes.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help=f"One of: {', '.join(cases.MODELS)}.")] = None,
    fuse: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A whole model that the function returns, before and after fuse."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences, of --model and --fuse.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence, of --model and --fuse.")] = 256,
    norm: Annotated[Literal["layer", "rms"], typer.Option(help="LayerNorm or RMSNorm, of --shape.")] = "layer",
    rotary: Annotated[bool, typer.Option("--rotary", help="Rotary positions instead of a learned table, of --shape.")] = False,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text for the ids; default: Python's manual.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, fp16 or bf16; default: bf16 on a GPU, else fp32.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Time forward and backward instead of a forward alone.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="To time for, all variants together; compiling comes on top.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to FILE.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot the times: .png, .svg or .pdf.")] = None,
) -> None:
    """Time a front end, or a model of yours, beside stock modules and torch.compile. Default: GPT-2 small's front end.

    All run in turn in this process, and their results are compared first: a wrong one is an error. "% of limit" is the time
    that memory and matrix rates of this machine, measured too, ask for at least, over the time taken.
    Exit status: 0 measured, 1 a wrong result, 2 a wrong argument.
    """
    if sum(option is not None for option in (shape, model, fuse)) > 1:
        raise UsageError("expected one of --shape, --model and --fuse, got several")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _dtype(dtype, device)
    check_writable(text, json_file, plot)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("text", total=None)

        def tell(what: str, done: float | None = None) -> None:
            progress.update(task, description=what, total=None if done is None else 1.0, completed=done or 0.0)

        if fuse is None:
            front, batch, length = _front(shape, model, norm, rotary, batch, length)
            ids = _ids(text, front.V, batch, length).to(device)
            needed, free = rows.needed_bytes(front, ids.numel(), kind.itemsize, train), available(device)
            if needed > free:
                raise UsageError(f"it needs about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")
            wanted = {"eager", "torch.compile", peers.BOUND, *peers.PLANS}
            graphs = device.type == "cuda" and not train
            found, left_out = rows.front_end(front, ids, kind, train, wanted, seconds, graphs, tell)
            name = f"the front end of {front.name}"
        else:
            whole, ids = _whole(fuse, text, batch, length, kind, device)
            try:
                found, left_out = rows.fused_model(whole, ids, train, seconds, tell)
            except ValueError as error:
                raise UsageError(f"--fuse: {error}") from error
            name = fuse
    report = _report(name, ids, kind, train, found, left_out, text, device)
    try:
        if json_file:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if plot:
            plot_times(report, plot)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or 'the report'}: {error.strerror}") from error
    _show(report)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    if name not in DTYPES:
        raise UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _front(
    shape: str | None, name: str | None, norm: str, rotary: bool, batch: int, length: int
) -> tuple[cases.Model, int, int]:
    """-> widths, sequences and tokens per sequence."""
    if shape is None:
        name = name or "GPT-2 small"
        known = {each.lower(): each for each in cases.MODELS}
        if name.lower() not in known:
            raise UsageError(f"--model: expected one of {', '.join(cases.MODELS)}, got {name!r}")
        found = cases.MODELS[known[name.lower()]]
        if found.L and length > found.L:
            raise UsageError(f"--length: expected at most the {found.L:,} positions of {found.name}, got {length:,}")
        return found, batch, length
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (5, 6) or min(sizes) < 1:
        raise UsageError(f"--shape: expected 5 or 6 positive whole numbers V,D,HEADS[,KV_HEADS],B,T, got {shape!r}")
    V, D, heads, *grouped, batch, length = sizes
    (kv_heads,) = grouped or [heads]
    if D % heads:
        raise UsageError(f"--shape: expected a width D that its heads divide, got D {D} and {heads} heads")
    if heads % kv_heads:
        raise UsageError(f"--shape: expected KV_HEADS that divide HEADS, got {kv_heads} and {heads}")
    if rotary and D // heads % 2:
        raise UsageError(f"--rotary: expected heads of an even width, got D {D} / {heads} heads = {D // heads}")
    L = None if rotary else length
    return cases.Model(shape, V, D, heads, 1, 0, L, kv_heads, D // heads, norm, bias=norm == "layer"), batch, length


def _ids(path: Path | None, V: int, batch: int, length: int) -> Tensor:
    """(batch, length) ids below V: the text's tokens, over again where it has too few."""
    try:
        text = cases.read_text(path)
        tokens = cases.characters_of(text) if V < 100 else cases.tokens_of(text)
    except OSError as error:
        raise UsageError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text: {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not len(tokens):
        raise UsageError(f"--text: expected a text, got {path}, which holds no token")
    return cases.make_ids("natural", V, batch * length, tokens).view(batch, length)


def _whole(
    name: str, path: Path | None, batch: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """-> the model, and ids that it takes."""
    try:
        model = load_model(name).to(device, dtype)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"--fuse: {error}") from error
    tables = [module.weight.shape[0] for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise UsageError(f"--fuse: expected a model with an nn.Embedding, got {type(model).__name__} without one")
    ids = _ids(path, max(tables), batch, length).to(device)
    try:
        with torch.no_grad():
            rows._output(model.eval(), ids)
    except Exception as error:  # whatever the model raises
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--fuse: the model did not take ids of {batch} x {length} (--batch, --length): {why}") from error
    return model, ids


def _report(
    name: str,
    ids: Tensor,
    dtype: torch.dtype,
    trains: bool,
    found: dict[str, Any],
    left_out: dict[str, str],
    text: Path | None,
    device: torch.device,
) -> Report:
    versions = {"pyembed": __version__, "python": platform.python_version(), "torch": torch.__version__}
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    busy = [STOCK if variant == "eager" else variant for variant, row in found.items() if rows.busy(row)]
    return {
        "case": name,
        "shape": list(ids.shape),
        "tokens": ids.numel(),
        "distinct": ids.unique().numel(),
        "text": "pydoc_data.topics" if text is None else text.name,
        "dtype": str(dtype)[6:],
        "direction": "training" if trains else "forward",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else where,
        "versions": versions,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "variants": {STOCK if variant == "eager" else variant: row for variant, row in found.items()},
        "left_out": left_out,
        "busy": busy,
    }


def _show(report: Report) -> None:
    console = Console()
    console.width = max(console.width, 90)  # in a narrower terminal lines wrap, instead of columns being dropped
    B, T = report["shape"]
    title = (
        f"{report['case']}: {B} x {T} tokens, {report['distinct']:,} of them distinct, {report['dtype']}, {report['device']}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title), title_justify="left")
    table.add_column("variant", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for column in ("ms", "quartiles, ms", "x stock", "% of limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in rows.lines(report["variants"], STOCK):
        table.add_row(*line)
    console.print(table)
    for name, reason in report["left_out"].items():
        console.print(f"{name} was not measured: {reason}", markup=False, highlight=False, soft_wrap=True)
    for line in conclusions(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def conclusions(report: Report) -> list[str]:
    """Sentences about what was measured: what `auto` gains, and which rows are not to be believed."""
    variants, said = report["variants"], []
    direction = list(variants[STOCK]["seconds"])[-1]
    ratio = variants[STOCK]["seconds"][direction]["median"] / variants["auto"]["seconds"][direction]["median"]
    plan = variants["auto"].get("plan")
    how = f"auto, here {plan}" if plan else "auto"
    if not {STOCK, "auto"} & set(report["busy"]):
        said.append(f"pyembed as it is ({how}): {ratio:.2f} times as fast as stock modules.")
    if report["busy"]:
        which = "this row" if len(report["busy"]) == 1 else "these rows"
        said.append(
            f"The machine was too busy to believe {which}, also when measured again (quartiles more than 25 % apart, or "
            f"threads that waited for a core): {', '.join(report['busy'])}."
        )
    return said
