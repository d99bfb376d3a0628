"""The demo's figure: every tensor's error beside its budget."""

import math
import warnings
from pathlib import Path


def describe(report: dict) -> dict[str, str]:
    """What ran, on what, where: for a person."""
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


def plot_errors(report: dict, path: Path):
    """A panel per dtype, a row per tensor: the errors as dots on a bar that ends at their budget."""
    from matplotlib.figure import Figure

    blue, orange, red, ink, grey, pale = "#0969da", "#e36f00", "#cf222e", "#1f2328", "#59636e", "#e6eaef"
    panels = report["dtypes"]
    tensors = list(next(iter(panels.values()))["tensors"])
    width, height = 2.2 + 4 * len(panels), 2.6 + 0.36 * len(tensors)  # inches
    figure = Figure((width, height), dpi=160, layout="constrained")
    figure.get_layout_engine().set(rect=(0.12 / width, 0.4 / height, 1 - 0.4 / width, 1 - 1.8 / height), wspace=0.06)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, result) in zip(axes, panels.items(), strict=True):
        rows = [result["tensors"][tensor] for tensor in tensors]
        sizes = [row[who]["max"] for row in rows for who in ("ours", "eager", "budget")]
        sizes = [size for size in sizes if 0 < size < math.inf] or [1.0]
        low, high = min(sizes) / 2, max(sizes) * 2
        for y, row in enumerate(rows):
            sizes = (row[who]["max"] for who in ("ours", "eager", "budget"))
            ours, eager, budget = (max(low, size) if size < high else high for size in sizes)  # 0, infinity, NaN: at the ends
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

    left, plain = 0.2 / width, {"va": "top", "parse_math": False}  # a file's name may hold a $
    figure.text(left, 1 - 0.2 / height, f"pyembed: {report['summary']}", color=ink, fontsize=14, fontweight="bold", **plain)
    facts = "\n".join(describe(report).values())
    figure.text(left, 1 - 0.55 / height, facts, color=grey, fontsize=9, linespacing=1.5, **plain)
    handles, labels = (ourses[0], eagers[0], budgets[0]), ("ours, Triton", "eager, PyTorch", "budget")
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(left / 2, 0.05 / height), ncols=3, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure.savefig(path, format=path.suffix[1:].lower())
