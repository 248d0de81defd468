"""`python -m llava.eval plot`: what the attacks cost, and which positions a model prefers.

attacked.png     Clean against PA, SA and SA+PA, with 95 % intervals; the diagonal is no loss
positions.png    how often each position was chosen over all orders, beside how often the right
                 option stood there
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llava.errors import UsageError
from llava.eval.show.runs import Run
from llava.files import atomic_write, make_folder

ATTACKS = {"pa": "PA: all orders", "sa": "SA: other symbols", "sa_pa": "SA+PA: both"}
MARKERS = "os^DvPX*<>"
PANELS = 4
"""panels of positions side by side"""
UNREAD = "none"
"""tick of the answers in which no option could be read"""


def draw(runs: Sequence[Run], reading: str, out: Path) -> list[Path]:
    """Write the pictures, positions.png only if a run has all orders; returns their paths.

    Raises UsageError if none of the runs has numbers under attack.
    """
    runs = sorted((run for run in runs if run.attacked), key=lambda run: run.task.place)
    if not any(run.block(reading).keys() & ATTACKS for run in runs):
        raise UsageError("plot: no run of a benchmark under attack among them; give one")
    figures = {"attacked.png": attacked(runs, reading)}
    if any("orders" in run.block(reading) for run in runs):
        figures["positions.png"] = positions(runs, reading)
    make_folder(out)
    for name, figure in figures.items():
        content = io.BytesIO()
        # Without the library's version in it the same numbers give the same bytes.
        figure.savefig(content, dpi=110, bbox_inches="tight", metadata={"Software": None})
        atomic_write(out / name, content.getvalue())
    return [out / name for name in figures]


def attacked(runs: Sequence[Run], reading: str) -> Figure:
    """A panel an attack, a colour a benchmark, a marker a model."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(ATTACKS), sharex=True, sharey=True)
    titles = list(dict.fromkeys(run.task.title for run in runs))
    models = list(dict.fromkeys(run.model for run in runs))
    colours = {title: colormaps["tab10"](i % 10) for i, title in enumerate(titles)}
    markers = {model: MARKERS[i % len(MARKERS)] for i, model in enumerate(models)}
    ends = [end for run in runs for of in run.block(reading)["intervals"].values() for end in of]
    limits = (0, 10 * math.ceil(max(1, *ends) / 10))
    for panel, (attack, heading) in zip(panels, ATTACKS.items(), strict=True):
        panel.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
        for run in runs:
            _point(panel, run.block(reading), attack, colours[run.task.title], markers[run.model])
        panel.set(title=heading, xlabel="Clean (%)", xlim=limits, ylim=limits, aspect="equal")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("under attack (%)")
    handles = [Line2D([], [], color=c, marker="o", ls="", label=t) for t, c in colours.items()]
    handles += [Line2D([], [], color="0.3", marker=m, ls="", label=t) for t, m in markers.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def _point(panel: Axes, block: dict[str, Any], attack: str, colour: Any, marker: str) -> None:
    if attack not in block:
        return
    x, y = block["clean"], block[attack]
    (left, right), (low, high) = block["intervals"]["clean"], block["intervals"][attack]
    style = {"color": colour, "marker": marker, "markersize": 6, "elinewidth": 1, "clip_on": False}
    panel.errorbar(x, y, [[y - low], [high - y]], [[x - left], [right - x]], **style)


def positions(runs: Sequence[Run], reading: str) -> Figure:
    """A panel for a benchmark and its symbols, bars are models."""
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for orders in run.block(reading).get("orders", {}).values():
            panels.setdefault((run.task.title, orders["symbols"]), {})[run.model] = orders
    models = list(dict.fromkeys(run.model for run in runs))
    colours = {model: colormaps["Dark2"](i % 8) for i, model in enumerate(models)}
    n_rows = math.ceil(len(panels) / PANELS)
    figure = Figure(figsize=(12, 2.2 * n_rows + 0.6), layout="constrained")
    axes = list(figure.subplots(n_rows, PANELS, squeeze=False, sharey=True).flat)
    for axis, ((title, symbols), bars) in zip(axes, panels.items(), strict=False):
        _bars(axis, bars, colours)
        axis.set_title(f"{title}, {symbols}", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supylabel("share of answers (%)", fontsize=10)
    handles = [Line2D([], [], color=c, marker="s", ls="", label=m) for m, c in colours.items()]
    handles.append(Line2D([], [], color="black", label="the right option stood there"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _bars(axis: Axes, bars: dict[str, Any], colours: dict[str, Any]) -> None:
    width = 0.8 / len(bars)
    for i, (model, orders) in enumerate(bars.items()):
        ticks = [*orders["symbols"], UNREAD]
        places = [place - 0.4 + (i + 0.5) * width for place in range(len(ticks))]
        axis.bar(places, shares(orders), width, color=colours[model])
    right = [100 * n / sum(orders["right"]) for n in orders["right"]]
    starts = [place - 0.45 for place in range(len(right))]
    axis.hlines(right, starts, [start + 0.9 for start in starts], color="black", linewidth=1.5)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.grid(axis="y", alpha=0.3)


def shares(orders: dict[str, Any]) -> list[float]:
    """Percentages of all answers: the positions, then those in which no option could be read."""
    unread, n_read = orders["parse_failures"], max(1, sum(orders["chosen"]))
    return [(100 - unread) * n / n_read for n in orders["chosen"]] + [unread]
