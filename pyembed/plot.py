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
