"""Generalisation along an axis: the learned optimizer against Adam at eight learning rates, chosen anew at each point.

Source: arXiv:2009.11243, section 4.4 and figure 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lopt.evaluation.jobs import Job
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LEARNED, MORE
from lopt.experiments.rows import best, over_x, relative, select, values
from lopt.experiments.setting import EIGHT, Setting
from lopt.experiments.words import LOSSES, TUNED, bullets, change, table, tally
from lopt.figures import Panel, draw
from lopt.tasks.held_out import CONTEXT, HeldOutTask, Splits
from lopt.tasks.task import VALID_ROWS, Batch

#: The learned optimizers of the axes; blind is the one that is told no validation losses.
SHOWN = LEARNED | {"lopt-blind": ("lopt, blind", MORE)}

ADAM_NAME = "adam-tuned"

#: A point of an axis: its place and a task.
Points = Mapping[str, Sequence[tuple[float, HeldOutTask]]]


@dataclass(frozen=True, kw_only=True)
class FewRows(HeldOutTask):
    """A held-out task with only the first ``rows`` training rows."""

    rows: int

    @property
    def name(self) -> str:
        return f"{super().name}-{self.rows}"

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "type": "FewRows", "rows": self.rows}

    @property
    def splits(self) -> Splits:
        splits = super().splits
        inputs, targets = splits["train"]
        return {**splits, "train": Batch(inputs[: self.rows], targets[: self.rows])}


#: The data of the axes, with the widths of inputs and outputs.
ENDS: dict[str, tuple[int, int]] = {
    "digits": (64, 10),
    "characters": (CONTEXT * 28, 28),
    "fashion-mnist": (784, 10),
}


def perceptron(data: str, hidden: Sequence[int] = (64, 64), batch_size: int = 64) -> HeldOutTask:
    """A perceptron on ``data`` with these hidden layers."""
    inputs, outputs = ENDS[data]
    sizes = (inputs, *hidden, outputs)
    return HeldOutTask(data=data, sizes=sizes, batch_size=batch_size)  # type: ignore[arg-type]


def available(names: Sequence[str]) -> list[str]:
    """Those data sets that are here."""
    return [name for name in names if perceptron(name).unavailable is None]


def along(setting: Setting, name: str, points: Points, steps: int) -> list[Job]:
    """Runs of the learned optimizers and eight Adams at every point of every data set."""
    places = [(data, task, x, steps) for data, tasks in points.items() for x, task in tasks]
    return setting.jobs(name, places, [*((ours, (0,)) for ours in SHOWN), (ADAM_NAME, EIGHT)])


def ratios(rows: Sequence[Run], name: str, loss: str, data: str) -> dict[float, float]:
    """x -> loss of the learned optimizer over that of the best Adam there."""
    here = select(rows, task=data)
    return {x: relative(select(here, x=x), name, ADAM_NAME, loss) for x in sorted(values(here, "x"))}


def figure(axis: str, rows: Sequence[Run], path: Path) -> None:
    panels = []
    for loss, word in LOSSES.items():
        for data in values(rows, "task"):
            adams = select(rows, task=data, name=ADAM_NAME)
            lines = [
                over_x("Adam, each of 8 learning rates", select(adams, trial=trial), loss, width=0.8, marker="")
                for trial in values(adams, "trial")
            ]
            lines.append(over_x("Adam, the best of them at each point", adams, loss, ADAM))
            for name, (label, colour) in reversed(SHOWN.items()):
                lines.append(over_x(label, select(rows, task=data, name=name), loss, colour))
            panels.append(Panel(f"{data}: {word} loss", lines, axis, log="xy"))
    draw(
        panels,
        f"{axis.capitalize()}: final losses after {rows[0].horizon:,} steps",
        path,
        columns=max(2, len(panels) // 2),
    )


def text(axis: str, rows: Sequence[Run]) -> list[str]:
    parts = [
        f"Final losses after {rows[0].horizon:,} steps relative to those of the best of eight Adams at the same "
        f"{axis}, {TUNED}; 1% of the initial loss is added to both. Below 1 is better than the best Adam. "
        "The learned optimizer is told the number of steps and validation losses, is not told the former (untold), "
        "or not the latter (blind)."
    ]
    for data in values(rows, "task"):
        columns = {
            f"{label}, {word}": ratios(rows, name, loss, data)
            for name, (label, _) in SHOWN.items()
            for loss, word in LOSSES.items()
        }
        here = select(rows, task=data)
        cells = []
        for x in sorted(values(here, "x")):
            rates = [best(select(here, name=ADAM_NAME, x=x), loss)[0].lr for loss in LOSSES]
            cells.append([f"{x:,g}", *(f"{found[x]:.3f}" for found in columns.values()), *map("{:.1e}".format, rates)])
        header = [axis, *columns, "best Adam lr, training", "best Adam lr, test"]
        parts += [f"**{data}**", table(header, cells), _sentences(axis, columns), _edges(rows, data)]
    return [part for part in parts if part]


def _sentences(axis: str, columns: Mapping[str, Mapping[float, float]]) -> str:
    said = []
    for name, found in columns.items():
        first, last = min(found), max(found)
        said.append(
            f"{name} loss: {tally({f'{x:,g}': r for x, r in found.items()})}; {change(found[first])} that of the best "
            f"Adam at {axis} {first:,g}, {change(found[last])} that at {last:,g}."
        )
    return bullets(said)


def _edges(rows: Sequence[Run], data: str) -> str:
    """Where the best learning rate is the first or the last that was tried."""
    found = select(rows, task=data, name=ADAM_NAME)
    lrs = sorted(values(found, "lr"))
    at = [
        f"{x:,g} ({word})"
        for x in sorted(values(found, "x"))
        for loss, word in LOSSES.items()
        if best(select(found, x=x), loss)[0].lr in (lrs[0], lrs[-1])
    ]
    return f"The best Adam has the smallest or largest learning rate tried at {', '.join(at)}." if at else ""


def experiment(name: str, axis: str, about: str, points: Callable[[Setting], Points]) -> Experiment:
    """The experiment along one axis, on the data that is here."""

    def jobs(setting: Setting) -> list[Job]:
        return along(setting, name, points(setting), setting.pick(500, 2000))

    title = f"Generalisation: {axis}"
    shown = partial(figure, axis)
    return Experiment(name=name, title=title, about=about, jobs=jobs, figure=shown, text=partial(text, axis))


def data_sets(setting: Setting) -> list[str]:
    """Of an axis: digits, or all that are here."""
    return available(setting.pick(("digits",), tuple(ENDS)))


def widths(setting: Setting) -> Points:
    """Two hidden layers of the same width."""
    sizes = setting.pick((4, 16, 64, 256), (4, 8, 16, 32, 64, 128, 256, 512))
    return {name: [(float(w), perceptron(name, (w, w))) for w in sizes] for name in data_sets(setting)}


def batch_sizes(setting: Setting) -> Points:
    """Rows of a minibatch; the number of steps stays the same."""
    sizes = setting.pick((1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    return {name: [(float(b), perceptron(name, batch_size=b)) for b in sizes] for name in data_sets(setting)}


def dataset_sizes(setting: Setting) -> Points:
    """The first rows of the training split; validation and test rows stay the same."""
    sizes = setting.pick((32, 128, 512, 1024), (32, 64, 128, 256, 512, 1024, 4096, 16_384))
    points = {}
    for data in data_sets(setting):
        whole = perceptron(data)
        rows = [size for size in sizes if size <= len(whole.splits["train"].inputs)]
        fields = {"data": whole.data, "sizes": whole.sizes}
        points[data] = [(float(n), FewRows(**fields, batch_size=32, rows=n)) for n in rows]  # type: ignore[arg-type]
    return points


WIDTH = experiment(
    "width",
    "hidden width",
    "Perceptrons with two hidden layers, from a few units to many more than meta-training had.",
    widths,
)
BATCH_SIZE = experiment(
    "batch-size",
    "batch size",
    "Perceptrons with two hidden layers of 64, trained for the same number of steps with minibatches of a single row "
    "up to hundreds: from gradients that are nearly all noise to nearly exact ones. The validation losses that the "
    f"learned optimizer is told are of {VALID_ROWS} rows, or of one larger minibatch.",
    batch_sizes,
)
DATASET_SIZE = experiment(
    "dataset-size",
    "number of training rows",
    "Perceptrons with two hidden layers of 64 and minibatches of 32 on the first rows of a data set. With few of "
    "them the training loss is no guide; the learned optimizer sees a loss of held-out rows in every tenth step, "
    "while the Adams train to the end.",
    dataset_sizes,
)
