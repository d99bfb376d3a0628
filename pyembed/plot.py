"""The demo's figure: the error of every tensor beside its budget."""

import math
import warnings
from pathlib import Path
from typing import Any

Report = dict[str, Any]  # the demo's report, or a part of it, as --json writes it


def describe(report: Report) -> dict[str, str]:
    """The report's text, tokens, model and device, as readable lines by name."""
    text, shape = report["text"], report["shape"]
    heads = f"{shape['heads']} head{'s' * (shape['heads'] > 1)}"
    if shape["kv_heads"] < shape["heads"]:
        heads += f" ({shape['kv_heads']} of key and value)"
    norm = {"layer": "LayerNorm", "rms": "RMSNorm", "none": "no norm"}[shape["norm"]]
    tables = f"tables of {shape['vocabulary']:,} and {shape['positions']:,} rows"
    tokens = f"{shape['batch']} x {shape['length']} = {shape['tokens']:,}, {shape['distinct_tokens']:,} of them distinct"
    return {
        "text": f"{Path(text['name']).name}, {text['tokens']:,} tokens of {text['encoding']}",
        "tokens": f"the first {tokens}",
        "model": f"width {shape['width']:,}, {heads}, {norm}, {tables}",
        "ran on": f"{report['device']}, Triton {report['mode']}",
    }


def plot_errors(report: Report, path: Path) -> None:
    """A panel per dtype, a row per tensor: errors as dots on a bar that ends at the budget. path: .png, .svg or .pdf."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    blue, orange, red, ink, grey, pale = "#0969da", "#e36f00", "#cf222e", "#1f2328", "#59636e", "#e6eaef"
    panels = report["dtypes"]
    tensors = list(next(iter(panels.values()))["tensors"])
    width, height = 2.2 + 4 * len(panels), 2.6 + 0.36 * len(tensors)  # inches
    rect = (0.12 / width, 0.4 / height, 1 - 0.4 / width, 1 - 1.8 / height)
    figure = Figure((width, height), dpi=160, layout=ConstrainedLayoutEngine(rect=rect, wspace=0.06))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, result) in zip(axes, panels.items(), strict=True):
        rows = [result["tensors"][tensor] for tensor in tensors]
        sizes = [row[who]["max"] for row in rows for who in ("ours", "eager", "budget")]
        sizes = [size for size in sizes if 0 < size < math.inf] or [1.0]
        low, high = min(sizes) / 2, max(sizes) * 2
        for y, row in enumerate(rows):
            # 0 is drawn at the left end, infinity and NaN at the right end.
            ours, eager, budget = (
                max(low, row[who]["max"]) if row[who]["max"] < high else high for who in ("ours", "eager", "budget")
            )
            ok = row["verdict"] == "ok"
            axis.plot([low, budget], [y, y], color=pale, linewidth=9, solid_capstyle="butt")
            budgets = axis.plot(budget, y, "|", color=grey, markersize=13, markeredgewidth=2)
            eagers = axis.plot(eager, y, "o", color=orange, markerfacecolor="white", markersize=10, markeredgewidth=2)
            axis.plot(ours, y, "o", color=blue if ok else red, markersize=5.5, clip_on=False)
            if not ok:
                text = {"color": red, "ha": "right", "va": "bottom", "fontsize": 8, "fontweight": "bold"}
                axis.annotate(f"OVER ({row['ours']['max']:.1e})", (ours, y), (0, 6), textcoords="offset points", **text)
        ourses = axis.plot([], [], "o", color=blue, markersize=5.5)  # for the legend
        axis.set(xscale="log", xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticks(range(len(rows)), tensors)
        axis.set_title(name, loc="left", color=ink, fontweight="bold")
        axis.set_xlabel("largest error against float64", color=grey, fontsize=9)
        axis.tick_params(which="both", length=0, labelcolor=ink)
        axis.grid(axis="x", color=pale, linewidth=0.8)
        axis.spines[:].set_visible(False)

    left = 0.2 / width
    plain: dict[str, Any] = {"va": "top", "parse_math": False}  # a file name may contain a $
    figure.text(left, 1 - 0.2 / height, f"pyembed: {report['summary']}", color=ink, fontsize=14, fontweight="bold", **plain)
    facts = "\n".join(describe(report).values())
    figure.text(left, 1 - 0.55 / height, facts, color=grey, fontsize=9, linespacing=1.5, **plain)
    handles, labels = (ourses[0], eagers[0], budgets[0]), ("ours, Triton", "eager, PyTorch", "budget")
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(left / 2, 0.05 / height), ncols=3, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file name in a script that the font lacks
        figure.savefig(path, format=path.suffix[1:].lower())


def plot_times(report: Report, path: Path) -> None:
    """`pyembed bench`: a panel per direction, a bar per variant with its quartiles and its limit. path: .png, .svg or .pdf."""
    from matplotlib.figure import Figure

    from .benchmark.rows import digits

    ours, peer, ink, grey, faint = "#0969da", "#b9c2cc", "#1f2328", "#59636e", "#e36f00"
    variants = report["variants"]
    names = list(variants)
    stock = variants[names[0]]["seconds"]
    height = 1.5 + len(stock) * (0.75 + 0.34 * len(names))
    figure = Figure((8, height), dpi=160, layout="constrained")
    for axis, direction in zip(figure.subplots(len(stock), 1, squeeze=False)[:, 0], stock, strict=True):
        ends = []
        for y, name in enumerate(names):
            found = variants[name]
            if direction not in found["seconds"]:
                continue
            low, median, high = (found["seconds"][direction][key] * 1e3 for key in ("q1", "median", "q3"))
            axis.barh(y, median, color=ours if name in ("one_pass", "distinct", "table", "auto") else peer, height=0.62)
            axis.plot([low, high], [y, y], color=ink, linewidth=1.2)
            if found.get("limit"):
                axis.plot([found["limit"][direction] * 1e3] * 2, [y - 0.31, y + 0.31], color=faint, linewidth=2)
            ends.append(max(median, high))
            label = f"{digits(median)} ms, {stock[direction]['median'] * 1e3 / median:.2f} x"
            label += ", busy: not to be believed" if name in report["busy"] else ""
            text = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
            axis.annotate(label, (ends[-1], y), color=ink, **text)
        axis.set(xlim=(0, max(ends) * 1.6), ylim=(len(names) - 0.4, -0.6))
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{direction}: ms, and times as fast as {names[0]}", loc="left", fontsize=9.5, color=grey)
        axis.tick_params(length=0, labelcolor=ink)
        axis.spines[:].set_visible(False)
        axis.set_xticks([])
    B, T = report["shape"]
    facts = f"{B} x {T} tokens, {report['distinct']:,} of them distinct, {report['dtype']}, {report['device']}"
    legend = "black: quartiles" + (
        "; orange: the limit that memory and matrix rates set" if variants[names[0]].get("limit") else ""
    )
    title = figure.suptitle(f"{report['case']}\n{facts}\n{legend}", fontsize=10, x=0.01, ha="left")
    title.set_parse_math(False)
    figure.savefig(path, format=path.suffix[1:].lower())
