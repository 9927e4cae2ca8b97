"""Loss against wall-clock time: a step of the learned optimizer costs more than one of Adam."""

from collections.abc import Sequence
from pathlib import Path

from lopt.evaluation.jobs import Job
from lopt.evaluation.table import Run
from lopt.experiments.axes import available, perceptron
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LOPT, OTHER
from lopt.experiments.rows import average, best, line, mean, select, values
from lopt.experiments.setting import EIGHT, Setting
from lopt.experiments.words import bullets, change, number, table
from lopt.figures import Panel, draw

TUNED, FIXED = "adam-tuned", "adamw-cosine"
SHOWN = {"lopt": ("lopt", LOPT), TUNED: ("Adam, best lr", ADAM), FIXED: ("AdamW cosine, 1e-3", OTHER)}


def jobs(setting: Setting) -> list[Job]:
    """Perceptrons of several sizes, as the share of the optimizer in a step depends on the model and the minibatch."""
    sizes = setting.pick(((32, 32), (256, 64)), ((32, 32), (128, 64), (512, 64)))  # width, rows
    places = [
        (f"{data}, width {width}, batch {rows}", perceptron(data, (width, width), rows), 0.0, setting.pick(600, 1500))
        for data in available(setting.pick(("digits",), ("digits", "characters")))
        for width, rows in sizes
    ]
    trials = setting.pick(EIGHT[1::2], EIGHT)
    return setting.jobs("time", places, [("lopt", (0,)), (TUNED, trials), (FIXED, (0,))], points=60)


def chosen(rows: Sequence[Run], task: str) -> dict[str, list[Run]]:
    """The runs that are shown, one per seed; Adam's learning rate is chosen by the final training loss."""
    return {name: best(select(rows, task=task, name=name), "train_loss") for name in SHOWN}


def figure(rows: Sequence[Run], path: Path) -> None:
    panels = []
    for task in values(rows, "task"):
        for axis, word in (("seconds", "seconds"), ("step", "steps")):
            lines = [
                line(SHOWN[name][0], found, axis, "train", SHOWN[name][1])
                for name, found in reversed(chosen(rows, task).items())
            ]
            panels.append(Panel(task, lines, word, "training loss", log="y"))
    draw(panels, "Training loss against time (one thread) and against steps", path, columns=4)


def reached(rows: Sequence[Run], level: float) -> float | None:
    """Seconds until the mean training loss first was at or below the level; None if it never was."""
    times, losses = average(rows, "seconds"), average(rows, "train")
    return next((time for time, loss in zip(times, losses, strict=True) if loss <= level), None)


def text(rows: Sequence[Run]) -> list[str]:
    cells, sentences = [], []
    for task in values(rows, "task"):
        found = chosen(rows, task)
        times = {name: 1e3 * mean(same, "seconds") / same[0].horizon for name, same in found.items()}
        ours, adam = found["lopt"], found[TUNED]
        at_end = mean(ours, "train_loss") / mean(adam, "train_loss")
        shorter = min(mean(ours, "seconds"), mean(adam, "seconds"))
        losses = [_at(same, shorter) for same in (ours, adam)]
        cells.append([task, *(f"{value:.2f}" for value in times.values()), f"{times['lopt'] / times[TUNED]:.2f}"])
        cells[-1] += [f"{at_end:.3f}", f"{losses[0] / losses[1]:.3f}"]
        takes = reached(ours, mean(adam, "train_loss"))
        until = (
            "never reaches the loss at which Adam ends"
            if takes is None
            else f"reaches the loss at which Adam ends after {number(takes / mean(adam, 'seconds'))} of Adam's time"
        )
        sentences.append(
            f"{task}: after the same number of steps lopt's training loss is {change(at_end)} that of Adam at its best "
            f"learning rate ({adam[0].lr:.1e}), after the same time {change(losses[0] / losses[1])} it; lopt {until}."
        )
    header = ["task", *(f"{label}, ms per step" for label, _ in SHOWN.values()), "lopt / Adam"]
    header += ["training loss, lopt / Adam, same steps", "same time"]
    note = (
        "Adam's learning rate is chosen for each task by the final training loss; the time to find it is not counted."
    )
    return [table(header, cells), note, bullets(sentences)]


def _at(rows: Sequence[Run], seconds: float) -> float:
    """Mean training loss at the last record before that time."""
    times, losses = average(rows, "seconds"), average(rows, "train")
    return [loss for time, loss in zip(times, losses, strict=True) if time <= seconds][-1]


EXPERIMENT = Experiment(
    name="time",
    title="Loss against wall-clock time",
    about=(
        "A step of the learned optimizer takes longer than one of Adam; how much longer the whole step of training "
        "takes depends on the model and the minibatch. Times are of one thread, minibatches, gradients and (for the "
        "learned optimizer) validation losses included, recordings left out."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
