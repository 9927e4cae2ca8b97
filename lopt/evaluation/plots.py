"""Figures of training runs. Needs matplotlib, which is imported only when a figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lopt.evaluation.comparison import Measure, Runs
from lopt.evaluation.table import Run
from lopt.evaluation.training import TrainResult
from lopt.figures import COLOURS, require_matplotlib
from lopt.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The panels: what to draw, its title, and whether its axis is logarithmic.
PANELS = (
    ("train_loss", "Training loss", True),
    ("test_loss", "Test loss", True),
    ("test_accuracy", "Test accuracy", False),
)


def training_curves(runs: Mapping[str, Sequence[TrainResult]], title: str, path: Path) -> None:
    """Draw losses and accuracy against the step into the PNG file ``path``.

    A line is the mean over the runs (seeds) of one optimizer, the band behind it their range. The first
    optimizer is drawn on top of the others.

    Args:
        runs: label of an optimizer -> its runs, all recorded at the same steps.
        title: said above the panels: data, model, batch size, seeds.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there is nothing to draw.
    """
    if not runs or not all(runs.values()):
        raise ValueError("runs: expected at least one run of every optimizer, got none")
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, (quantity, name, logarithmic) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for order, (label, results) in enumerate(runs.items()):
            _line(axes, label, results, quantity, COLOURS[order % len(COLOURS)], above=len(runs) - order)
        axes.set_title(name, loc="left", fontsize=10.5)
        axes.set_xlabel("step")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.0)
        if logarithmic:
            _log_axis(axes)
        else:
            _accuracy_axis(axes, runs)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(path, figure)


def loss_curves(runs: Mapping[str, Sequence[Run]], path: str | PathLike[str], measure: Measure = "test") -> None:
    """Draw the losses along the runs of :func:`lopt.evaluation.evaluate.evaluate`, a panel for each task and length.

    A line is the mean over the seeds of one optimizer with its chosen setting, the band behind it their range.

    Args:
        runs: label of an optimizer -> its rows, as of one theta.
        path: of the figure; its ending says the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there is nothing to draw, or a label has rows of several optimizers.
    """
    chosen = {}
    for label, rows in runs.items():
        found = Runs(rows).chosen
        if len(found) != 1:
            raise ValueError(f"runs[{label!r}]: expected rows of one optimizer, got those of {list(found)}")
        chosen[label] = next(iter(found.values()))
    places = list(dict.fromkeys(place for by_place in chosen.values() for place in by_place))
    if not places:
        raise ValueError("runs: expected at least one optimizer with rows, got none")
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(3, len(places))
    figure = Figure(figsize=(4.2 * columns, 3.6 * -(-len(places) // columns)), dpi=150, layout="constrained")
    column = 2 if measure == "train" else 3
    for number, place in enumerate(places):
        axes = figure.add_subplot(-(-len(places) // columns), columns, number + 1)
        values = []
        for order, (label, by_place) in enumerate(chosen.items()):
            points = np.array([run.points for run in by_place.get(place, [])])  # [seeds, points, 4]
            if len(points):
                style: dict[str, Any] = {"color": COLOURS[order % len(COLOURS)], "zorder": 2 + len(chosen) - order}
                steps, losses = points[0, :, 0], points[:, :, column]
                axes.plot(steps, losses.mean(axis=0), label=label, linewidth=1.8, **style)
                axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), alpha=0.18, linewidth=0, **style)
                values.append(losses.min())
        axes.set_title(f"{place[0]}: {measure} loss", loc="left", fontsize=10.5)
        axes.set_xlabel("step")
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.0)
        if min(values) > 0:
            _log_axis(axes)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(path, figure)


def _line(axes: Axes, label: str, results: Sequence[TrainResult], quantity: str, colour: str, above: int) -> None:
    steps = [record.step for record in results[0].records]
    values = np.array([[getattr(record, quantity) for record in result.records] for result in results])
    style: dict[str, Any] = {"color": colour, "zorder": 2 + above}
    axes.plot(steps, values.mean(axis=0), label=label, linewidth=1.8, **style)
    if len(results) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.18, linewidth=0, **style)


def _log_axis(axes: Axes) -> None:
    """Logarithmic, with ticks at 1, 2 and 5 times powers of ten, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _accuracy_axis(axes: Axes, runs: Mapping[str, Sequence[TrainResult]]) -> None:
    """Percent, from a little below the lowest final accuracy upwards: the end of training is what differs."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    final = [result.final.test_accuracy for results in runs.values() for result in results]
    bottom = max(0.0, min(final) - max(0.05, 0.5 * (1 - min(final))))
    axes.set_ylim(bottom, min(1.0, max(final) + 0.3 * (max(final) - bottom)))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
