"""Tables and a figure from pytest-benchmark's JSON of bench_plans.py, and of bench_scaling.py where it is given.

    python bench/report.py plans.json [scaling.json] --out bench/results/DEVICE [--readme README.md]

Writes plans.md, scaling.md and scaling.png, and copies the JSON without single rounds' times and the machine's name. With
--readme the lines between <!-- plans --> and <!-- /plans --> become the short table; tests/test_report.py holds them to it.
"""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

SECTION = re.compile(r"(?<=^<!-- plans -->\n).*?(?=^<!-- /plans -->$)", re.M | re.S)
PLANS, SCALING = "case", "repeated"  # what the rows of one benchmark note, and those of the other do not
DIRECTIONS = ("forward", "forward+backward")
STYLES = {  # by variant: colour, marker, line; eager, torch.compile and one_pass may lie upon each other
    "eager": ("#1f2328", "o", "-"),
    "torch.compile": ("#8250df", "s", "--"),
    "one_pass": ("#e36f00", "^", ":"),
    "distinct": ("#0969da", "D", "-"),
    "table": ("#1a7f37", "v", "-"),
}


def main(
    plans: Annotated[Path, typer.Argument(metavar="PLANS.json", help="Of bench/bench_plans.py.")],
    scaling: Annotated[Path | None, typer.Argument(metavar="SCALING.json", help="Of bench/bench_scaling.py.")] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")],
    readme: Annotated[Path | None, typer.Option(metavar="FILE", help="Put the short table between its markers.")] = None,
):
    """Write plans.md, scaling.md, scaling.png and the JSON behind them."""
    documents = {path: json.loads(path.read_text(encoding="utf-8")) for path in (plans, scaling) if path}
    for path, key in ((plans, PLANS), (scaling, SCALING)):
        if path and not extra_infos(documents[path], key):
            raise typer.BadParameter(f"{path} has no row that notes {key!r}: is it of the right benchmark?")
    if readme and not SECTION.search(readme.read_text(encoding="utf-8")):
        raise typer.BadParameter(f"{readme} lacks the lines <!-- plans --> and <!-- /plans -->")
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "plans.md", plans_table(documents[plans]) + "\n" + provenance(documents[plans]))
    _write(out / "plans.json", _dump(documents[plans]))
    if scaling:
        _write(out / "scaling.md", scaling_table(documents[scaling]) + "\n" + provenance(documents[scaling]))
        _write(out / "scaling.json", _dump(documents[scaling]))
        draw(documents[scaling], out / "scaling.png")
    if readme:
        table = readme_table(documents[plans])
        _write(readme, SECTION.sub(lambda _: table, readme.read_text(encoding="utf-8")))


def extra_infos(document: dict, key: str) -> list[dict]:
    """What the benchmarks noted, in the file's order; of those that noted `key`."""
    return [row["extra_info"] for row in document["benchmarks"] if key in row["extra_info"]]


def plans_table(plans: dict) -> str:
    """Every row of bench_plans.py, as Markdown."""
    head = ["case", "tokens", "distinct", "direction", "plan", "stock, ms", "ours, ms", "stock / ours"]
    rows = []
    for row in extra_infos(plans, PLANS):
        counts = [f"{row['tokens']:,}", f"{row['distinct']:,}"]
        times = [milliseconds(row["stock_median"]), milliseconds(row["median"]), f"{row['ratio']:.2f}"]
        rows.append([row["case"], *counts, row["direction"], row["plan"], *times])
    return markdown(head, rows, "l r r l l r r r")


def readme_table(plans: dict) -> str:
    """Every case of bench_plans.py in one line with both its directions, as Markdown."""
    cases = {}
    for row in extra_infos(plans, PLANS):
        cases.setdefault(row["case"], []).append((row["direction"], row["plan"], f"{row['ratio']:.2f}"))
    rows = [[case, *(" / ".join(cells) for cells in zip(*found, strict=True))] for case, found in cases.items()]
    return markdown(["case", "direction", "plan", "times as fast as stock modules"], rows, "l l l r")


def scaling_table(scaling: dict) -> str:
    """A table for each direction of bench_scaling.py: milliseconds, and in brackets how many times as fast as eager."""
    parts, rows = [], extra_infos(scaling, SCALING)
    for direction, found in _by_direction(rows).items():
        names = _variants(found)
        lines = []
        for row in found:
            median, ratio = row["median"], row["ratio"]
            cells = [f"{milliseconds(median[name])} ({ratio[name]:.2f}×)" if name in median else "–" for name in names]
            lines.append([f"{row['tokens']:,}", f"{row['distinct']:,}{'*' if row['repeated'] else ''}", *cells])
        head = ["tokens", "distinct", *(f"{name}, ms" for name in names)]
        parts.append(f"## {direction}\n\n{markdown(head, lines, 'r ' * len(head))}")
    notes = ["In brackets: how many times as fast as eager. `table` is built before, and not for training.\n"]
    if any(row["repeated"] for row in rows):
        notes.append("\\* The text is shorter than this; it is repeated.\n")
    reasons = {f"{name}: {reason}.\n" for row in rows for name, reason in row.get("left_out", {}).items()}
    return "\n".join([*parts, *notes, *sorted(reasons)])


def provenance(document: dict) -> str:
    """What was measured where, as a Markdown list."""
    machine, commit = document.get("machine_info", {}), document.get("commit_info", {})
    cpu = machine.get("cpu", {})
    facts = {
        "CPU": f"{cpu.get('brand_raw', 'unknown')}, {cpu.get('count', 'unknown')} cores, {machine.get('threads')} threads",
        "Python": machine.get("python_version"),
        "torch": machine.get("torch"),
        "text": machine.get("text"),
        "date": document.get("datetime"),
        "commit": f"{commit.get('id')}{', with uncommitted changes' if commit.get('dirty') else ''}",
    }
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def milliseconds(seconds: float) -> str:
    """Three digits, and all before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:#.3g}".rstrip(".")


def markdown(head: list[str], rows: list[list[str]], alignments: str) -> str:
    rules = ["---" if alignment == "l" else "---:" for alignment in alignments.split()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rules, *rows))


def draw(scaling: dict, path: Path):
    """Time against tokens, both logarithmic: a panel for each direction, a line for each variant."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    panels = _by_direction(extra_infos(scaling, SCALING))
    figure = Figure((2.4 + 4.2 * len(panels), 4.8), dpi=160, layout="constrained")
    lines = {}
    for axis, (direction, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in _variants(rows):
            points = [(row["tokens"], row["median"][name] * 1e3) for row in rows if name in row["median"]]
            color, marker, line = STYLES.get(name, ("#59636e", "x", "-"))
            (lines[name],) = axis.loglog(*zip(*points, strict=True), color=color, marker=marker, ls=line, ms=5, label=name)
        axis.set_title(direction, loc="left")
        axis.set_xlabel("tokens")
        axis.set_ylabel("ms")
        axis.set_xticks(sorted({row["tokens"] for row in rows}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(color="#e6eaef")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False)
    machine = scaling.get("machine_info", {})
    brand = machine.get("cpu", {}).get("brand_raw", "CPU")
    figure.suptitle(f"GPT-2 small's front end on {brand}, {machine.get('threads')} threads, fp32", fontsize=11)
    figure.savefig(path)


def strip(document: dict) -> dict:
    """A copy without each round's time and the machine's name."""
    machine = {key: value for key, value in document["machine_info"].items() if key != "node"}
    benchmarks = [
        {**row, "stats": {key: value for key, value in row.get("stats", {}).items() if key != "data"}}
        for row in document["benchmarks"]
    ]
    return {**document, "machine_info": machine, "benchmarks": benchmarks}


def _by_direction(rows):
    found = {direction: [row for row in rows if row["direction"] == direction] for direction in DIRECTIONS}
    return {direction: sorted(those, key=lambda row: row["tokens"]) for direction, those in found.items() if those}


def _variants(rows):
    """Names of all variants, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row["median"]))


def _dump(document):
    return json.dumps(strip(document), indent=1, ensure_ascii=False) + "\n"


def _write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
