"""The commands `pyembed tokens` and `pyembed vocabulary cost | report`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..fuse.load import load_model
from ..options import DTYPES, UsageError, check_plot
from .cost import Cost
from .cost import cost as cost_of
from .encodings import CATEGORIES, readable
from .pieces import Piece, Trap, count, pieces, traps
from .untrained import Report, read_tables
from .untrained import report as report_of

COLOURS = ["on blue", "on magenta", "on cyan", "on green", "on yellow"]
LISTED = 50  # untrained tokens that the table names

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Encoding = Annotated[str, typer.Option(metavar="NAME", help="A tiktoken encoding: gpt2, cl100k_base, o200k_base.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")]

app = typer.Typer(invoke_without_command=True)


@app.callback()
def _vocabulary(context: typer.Context) -> None:
    """Show what a vocabulary costs, and find tokens that were never trained."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def add_commands(program: typer.Typer) -> None:
    program.command()(tokens)
    program.add_typer(app, name="vocabulary")


def tokens(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads standard input.")],
    encoding: Encoding = "gpt2",
    model_size: Annotated[int | None, typer.Option(min=1, metavar="V", help="Rows of the model's table.")] = None,
    as_json: Json = False,
) -> None:
    """Show the tokens of a text, and the traps that are in it. Exit status: 0, or 2 for a wrong argument."""
    text = _read(text)
    try:
        found, told = pieces(text, encoding), traps(text, encoding, model_size)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UsageError(f"--encoding: {error}") from error
    if as_json:
        listed = [{"id": p.id, "bytes": p.data.hex(), "text": p.text, "start": p.start} for p in found]
        _print_json({"encoding": encoding, "tokens": listed, "traps": [trap._asdict() for trap in told]})
    else:
        _show_tokens(text, found, told, encoding)


def _read(text: str) -> str:
    data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"TEXT: expected UTF-8, got {error.reason} at byte {error.start}") from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))  # ASCII: any terminal takes it


def _plain(console: Console, text: str) -> str:
    """Text that a terminal shows as characters: what is not printable, or not in its encoding, as \\x or \\u."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _show_tokens(text: str, found: list[Piece], told: list[Trap], encoding: str) -> None:
    console = Console()
    line = Text()
    for i, piece in enumerate(found):
        shown = _plain(console, readable(piece.data))
        if console.is_terminal:
            colour = f"black {COLOURS[i % len(COLOURS)]}" if piece.text is not None else "bold white on red"
            line.append(shown.replace(" ", "·"), colour).append(f"{piece.id} ", "dim")
        else:
            console.print(f"{piece.id:>8}  '{shown}'", markup=False, highlight=False, soft_wrap=True)
    if line:
        console.print(line)
    sizes = f"{count(len(text), 'character')}, {count(len(text.encode()), 'byte')}"
    console.print(Text(f"{count(len(found), 'token')} of {encoding}, {sizes}", "bold"))
    for trap in told:
        console.print(Text.assemble((f"{trap.name}: ", "bold yellow"), _plain(console, trap.message)))
    if not told:
        console.print(Text("no traps", "green"))


@app.command()
def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .safetensors file, or module:function that makes a model.")],
    encoding: Annotated[str | None, typer.Option(metavar="NAME", help="Its encoding: gpt2, cl100k_base, o200k_base.")] = None,
    unused: Annotated[str, typer.Option(metavar="IDS", help="Ids known to be unused, as 1,5,10-20.")] = "",
    table: Annotated[str | None, typer.Option(metavar="NAME", help="Of the file: the table's tensor.")] = None,
    head: Annotated[str | None, typer.Option(metavar="NAME", help="Of the file: the head's tensor.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Find tokens that were never trained. Exit status: 0, 1 if it cannot tell, 2 for a wrong argument."""
    check_plot(plot)
    known = _ids(unused)
    is_made = model.endswith("Config") or ":" in model and not Path(model).exists()
    if is_made and (table is not None or head is not None):
        raise UsageError(
            f"{'--head' if table is None else '--table'}: expected a file's tensor, got a model that is made, {model}"
        )
    try:
        if is_made:
            made = report_of(load_model(model), encoding=encoding, unused=known)
        else:
            made = report_of(*read_tables(model, table, head), encoding=encoding, unused=known)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"MODEL: {error}") from error
    _draw(plot, lambda path: _pictures().plot_report(made, f"{Path(model).name}: {_summary(made)}", path))
    if as_json:
        _print_json(made.as_dict())
    else:
        _show_report(made)
    raise typer.Exit(0 if made.why is None else 1)


def _ids(text: str) -> list[int]:
    found: list[int] = []
    try:
        for part in filter(None, text.replace(" ", "").split(",")):
            first, dash, last = part.partition("-")
            ids = range(int(first), int(last if dash else first) + 1)
            if not ids:
                raise ValueError
            found += ids
    except ValueError:
        raise UsageError(f"--unused: expected ids as 1,5,10-20, got {text!r}") from None
    return found


def _summary(made: Report) -> str:
    if made.untrained is None:
        return "cannot tell which tokens were trained"
    return f"{len(made.untrained) or 'no'} token{'s' * (len(made.untrained) != 1)} that text can have look untrained"


def _show_report(made: Report) -> None:
    console = Console()
    kind = "the table is the head" if made.tied else "table and head"
    console.print(f"{made.rows:,} rows of {made.width:,}, {kind}, {len(made.known):,} known to be unused", highlight=False)
    table = Table("indicator", "untrained is", "known", "others", "AUC", "cut", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in made.indicators:
        cut = f"{one.cut:.3g}" if one.used else "misleads, not used" if one.misleads else "not used"
        numbers = ["" if number != number else f"{number:.3g}" for number in (one.known, one.rest, one.auc)]
        table.add_row(one.name, "lower" if one.lower else "higher", *numbers, cut)
    console.print(table)
    if made.encoding is not None:
        table = Table("category", "ids", "look untrained", "", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, (ids, looks) in made.counts().items():
            table.add_row(name, f"{ids:,}", "?" if looks is None else f"{looks:,}", CATEGORIES[name])
        console.print(table)
    for id in (made.untrained or [])[:LISTED]:
        text = made.text(id)
        console.print(Text(f"{id:>8}  ").append("" if text is None else _plain(console, repr(text))))
    if made.untrained and len(made.untrained) > LISTED:
        console.print(f"     and {len(made.untrained) - LISTED:,} more: --json has all", highlight=False)
    if made.why is not None:
        console.print(Text(f"cannot tell: {made.why}", "bold yellow"))
    else:
        console.print(Text(_summary(made), "bold red" if made.untrained else "bold green"))


@app.command()
def cost(
    sizes: Annotated[str, typer.Option(metavar="V[,V]", help="Rows of the vocabularies.")] = "32000,50257,128256",
    width: Annotated[int, typer.Option(min=1, max=65_536, help="Model width D.")] = 768,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 64,
    tied: Annotated[bool, typer.Option("--tied", help="The table is the head too.")] = False,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of weights, gradients and state.")] = "fp32",
    measure: Annotated[bool, typer.Option(help="Measure times too, which takes the memory.")] = True,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Show what a vocabulary costs: memory of table, head, gradients and AdamW's state, and the time of each part of a step."""
    check_plot(plot)
    rows = _sizes(sizes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"tokens": tokens, "tied": tied, "dtype": DTYPES[dtype], "device": device, "measure": measure}
    try:
        costs = [cost_of(size, width, **options) for size in rows]
    except RuntimeError as error:
        raise UsageError(f"--sizes: it does not fit, --no-measure only counts: {str(error).splitlines()[0]}") from error
    title = f"width {width:,}, {dtype}{', tied' * tied}, {tokens:,} tokens a step on {device.type}"
    _draw(plot, lambda path: _pictures().plot_costs(costs, f"A vocabulary of {title}", path))
    if as_json:
        facts = {"width": width, "tokens": tokens, "tied": tied, "dtype": dtype, "device": device.type}
        _print_json({**facts, "sizes": [{**one._asdict(), "total": one.total} for one in costs]})
    else:
        _show_costs(costs, title)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.replace("_", "").split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > 2**31:
        raise UsageError(f"--sizes: expected positive numbers, as 32000,50257, got {text!r}")
    return sizes


def _show_costs(costs: list[Cost], title: str) -> None:
    console = Console()
    console.width = max(console.width, 80)  # in a narrower terminal lines wrap, instead of numbers being cut
    measured = costs[0].step_ms is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title + "; times in ms" * measured, title_justify="left")
    for name in ("rows", "table", "head", "grads", "AdamW", "total", *("lookup", "head", "AdamW") * measured):
        table.add_column(name, justify="right", no_wrap=True)
    for one in costs:
        bytes = [one.table, one.head, one.gradients, one.optimizer, one.total]
        seconds = [time for time in (one.lookup_ms, one.head_ms, one.step_ms) if time is not None]
        table.add_row(
            f"{one.size:,}", *map(_size, bytes), *(f"{number:.3g}" if number < 1000 else f"{number:,.0f}" for number in seconds)
        )
    console.print(table)


def _size(bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if bytes < 999.5:
            return f"{bytes:.3g} {unit}"
        bytes /= 1000
    return f"{bytes:,.0f} TB"


# Pictures


def _pictures() -> Any:
    from . import pictures

    return pictures


def _draw(path: Path | None, draw: Callable[[Path], None]) -> None:
    if path is None:
        return
    try:
        draw(path)
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from error
