"""Figure of a meta-training run. Needs matplotlib, which is imported only when the figure is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"training": "#0072b2", "validation": "#d55e00"}  # Okabe and Ito
SMOOTHING = 20  # iterations averaged in the line


def meta_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the meta-loss against the iteration into the PNG file ``path``.

    Dots are iterations (each on tasks of its own, hence the scatter), the line is their running mean, squares are the
    same validation runs every time.

    Args:
        metrics: the lines of metrics.jsonl.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    training = np.array([(m["iteration"], m["meta_loss"]) for m in metrics if "meta_loss" in m]).reshape(-1, 2)
    validation = np.array([(m["iteration"], m["validation"]) for m in metrics if "validation" in m]).reshape(-1, 2)
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    colour = COLOURS["training"]
    axes.plot(*training.T, ".", color=colour, alpha=0.3, markersize=4, markeredgewidth=0, label="one iteration")
    width = min(SMOOTHING, len(training))
    if width > 1:
        means = [running_mean(column, width) for column in training.T]
        axes.plot(*means, color=colour, linewidth=1.8, label=f"mean of {width} iterations")
    axes.plot(*validation.T, "s-", color=COLOURS["validation"], markersize=4, linewidth=1.2, label="validation runs")
    axes.set_title("Meta-loss: held-out loss over the run, 1 = initial loss", loc="left", fontsize=10.5)
    axes.set_xlabel("outer iteration")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False)
    figure.savefig(path)


def running_mean(values: Any, width: int) -> Any:
    """Means of every ``width`` neighbours; ``width - 1`` fewer than there are values."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")
