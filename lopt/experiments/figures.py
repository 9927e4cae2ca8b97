"""Panels of lines in the style of :mod:`lopt.evaluation.plots`. Needs matplotlib, imported when a figure is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lopt.figures import COLOURS, require_matplotlib
from lopt.files import save_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

#: Of the optimizers in every figure of the experiments.
LOPT, ADAM, UNTOLD, OTHER, MORE = COLOURS[0], COLOURS[1], COLOURS[4], COLOURS[2], COLOURS[3]
GREY = "0.75"

FLOOR = 1e-7  # lower values are drawn here on a logarithmic axis: losses can be zero

#: Multiples of powers of ten at the ticks of a logarithmic axis of fewer decades than this.
TICKS = ((1.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (2.0, (1.0, 2.0, 5.0)), (3.0, (1.0, 3.0)), (math.inf, (1.0,)))

#: Label and colour of the learned optimizer, told the number of steps or not.
LEARNED = {"lopt": ("lopt", LOPT), "lopt-untold": ("lopt, untold", UNTOLD)}


class Line(NamedTuple):
    """A line, or with ``marker`` and without ``style`` a set of points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = GREY
    style: str = "-"
    marker: str = ""
    width: float = 1.8


class Panel(NamedTuple):
    """Axes with their lines, the last on top; ``log`` names the logarithmic axes."""

    title: str
    lines: Sequence[Line]
    xlabel: str
    ylabel: str = ""
    log: str = ""
    ticks: Sequence[str] = ()  # names of x = 0, 1, 2, ...
    equal: bool = False  # same unit on both axes


def draw(panels: Sequence[Panel], title: str, path: Path, columns: int = 3) -> None:
    """Draw the panels into a PNG file, with one legend for all.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 3.5 * rows + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    entries: dict[str, Artist] = {}
    for axes, panel in zip(every, panels, strict=False):
        _panel(axes, panel)
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    room = int(figure.get_figwidth() / (0.5 + 0.09 * max(map(len, entries))))  # inches of a symbol and of a letter
    columns = min(max(1, room), len(entries))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)
    save_figure(path, figure)


def _panel(axes: Axes, panel: Panel) -> None:
    floor = FLOOR if "y" in panel.log else -math.inf
    below = any(value < floor for line in panel.lines for value in line.y)
    for line in panel.lines:
        axes.plot(
            line.x,
            [max(value, floor) for value in line.y],
            label=line.label or "_",
            color=line.colour,
            linestyle=line.style or "none",
            marker=line.marker or None,
            markersize=4,
            linewidth=line.width,
        )
    axes.set_title(f"{panel.title} (at least {FLOOR:g})" if below else panel.title, loc="left", fontsize=10.5)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=60, ha="right", fontsize=7)
    if panel.equal:
        axes.set_aspect("equal")
    for name in panel.log:
        _logarithmic(axes, name)


def _logarithmic(axes: Axes, name: str) -> None:
    """Ticks at multiples of powers of ten, written as plain numbers, as far as there is room."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis = axes.xaxis if name == "x" else axes.yaxis
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    decades = math.log10(high / low)
    subs = next(subs for most, subs in TICKS if decades < most)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
