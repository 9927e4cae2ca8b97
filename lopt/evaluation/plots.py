"""Figures of training runs. Needs matplotlib, which is imported only when a figure is drawn."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from lopt.evaluation.comparison import Measure, Runs
from lopt.evaluation.table import Run
from lopt.evaluation.training import TrainResult
from lopt.figures import COLOURS, Line, Panel, draw

#: The panels: what to draw, its title, and which of its axes are logarithmic.
PANELS = (
    ("train_loss", "Training loss", "y"),
    ("test_loss", "Test loss", "y"),
    ("test_accuracy", "Test accuracy", ""),
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
    panels = []
    for quantity, name, log in PANELS:
        lines = []
        for order, (label, results) in enumerate(runs.items()):
            steps = [record.step for record in results[0].records]
            values = [[getattr(record, quantity) for record in result.records] for result in results]
            lines.append(_line(label, steps, values, order))
        panels.append(Panel(name, lines, "step", log=log, percent=None if log else _ends(runs)))
    draw(panels, title, path, dpi=150, first=True)


def loss_curves(runs: Mapping[str, Sequence[Run]], path: str | PathLike[str], measure: Measure = "test") -> None:
    """Draw the losses along the runs of :func:`lopt.evaluation.evaluate.evaluate`, a panel for each task and length.

    A line is the mean over the seeds of one optimizer with its chosen setting, the band behind it their range.

    Args:
        runs: label of an optimizer -> its rows, as of one theta.
        path: of the figure; its ending says the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there is nothing to draw, a label has rows of several optimizers, or a row has no curve.
    """
    chosen = {}
    for label, rows in runs.items():
        found = Runs(rows).chosen
        if len(found) != 1:
            raise ValueError(f"runs[{label!r}]: expected rows of one optimizer, got those of {list(found)}")
        bare = next((run.task for run in rows if not run.points), None)
        if bare is not None:
            raise ValueError(
                f"runs[{label!r}]: expected losses along all runs, got none on {bare!r}: evaluate with points"
            )
        chosen[label] = next(iter(found.values()))
    places = list(dict.fromkeys(place for by_place in chosen.values() for place in by_place))
    if not places:
        raise ValueError("runs: expected at least one optimizer with rows, got none")
    column = 2 if measure == "train" else 3
    panels = []
    for place in places:
        lines = []
        for order, (label, by_place) in enumerate(chosen.items()):
            points = np.array([run.points for run in by_place.get(place, [])])  # [seeds, points, 4]
            if len(points):
                lines.append(_line(label, points[0, :, 0].tolist(), points[:, :, column].tolist(), order))
        above = all(value > 0 for line in lines for value in line.y)
        panels.append(Panel(f"{place[0]}: {measure} loss", lines, "step", log="y" if above else ""))
    draw(panels, "", path, dpi=150, first=True)


def _line(label: str, steps: Sequence[int], values: Sequence[Sequence[float]], order: int) -> Line:
    """The mean of several runs, and the band between the lowest and the highest of them."""
    every = np.array(values)
    band = (every.min(axis=0).tolist(), every.max(axis=0).tolist()) if len(every) > 1 else None
    return Line(label, steps, every.mean(axis=0).tolist(), COLOURS[order % len(COLOURS)], band=band)


def _ends(runs: Mapping[str, Sequence[TrainResult]]) -> tuple[float, float]:
    """Of the axis of accuracies, from a little below the lowest at the end: the end of training is what differs."""
    final = [result.final.test_accuracy for results in runs.values() for result in results]
    bottom = max(0.0, min(final) - max(0.05, 0.5 * (1 - min(final))))
    return bottom, min(1.0, max(final) + 0.3 * (max(final) - bottom))
