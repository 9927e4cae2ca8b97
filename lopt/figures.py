"""What all figures share: colours, panels of lines, whether they can be drawn. Drawing needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lopt.files import save_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

#: Colours that stay apart for every kind of colour vision (Okabe and Ito), in order of use.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

GREY = "0.75"

FLOOR = 1e-7  # lower values are drawn here on a logarithmic axis: losses can be zero

#: Multiples of powers of ten at the ticks of a logarithmic axis of fewer decades than this.
TICKS = (
    (0.4, (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)),
    (1.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (2.0, (1.0, 2.0, 5.0)),
    (3.0, (1.0, 3.0)),
    (math.inf, (1.0,)),
)


def require_matplotlib(otherwise: str = "") -> None:
    """Raise ModuleNotFoundError, with the remedy and what could be done ``otherwise``, when figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = "pip install 'lopt[plot]'" + (f", or {otherwise}" if otherwise else "")
        raise ModuleNotFoundError(f"plot: matplotlib is missing; {remedy}") from error


class Line(NamedTuple):
    """A line, or with ``marker`` and without ``style`` a set of points; ``band`` is shaded behind it, from the lower to
    the upper values."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = GREY
    style: str = "-"
    marker: str = ""
    width: float = 1.8
    band: tuple[Sequence[float], Sequence[float]] | None = None


class Panel(NamedTuple):
    """Axes with their lines, the last on top; ``log`` names the logarithmic axes, ``percent`` are the ends of an
    axis of shares."""

    title: str
    lines: Sequence[Line]
    xlabel: str
    ylabel: str = ""
    log: str = ""
    ticks: Sequence[str] = ()  # names of x = 0, 1, 2, ...
    equal: bool = False  # same unit on both axes
    percent: tuple[float, float] | None = None


def draw(
    panels: Sequence[Panel],
    title: str,
    path: str | os.PathLike[str],
    columns: int = 3,
    *,
    size: tuple[float, float] = (4.2, 3.5),
    dpi: int = 100,
    first: bool = False,
) -> None:
    """Draw the panels into a file, with one legend for all.

    Args:
        path: its ending says the format.
        size: of a panel, in inches.
        first: the first lines are on top, not the last.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(size[0] * columns, min(size[0] * 3, 6.0))
    figure = Figure(figsize=(width, size[1] * rows + 0.7), dpi=dpi, layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    entries: dict[str, Artist] = {}
    for axes, panel in zip(every, panels, strict=False):
        _panel(axes, panel, first, min(10.5, 2.5 * size[0]))
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    room = int(figure.get_figwidth() / (0.5 + 0.09 * max(map(len, entries))))  # inches of a symbol and of a letter
    columns = min(max(1, room), len(entries))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)
    save_figure(path, figure)


def _panel(axes: Axes, panel: Panel, first: bool, font: float) -> None:
    floor = FLOOR if "y" in panel.log else -math.inf
    below = any(value < floor for line in panel.lines for value in line.y)
    for place, line in enumerate(panel.lines):
        level = 2 + (len(panel.lines) - place if first else place) / len(panel.lines)
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=line.colour, alpha=0.18, linewidth=0, zorder=level)
        axes.plot(
            line.x,
            [max(value, floor) for value in line.y],
            label=line.label or "_",
            color=line.colour,
            linestyle=line.style or "none",
            marker=line.marker or None,
            markersize=4,
            linewidth=line.width,
            zorder=level,
        )
    axes.set_title(f"{panel.title} (at least {FLOOR:g})" if below else panel.title, loc="left", fontsize=font)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    plain(axes)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=60, ha="right", fontsize=7)
    if panel.equal:
        axes.set_aspect("equal")
    if panel.percent is not None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        axes.set_ylim(*panel.percent)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for name in panel.log:
        logarithmic(axes, name)


def plain(axes: Any) -> None:
    """A light grid behind the lines, and no frame."""
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Any, name: str) -> None:
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
