"""Turns the JSON of the benchmark suite into a report: tables, figures, and the table in README.

    python -m pytest bench && python bench/report.py bench.json [--into FOLDER] [--readme README.md]

Writes report.md, gain.png, time.png, limit.png, map.png and a copy of the JSON without the machine's name to ./report, or to
FOLDER; the repository's own results are bench/results/DEVICE. --readme replaces the lines between <!-- measured --> and
<!-- /measured --> with the short table; tests/tools/test_report.py checks that README shows it.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pyembed.benchmark import roofline
from pyembed.benchmark.cases import MODELS
from pyembed.benchmark.rows import is_busy

SECTION = re.compile(r"(?<=^<!-- measured -->\n).*?(?=^<!-- /measured -->$)", re.M | re.S)
DIRECTIONS = ("forward", "forward+backward")
OURS = ("one_pass", "distinct", "table", "auto")
SUITES = {
    "Front end": "front end",
    "Embedding tables": "embedding",
    "Host time of a call": "host",
    "Whole models": "step",
    "Data loader": "data",
    "Vocabulary": "vocabulary",
}
OTHER = ("#59636e", "x", "-")  # the style of any other variant
UNMAPPED = ("linear alone", "table", "auto")  # variants that map.png leaves out
FIGURES = ("gain.png", "time.png", "limit.png", "map.png")
BUSY = " ~"  # behind what was measured while something else used the machine
LEAST_POINTS = 4  # sizes that a model needs to be drawn in time.png and limit.png
STYLES = {  # variant: colour, marker, line style; eager, torch.compile and one_pass often overlap
    "eager": ("#1f2328", "o", "-"),
    "torch.compile": ("#8250df", "s", "--"),
    "max-autotune": ("#bf3989", "P", "--"),
    "linear alone": ("#9a6700", "x", ":"),
    "one_pass": ("#e36f00", "^", ":"),
    "distinct": ("#0969da", "D", "-"),
    "table": ("#1a7f37", "v", "-"),
}


def main(
    measured: Annotated[Path, typer.Argument(metavar="BENCH.json", help="The JSON file that `python -m pytest bench` saved.")],
    *,
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write.")] = Path("report"),
    readme: Annotated[Path | None, typer.Option(metavar="FILE", help="Replace the short table in this README.")] = None,
):
    """Write report.md, its figures and the JSON that they come from."""
    try:
        document = json.loads(measured.read_text(encoding="utf-8"))
        known = bool(document["benchmarks"]) and all("suite" in row["extra_info"] for row in document["benchmarks"])
    except (KeyError, OSError, TypeError, ValueError):
        known = False
    if not known:
        raise typer.BadParameter(f"{measured}: expected what `python -m pytest bench` saved")
    has_fronts = bool(rows_of(document, "front end"))
    if readme and not has_fronts:
        raise typer.BadParameter(f"{measured}: expected rows of the front end, which README's table shows")
    if readme and not SECTION.search(readme.read_text(encoding="utf-8")):
        raise typer.BadParameter(f"{readme} lacks the lines <!-- measured --> and <!-- /measured -->")
    into.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:  # of another run
        (into / name).unlink(missing_ok=True)
    _write(into / "report.md", report(document))
    _write(into / "bench.json", json.dumps(strip(document), indent=1, ensure_ascii=False) + "\n")
    if has_fronts:
        draw_gain(document, into / "gain.png")
        draw_lines(document, into / "time.png", "ms", lambda row, d: row["seconds"][d]["median"] * 1e3)
        draw_lines(
            document, into / "limit.png", "% of limit", lambda row, d: 100 * row["limit"][d] / row["seconds"][d]["median"]
        )
        draw_map(document, into / "map.png")
    written = [name for name in ("report.md", "bench.json", *FIGURES) if (into / name).exists()]
    print(f"wrote {', '.join(written)} to {into}")
    if readme:
        table = readme_table(document)
        _write(readme, SECTION.sub(lambda _: table, readme.read_text(encoding="utf-8")))


def rows_of(document, *suites):
    """extra_info of the benchmarks in these suites, in the file's order."""
    found = [row["extra_info"] for row in document["benchmarks"]]
    return [row for row in found if row.get("suite") in suites]


def cells(row, direction):
    """{variant: its measurements}, of the variants that have this direction."""
    return {name: found for name, found in row["variants"].items() if direction in found["seconds"]}


def median(found, direction):
    return found["seconds"][direction]["median"]


def mark(*found, direction):
    """BUSY if another program used the machine during any of these measurements."""
    return BUSY if any(is_busy(each, direction) for each in found) else ""


def ratio(found, slower, faster, direction):
    """How many times as fast the one variant is as the other, as a number and as text, which has the mark."""
    times = median(found[slower], direction) / median(found[faster], direction)
    return times, f"{times:.2f}{mark(found[slower], found[faster], direction=direction)}"


def report(document):
    """The whole of report.md."""
    directions = ("forward", "training forward", "backward", "forward+backward")
    sections = []
    for title, suite in SUITES.items():
        sections += [(f"{title}, {d}", times(rows_of(document, suite), d)) for d in directions]
    sections += [("Memory in training", memory(rows_of(document, "front end", "embedding", "vocabulary")))]
    sections += [("The front end's share of a whole model's floating-point operations, forward", shares())]
    sections += [("Not measured", left_out(document))]
    parts = [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n".join(["# Benchmark results\n", provenance(document), EXPLAINED, *parts])


EXPLAINED = """\
Times are milliseconds where no unit is given: the median over the rounds of a row, in each of which all its variants run, in
another order. In brackets: how many times as fast as the first column. In the tables of front ends and of embedding
tables, the percentage is the share of the limit that a variant reaches. The limit is the larger of two times: the bytes that
must be moved over this machine's copy rate, and the operations over its matrix product rate
(pyembed/benchmark/roofline.py). Each plan has its own operations; data that fits in a cache may exceed 100 %.
`linear alone` multiplies rows that are already normalised: a lower bound for the time of any plan that projects every token.
`table` is built before the timing starts, and cannot train. `auto` is followed by the plan that it chose. `~`: something else
used the machine meanwhile (the third quartile is more than 1.25 times the first). On a GPU, forward rows replay CUDA graphs
with a cold L2 cache, all variants of a row or none; training rows run without graphs, so for a few tokens they measure the
host. Bytes saved for backward include ids, but neither weights nor results.
"""


def times(rows, direction):
    """A Markdown table, one line per row: milliseconds, (speedup over the first variant), percentage of the limit."""
    rows = [row for row in rows if cells(row, direction)]
    names = ordered(name for row in rows for name in cells(row, direction))
    lines = []
    for row in rows:
        found = cells(row, direction)
        first = median(next(iter(found.values())), direction)
        line = [row["case"] + _kind(row), f"{row.get('distinct', ''):,}" if "distinct" in row else ""]
        for name in names:
            if name not in found:
                line.append("–")
                continue
            seconds = median(found[name], direction)
            limit = found[name].get("limit", {}).get(direction)
            plan = f" {found[name]['plan']}" if name == "auto" and "plan" in found[name] else ""
            text = f"{seconds * 1e6:.1f} µs" if row["suite"] == "host" else milliseconds(seconds)
            text += f" ({first / seconds:.2f}×)" + mark(found[name], direction=direction)
            line.append(text + (f" {100 * limit / seconds:.0f} %" if limit else "") + plan)
        lines.append(line)
    return markdown(["case", "distinct ids", *names], lines, "l" + " r" * (1 + len(names))) if lines else ""


def ordered(names):
    """Without duplicates: in the order of STYLES, then in the order of appearance."""
    names = list(dict.fromkeys(names))
    return sorted(names, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def _kind(row):
    kind = "" if row.get("ids", "natural") == "natural" or row["suite"] != "front end" else f", {row['ids']} ids"
    return kind + ("" if row.get("dtype", "float32") == "float32" else f", {row['dtype']}")


def memory(rows):
    """A Markdown table: bytes per token that forward saves for backward, and the peak memory of a training step in MiB."""
    rows = [row for row in rows if row["direction"] == "training" and "tokens" in row]
    names = ordered(name for row in rows for name in row["variants"] if name != "linear alone")
    lines = []
    for row in rows:
        line = [row["case"] + _kind(row)]
        for name in names:
            found = row["variants"].get(name)
            peak = "–" if found is None or found["peak"] is None else f"{found['peak'] / 2**20:,.0f}"
            saved = "–" if found is None or "saved" not in found else f"{found['saved'] / row['tokens']:,.0f}"
            line.append("–" if found is None else f"{saved}, {peak}")
        lines.append(line)
    head = ["bytes saved per token, peak MiB", *names]
    return markdown(head, lines, "l" + " r" * len(names)) if lines else ""


def shares():
    lines = []
    for model in MODELS.values():
        T = min(1024, model.L or 1024)
        whole, draft = (roofline.share(model, T, layers) for layers in (model.layers, 1))
        lines.append([model.name, f"{model.layers}", f"{T:,}", f"{100 * whole:.1f} %", f"{100 * draft:.1f} %"])
    return markdown(["model", "layers", "tokens", "share", "share with one layer"], lines, "l r r r r")


def left_out(document):
    reasons = {}
    for row in rows_of(document, "front end", "embedding", "host", "step"):
        for name, reason in row["left_out"].items():
            reasons.setdefault((name, reason), []).append(f"{row['case']}{_kind(row)} {row['direction']}")
    for name, reason in document.get("not_measured", {}).items():
        reasons.setdefault(("entire rows", reason), []).append(name)
    notes = [f"- {name}: {reason} ({len(cases)} rows, for example {cases[0]})\n" for (name, reason), cases in reasons.items()]
    if "gpu" not in document["machine_info"]:
        notes.append("- All GPU rows: this machine has no GPU.\n")
    return "".join(notes) or "- nothing\n"


def readme_table(document):
    """One line per front end, both directions: the speedup of "auto", and of the table plan with its table built beforehand."""
    merged = {}
    for row in rows_of(document, "front end"):
        direction = DIRECTIONS[row["direction"] == "training"]
        found = cells(row, direction)
        ours = found["auto"]
        ratios = [ratio(found, n, "auto", direction)[1] if n in found else "–" for n in ("eager", "torch.compile")]
        table = ratio(found, "eager", "table", direction)[1] if "table" in found else None
        percent = 100 * ours["limit"][direction] / median(ours, direction)
        cell = (direction, ours["plan"], *ratios, f"{percent:.0f}{mark(ours, direction=direction)}")
        merged.setdefault(row["case"] + _kind(row), []).append((cell, table))
    lines = []
    for case, both in merged.items():
        columns = (" / ".join(column) for column in zip(*(cell for cell, _ in both), strict=True))
        lines.append([case, *columns, next((table for _, table in both if table), "–")])
    head = ["case", "direction", "plan", "× stock modules", "× torch.compile", "% of limit", "`table` plan, × stock modules"]
    return markdown(head, lines, "l l l r r r r")


def provenance(document):
    """Hardware, versions, date and commit, as a Markdown list."""
    machine, commit = document["machine_info"], document.get("commit_info", {})
    cpu = machine.get("cpu", {})
    rates = machine.get("rates", {})
    facts = {
        "GPU": machine.get("gpu"),
        "driver, CUDA": machine.get("gpu") and f"{machine.get('driver_version')}, {machine.get('cuda')}",
        "maximum clocks (SM, memory), power limit": machine.get("gpu")
        and f"{machine.get('clocks.max.sm')} and {machine.get('clocks.max.mem')} MHz, {machine.get('power.limit')} W",
        "SM clock during the run": clocks_seen(document),
        "CPU": f"{cpu.get('brand_raw', 'unknown')}, {cpu.get('count', 'unknown')} cores, {machine.get('threads')} threads",
        **{
            f"measured rates, {dtype}": f"copy {r['copy'] / 1e9:,.1f} GB/s, matrix product {r['flops'] / 1e12:,.3f} TFLOP/s"
            for dtype, r in rates.items()
        },
        "Python": machine.get("python_version"),
        "torch": machine.get("torch"),
        "triton": machine.get("triton"),
        "load average at the start": machine.get("load") and f"{machine['load']:.2f}",
        "text": machine.get("text"),
        "date": document.get("datetime"),
        "commit": f"{commit.get('id')}{', with uncommitted changes' if commit.get('dirty') else ''}",
    }
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items() if fact)


def clocks_seen(document):
    """The lowest and the highest SM clock in MHz, read after each row; None on a CPU."""
    seen = [row.get("clocks", {}).get("clocks.sm", "") for row in rows_of(document, "front end", "embedding")]
    seen = [int(clock) for clock in seen if clock.isdigit()]
    return f"{min(seen):,} to {max(seen):,} MHz" if seen else None


def milliseconds(seconds):
    """Three significant digits, but never a rounded integer part."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:#.3g}".rstrip(".")


def markdown(head, rows, alignments):
    rules = ["---" if alignment == "l" else "---:" for alignment in alignments.split()]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rules, *rows))


def _natural(document):
    """{model: its front end rows over natural text}, in fp32 on a CPU and in bf16 on a GPU."""
    dtype, found = "bfloat16" if "gpu" in document["machine_info"] else "float32", {}
    for row in rows_of(document, "front end"):
        if row["ids"] == "natural" and row["dtype"] == dtype:
            found.setdefault(row["model"], []).append(row)
    return found


def _machine(document):
    machine = document["machine_info"]
    return machine.get("gpu") or f"{machine.get('cpu', {}).get('brand_raw', 'CPU')}, {machine.get('threads')} threads"


def draw_gain(document, path):
    """How many times as fast as stock modules "auto" is, in each row of README's table."""
    from matplotlib.figure import Figure

    gains = {}
    for row in rows_of(document, "front end"):
        direction = DIRECTIONS[row["direction"] == "training"]
        gains.setdefault(row["case"] + _kind(row), {})[direction] = ratio(cells(row, direction), "eager", "auto", direction)
    figure = Figure((9.6, 1.2 + 0.36 * len(gains)), dpi=130, layout="constrained")
    axis = figure.subplots()
    for place, (direction, color) in enumerate(zip(DIRECTIONS, ("#0969da", "#8250df"), strict=True)):
        at = {y: gain[direction] for y, gain in enumerate(gains.values()) if direction in gain}
        bars = axis.barh([y + 0.38 * place - 0.19 for y in at], [x for x, _ in at.values()], 0.36, color=color, label=direction)
        axis.bar_label(bars, [text for _, text in at.values()], padding=3, fontsize=7)
    axis.axvline(1, color="#1f2328", lw=1)
    axis.set_yticks(range(len(gains)), gains)
    axis.set(ylim=(len(gains) - 0.4, -0.6), xmargin=0.08, xlabel="times as fast as stock modules (1: as fast)")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle(f'{_machine(document)}: the default, "auto" (~: a busy machine)', fontsize=11)
    figure.savefig(path)


def draw_lines(document, path, label, value):
    """Plots value(measurements of a variant, direction) against tokens: two panels for each model with enough sizes."""
    models = {name: rows for name, rows in _natural(document).items() if len({r["tokens"] for r in rows}) >= LEAST_POINTS}
    if not models:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure = Figure((10.8, 0.6 + 4.2 * len(models)), dpi=130, layout="constrained")
    lines, panels = {}, figure.subplots(len(models), 2, squeeze=False)
    for line, (model, rows) in zip(panels, models.items(), strict=True):
        rows = [row for row in rows if row["shape"][1] > 1 or row["tokens"] == 1]  # batched decode is shown in map.png alone
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            for name, (color, marker, style) in STYLES.items():
                found = {row["tokens"]: cells(row, direction)[name] for row in rows if name in cells(row, direction)}
                points = {tokens: value(cell, direction) for tokens, cell in sorted(found.items())}
                if points:
                    (lines[name],) = axis.loglog(*zip(*points.items(), strict=True), c=color, marker=marker, ls=style, ms=5)
            axis.set_title(f"{model}, {direction}", loc="left", fontsize=10)
            axis.set(xlabel="tokens", ylabel=label)
            axis.set_xticks(sorted({row["tokens"] for row in rows}))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
            axis.tick_params(axis="x", labelrotation=40)
            axis.grid(color="#e6eaef")
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False)
    figure.suptitle(_machine(document), fontsize=11)
    figure.savefig(path)


def draw_map(document, path):
    """The fastest variant of each model and size, and how many times as fast as eager it is. `table` is left out: it needs
    memory and frozen weights, and wins wherever it can run."""
    models = _natural(document)
    measured = Counter((row["model"], tuple(row["shape"])) for rows in models.values() for row in rows)
    of_models = Counter(shape for _, shape in measured)
    filled = {shape for shape, count in of_models.items() if 3 * count >= len(models)}  # else a column is nearly empty
    if len(filled) < LEAST_POINTS:  # as of a run without --full
        return
    columns = sorted(filled, key=lambda shape: (math.prod(shape), shape))
    from matplotlib.figure import Figure

    rows = [row for rows in models.values() for row in rows]
    directions = [d for d in DIRECTIONS if any(cells(row, d) for row in rows)]
    size = (max(2.5 + 0.95 * len(columns), 7), 0.8 + len(directions) * (0.8 + 0.55 * len(models)))
    figure = Figure(size, dpi=130, layout="constrained")
    for axis, direction in zip(figure.subplots(len(directions), 1, squeeze=False)[:, 0], directions, strict=True):
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_ylim(len(models) - 0.5, -0.5)
        for y, rows in enumerate(models.values()):
            for row in rows:
                found = {name: median(cell, direction) for name, cell in cells(row, direction).items() if name not in UNMAPPED}
                if not found or tuple(row["shape"]) not in filled:
                    continue
                best, x = min(found, key=found.get), columns.index(tuple(row["shape"]))
                color, strength = STYLES.get(best, OTHER)[0], 0.85 if best in OURS else 0.45
                axis.fill_between([x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=color, alpha=strength, lw=0)
                label = f"{best}\n{found['eager'] / found[best]:.2f}"
                axis.text(x, y, label, ha="center", va="center", fontsize=7, color="white" if best in OURS else "#1f2328")
        axis.set_xticks(range(len(columns)), [f"{B} × {T}" for B, T in columns])
        axis.set_yticks(range(len(models)), models)
        axis.set(xlabel="batch × tokens", ylabel="model")
        axis.set_title(
            f"{direction}: the fastest variant except table, and how many times as fast as eager", loc="left", fontsize=10
        )
        axis.spines[:].set_visible(False)
    figure.suptitle(_machine(document), fontsize=11)
    figure.savefig(path)


def strip(document):
    """A copy without the machine's name and pytest-benchmark's own statistics, which time a whole row with all its variants."""
    machine = {key: value for key, value in document["machine_info"].items() if key != "node"}
    benchmarks = [{"name": row["name"], "extra_info": row["extra_info"]} for row in document["benchmarks"]]
    return {**document, "machine_info": machine, "benchmarks": benchmarks}


def _write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
