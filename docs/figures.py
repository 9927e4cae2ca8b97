"""Draw the figures of README and docs from the rows that are kept: ``python docs/figures.py``.

``figures/families.svg``: final test loss of the learned optimizer over that of an opponent, for each held-out task of
``lopt report benchmarks/results/families`` after 1000 steps. Ratios, floor and choice of trials are the report's
(:mod:`lopt.evaluation.comparison`).

``figures/step.svg``: the drawing of a step, of the page that explains it.

Others are those of the pages of results (result_figures.py).
"""

import io
import itertools
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lopt.commands.report import MakeReport
from lopt.evaluation.table import RunTable
from lopt.figures import COLOURS, require_matplotlib
from lopt.files import save_figure, write_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from result_figures import FIGURES  # noqa: E402  # beside this file

SHADES = 24  # of few colours, in few bytes
RESULTS = HERE.parent / "benchmarks/results/families"
HORIZON = 1000
OPPONENTS = {
    "adamw-cosine": "AdamW, cosine\nnot tuned (1e-3)",
    "adam": "Adam, constant\nnot tuned (1e-3)",
    "adam-grids": "Adam, tuned for each task\n(best of 14 trials)",
}
FAMILIES = {
    "mlp": "perceptrons",
    "mlp_ae": "autoencoders",
    "mlp_vae": "variational\nautoencoders",
    "conv_fc": "convolutions",
    "conv_pooling": "convolutions,\npooled",
    "char_rnn_language_model": "character RNNs",
    "word_rnn_language_model": "word RNNs",
    "vit": "vision\ntransformers",
    "transformer_language_model": "transformers",
    "nvp": "flows (NVP)",
    "maf": "flows (masked)",
}
BETTER, WORSE = COLOURS[1], COLOURS[0]  # blue, vermilion


def ratios(folder: Path = RESULTS, theta: str = "default") -> dict[str, dict[str, float]]:
    """opponent -> task -> test loss relative to the opponent's, told ``total_steps``, after :data:`HORIZON` steps."""
    with tempfile.TemporaryDirectory() as scratch:
        report = MakeReport(folder=folder, theta=theta, horizons=(HORIZON,), out=Path(scratch) / "report.md")
        comparisons = report.run(Console(quiet=True)).numbers["comparisons"]
    return {
        one["other"]: one["ratios"]
        for one in comparisons
        if (one["name"], one["measure"], one["per"]) == ("lopt", "test", "step") and one["other"] in OPPONENTS
    }


def family_of(folder: Path = RESULTS) -> dict[str, str]:
    """task -> family."""
    return {run.task: run.family or "mlp" for run in RunTable(folder / "runs.csv").rows.values()}


def families(found: dict[str, dict[str, float]], family_of: dict[str, str]) -> Any:
    """A panel for each opponent, a row for each family: dots are tasks, bars geometric means."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    rows = {family: len(FAMILIES) - place for place, family in enumerate(FAMILIES)}
    every = [ratio for by_task in found.values() for ratio in by_task.values()]
    limits = min(every) / 1.2, max(every) * 1.2
    panels = figure.subplots(1, len(OPPONENTS), sharey=True)
    for axes, (opponent, title) in zip(panels, OPPONENTS.items(), strict=True):
        by_family: dict[str, list[float]] = {}
        for task, ratio in found[opponent].items():
            by_family.setdefault(family_of[task], []).append(ratio)
        for family, values in by_family.items():
            style = {"s": 42, "color": "0.45", "alpha": 0.6, "linewidth": 0, "zorder": 2, "label": "tasks"}
            axes.scatter(values, [rows[family]] * len(values), **style)
            _mean(axes, rows[family], values)
        values = list(found[opponent].values())
        mean, better = _mean(axes, 0, values), statistics.fmean(value < 1 for value in values)
        axes.set_title(title, fontsize=15, loc="left")
        summary = f"all: {mean:.2f} times its loss,\nlower on {better:.0%} of {len(values)} tasks"
        axes.set_xlabel(summary, fontsize=14, multialignment="center", labelpad=8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(*limits)
        axes.set_xticks([1 / 4, 1, 4, 16], ["¼", "1", "4", "16"], fontsize=14)
        axes.set_xticks([1 / 8, 1 / 2, 2, 8], [""] * 4, minor=True)
        axes.set_ylim(-0.7, len(FAMILIES) + 1.2)
        axes.axvspan(limits[0], 1, color=BETTER, alpha=0.07, linewidth=0)
        axes.axvline(1, color="0.25", linewidth=1.2, zorder=1)
        axes.axhline(0.5, color="0.6", linewidth=0.8)
        axes.text(0.9, len(FAMILIES) + 0.65, "lopt better", ha="right", color=BETTER, fontsize=13)
        axes.text(1.1, len(FAMILIES) + 0.65, "worse", ha="left", color=WORSE, fontsize=13)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    labels = {row: FAMILIES[family] for family, row in rows.items()} | {0: "all tasks"}
    panels[0].set_yticks(list(labels), list(labels.values()), fontsize=14)
    title = f"Test loss of lopt after {HORIZON} steps, as a multiple of that of …"
    figure.suptitle(title, x=0.01, ha="left", fontsize=17)
    return figure


def _mean(axes: Any, y: float, values: list[float]) -> float:
    """Draw the geometric mean of a row as a bar, and return it."""
    mean = statistics.geometric_mean(values)
    style = {"s": 420, "marker": "|", "linewidth": 4.5, "zorder": 3, "label": "mean"}
    axes.scatter([mean], [y], color=BETTER if mean < 1 else WORSE, **style)
    return mean


@dataclass(frozen=True)
class Box:
    """A part of the drawing of a step: where it stands, and what it says. Its name is that of a phase, or nothing."""

    name: str
    text: str
    x: float
    y: float
    width: float
    height: float
    colour: str

    @property
    def top(self) -> float:
        """Its upper edge."""
        return self.y + self.height


LANES = (
    (5.0, 2.6, "for each\ntensor", "one LSTM,\na row for each"),
    (1.15, 3.0, "for each\nparameter", "one small MLP,\nthe same for all"),
)
GREEN, GREY = COLOURS[2], "0.35"
BOXES = (
    Box("accumulate", "clip the gradient;\nmomenta and\nsecond moments", 3.7, 1.45, 3.6, 2.4, BETTER),
    Box("advance", "LSTM: how is this tensor doing,\nand how far is the run?", 5.0, 5.3, 6.6, 2.0, GREEN),
    Box("apply", "features, small\nMLP: a direction for\neach parameter", 8.9, 1.45, 3.6, 2.4, BETTER),
    Box("direction", "hidden matrices\nas wholes; then\nparameters move", 14.0, 1.45, 3.4, 2.4, WORSE),
)


def step() -> Any:
    """What happens in a step: its phases, by what each works on, and what they tell each other."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

    figure = Figure(figsize=(11, 5.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 17.6)
    axes.set_ylim(-0.35, 8.6)
    axes.set_axis_off()
    for y, height, name, text in LANES:
        axes.add_patch(Rectangle((0.1, y), 17.4, height, facecolor="0.955", linewidth=0))
        axes.text(0.3, y + height / 2 + 0.1, name, fontsize=15.5, fontweight="bold", va="bottom", linespacing=1.1)
        axes.text(0.3, y + height / 2 - 0.1, text, fontsize=13, color=GREY, va="top", linespacing=1.15)
    for box in BOXES:
        style = {"boxstyle": "round,pad=0,rounding_size=0.18", "linewidth": 2.2, "zorder": 2}
        corner = (box.x, box.y)
        axes.add_patch(FancyBboxPatch(corner, box.width, box.height, facecolor="white", edgecolor=box.colour, **style))
        middle = box.x + box.width / 2
        place = {"ha": "center", "va": "top", "zorder": 3, "gid": box.name}
        axes.text(middle, box.top - 0.15, box.name, fontsize=16, fontweight="bold", color=box.colour, **place)
        axes.text(middle, box.top - 0.78, box.text, fontsize=13.5, linespacing=1.2, **place)

    def arrow(*points: tuple[float, float], **style: Any) -> None:
        for start, end in itertools.pairwise(points):
            style = {"mutation_scale": 17, "linewidth": 1.7, "color": GREY, "zorder": 1, "shrinkA": 0} | style
            head = {"arrowstyle": "-|>", "shrinkB": 1} if end == points[-1] else {"arrowstyle": "-", "shrinkB": 0}
            axes.add_patch(FancyArrowPatch(start, end, **head, **style))

    def label(x: float, y: float, text: str, ha: str = "center", **style: Any) -> None:
        axes.text(x, y, text, fontsize=13.5, color="0.15", linespacing=1.15, va="center", ha=ha, **style)

    accumulate, advance, apply, direction = BOXES
    arrow((5.5, 0.45), (5.5, accumulate.y))
    label(5.5, 0.12, "gradients, parameters")
    arrow((5.5, accumulate.top), (5.5, advance.y))
    label(5.35, 4.58, "statistics", "right")
    arrow((6.4, 8.0), (6.4, advance.top))
    label(5.0, 8.22, "training loss, validation loss, steps done, steps planned", "left")
    arrow((10.7, advance.y), (10.7, apply.top))
    label(10.9, 4.58, "step size, gate,\nconditioning", "left")
    arrow((apply.x, 3.2), (8.3, 3.2), (8.3, advance.y), linestyle=(0, (4, 3)))
    label(8.15, 4.58, "feedback for\nthe next step", "right", fontstyle="italic")
    arrow((accumulate.x + accumulate.width, 2.1), (apply.x, 2.1))
    arrow((apply.x + apply.width, 2.4), (direction.x, 2.4))
    label(13.25, 2.72, "direction")
    arrow((15.7, direction.y), (15.7, 0.45))
    label(15.7, 0.12, "new parameters")
    return figure


def main() -> None:
    require_matplotlib()
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "lopt"  # the same rows give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text is text
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in (("families", families(ratios(), family_of())), ("step", step())):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        write_text(folder / f"{name}.svg", rounded(text.getvalue()))
    for name, draw in FIGURES.items():
        save_figure(folder / f"{name}.png", draw(), SHADES)


def rounded(svg: str) -> str:
    """The drawing with coordinates of two decimals and any sans-serif letters, in a fifth of the bytes."""
    svg = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', Verdana, sans-serif", svg)


if __name__ == "__main__":
    main()
