"""Pictures of what a vocabulary costs, and of the rows of a report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cost import Cost
from .untrained import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, RED, GREEN, INK, GREY, PALE = "#0969da", "#e36f00", "#cf222e", "#1a7f37", "#1f2328", "#59636e", "#e6eaef"
COLOURS = [BLUE, ORANGE, GREEN, "#8250df"]
MB = 1e6


def plot_costs(costs: list[Cost], title: str, path: Path) -> None:
    """Stacked bars of megabytes, and of milliseconds where they were measured, a bar for each size."""
    figure, axes = _figure(2 if costs[0].lookup_ms is not None else 1, title, 4.4)
    sizes = [f"{cost.size:,}" for cost in costs]
    parts = {"table": "table", "head": "head", "gradients": "gradients", "AdamW's state": "optimizer"}
    _bars(axes[0], sizes, {name: [getattr(cost, key) / MB for cost in costs] for name, key in parts.items()}, "megabytes")
    if len(axes) > 1:
        parts = {"lookup": "lookup_ms", "head and loss": "head_ms", "AdamW's step": "step_ms"}
        _bars(axes[1], sizes, {name: [getattr(cost, key) for cost in costs] for name, key in parts.items()}, "ms a step")
    _save(figure, path)


def plot_report(report: Report, title: str, path: Path) -> None:
    """For each indicator the numbers of rows by its value: known to be unused, all others; and the cut between them."""
    figure, axes = _figure(len(report.indicators), title, 4.0)
    known = torch.zeros(report.rows, dtype=torch.bool)
    known[report.known] = True
    for axis, one in zip(axes, report.indicators, strict=True):
        edges = torch.linspace(
            one.values.min().item(), max(one.values.max().item(), one.values.min().item() + 1e-6), 61
        ).tolist()
        for mask, colour, label in ((~known, BLUE, "all others"), (known, ORANGE, "known to be unused")):
            axis.hist(one.values[mask].numpy(), edges, color=colour, alpha=0.75, label=f"{label} ({int(mask.sum()):,})")
        what = {"norm": "norm of the table's row", "cosine": "cosine to the mean of rows known to be unused"}[one.name]
        if one.used:
            axis.axvline(
                one.cut, color=RED, linewidth=1.5, label=f"untrained {'below' if one.lower else 'above'} {one.cut:.3g}"
            )
        note = "used" if one.used else "not used: it misleads, the table is the head" if one.misleads else "not used"
        axis.set_title(f"{one.name}, AUC {one.auc:.3f}, {note}", loc="left", color=INK, fontsize=10)
        axis.set(yscale="log", xlabel=what, ylabel="rows")
        axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    _save(figure, path)


def _bars(axis: "Axes", sizes: list[str], parts: dict[str, list[float]], unit: str) -> None:
    below = [0.0] * len(sizes)
    for (name, heights), colour in zip(parts.items(), COLOURS, strict=False):
        axis.bar(sizes, heights, 0.6, below, color=colour, label=name)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for x, height in enumerate(below):
        axis.text(
            x, height, f"{height:,.3g}" if height < 1000 else f"{height:,.0f}", ha="center", va="bottom", color=INK, fontsize=9
        )
    axis.set(ylabel=unit, xlabel="rows", ylim=(0, max(below) * 1.1))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _figure(panels: int, title: str, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure((5.2 * panels, height), dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=GREY)
        axis.grid(axis="y", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format=path.suffix[1:].lower())
