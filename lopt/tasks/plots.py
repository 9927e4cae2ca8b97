"""Figures of tasks: loss curves. Needs matplotlib, which is imported only when a figure is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lopt.figures import COLOURS, require_matplotlib
from lopt.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = tuple[Sequence[int], Sequence[float]]  # steps, losses


def curves(lines: Mapping[str, Line], title: str, path: Path) -> None:
    """Draw losses against the step into the PNG file ``path``, one labelled line each.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    gallery({title: lines}, path, columns=1, size=(7.0, 4.2))


def gallery(
    panels: Mapping[str, Mapping[str, Line]], path: Path, columns: int = 4, size: tuple[float, float] = (3.4, 2.4)
) -> None:
    """A panel for every title, each with its labelled lines; the legend is that of the first panel.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.5), dpi=130, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(every, panels.items(), strict=False):
        _panel(axes, title, lines)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(path, figure)


def _panel(axes: Axes, title: str, lines: Mapping[str, Line]) -> None:
    finite = [loss for _, losses in lines.values() for loss in losses if math.isfinite(loss)]
    for order, (label, (steps, losses)) in enumerate(lines.items()):
        axes.plot(steps, losses, label=label, linewidth=1.6, color=COLOURS[order % len(COLOURS)])
    if finite and min(finite) > 0 and max(finite) > 4 * min(finite):
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=8.5)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(which="both", labelsize=7)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.0)
