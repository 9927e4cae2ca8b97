"""Figure of a meta-training run. Needs matplotlib, which is imported only when the figure is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt.figures import COLOURS, plain
from lopt.files import save_figure

SMOOTHING = 50  # iterations averaged in the line


def meta_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw meta-loss and validation against the inner steps into the PNG file ``path``.

    Above, dots are iterations (each on tasks of its own, hence the scatter), the line is their running mean, vertical
    lines begin phases. Below, the loss at the end of the same validation runs every time.

    Args:
        metrics: the lines of metrics.jsonl.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    training = [m for m in metrics if "meta_loss" in m]
    validation = [m for m in metrics if "validation" in m]
    figure = Figure(figsize=(7.2, 8.0), dpi=150, layout="constrained")
    noise = [m for m in training if "families" in m]
    upper: Any = figure
    if noise:
        parts: Any = figure.subfigures(2, 1, height_ratios=(3, 1))
        upper, lower = parts
        _noise(lower.subplots(), noise)
    above, below = upper.subplots(2, 1, sharex=True)
    steps, losses = _column(training, "inner_steps") / 1e6, _column(training, "meta_loss")
    above.plot(steps, losses, ".", color=COLOURS[0], alpha=0.4, markersize=4, markeredgewidth=0, label="one iteration")
    width = min(SMOOTHING, len(training))
    if width > 1:
        means = (running_mean(column, width) for column in (steps, losses))
        above.plot(*means, color=COLOURS[0], linewidth=1.8, label=f"mean of {width} iterations")
    for line, before in zip(training[1:], training, strict=False):
        if line["phase"] != before["phase"]:
            above.axvline(before["inner_steps"] / 1e6, color="0.6", linewidth=1.0)
    above.set_title("Meta-loss: mean over a run of log(loss / initial loss + .01)", loc="left", fontsize=10.5)
    names = [name for name in (validation[0] if validation else {}) if name.startswith("final_")]
    for colour, name in zip(COLOURS * len(names), names, strict=False):
        _, horizon, told = name.split("_")
        values = _column(validation, "inner_steps") / 1e6, _column(validation, name)
        below.plot(*values, "s-", color=colour, markersize=3.5, linewidth=1.2, label=f"{horizon} steps, {told}")
    below.set_title("Validation: the same at the end of a run, on tasks never trained on", loc="left", fontsize=10.5)
    below.set_xlabel("million inner steps")
    for axes in (above, below):
        plain(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    save_figure(path, figure)


def _noise(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    """What each family adds to the noise of the meta-gradient, and to the time."""
    squares: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for line in metrics:
        for family, found in line["families"].items():
            squares[family] = squares.get(family, 0.0) + found["pairs"] * found["delta"] ** 2
            seconds[family] = seconds.get(family, 0.0) + line["family_cpu_seconds"][family]
    names = sorted(squares)
    for shift, label, values in ((-0.2, "noise of the meta-gradient", squares), (0.2, "CPU time", seconds)):
        total = sum(values.values()) or 1.0
        axes.bar([i + shift for i in range(len(names))], [values[n] / total for n in names], 0.4, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axes.set_title("Shares of the families", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: Any, width: int) -> Any:
    """Means of every ``width`` neighbours; ``width - 1`` fewer than there are values."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _column(lines: Sequence[dict[str, Any]], name: str) -> Any:
    return np.array([line[name] for line in lines], dtype=float)
