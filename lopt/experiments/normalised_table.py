"""The paper's table: normalised losses, mean and median over tasks of many families.

Source: arXiv:2009.11243, appendix E.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lopt.evaluation.jobs import Job
from lopt.evaluation.opponents import OPPONENTS
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import LEARNED as LABELS
from lopt.experiments.rows import best, mean, select, values
from lopt.experiments.setting import BOTH, EIGHT, Setting
from lopt.experiments.words import LOSSES, bullets, number, table
from lopt.figures import COLOURS, Line, Panel, draw
from lopt.tasks import SAMPLED_FAMILIES, Task, sample_task
from lopt.tasks.data import catalogue
from lopt.tasks.families import with_batch_size

TUNED, LIST = "adam-tuned", "nadamw-list"
FIXED = ("adam", "adamw-cosine", "nadamw-list-1", "schedule-free", "prodigy")
OTHERS = tuple(colour for colour in COLOURS if colour not in [colour for _, colour in LABELS.values()])
LIMITS = {"small": 20_000, "full": 100_000}  # parameters of a task


def sample(setting: Setting) -> list[Task]:
    """The same number of tasks of every family, on held-out data, with small minibatches; large models are passed
    over."""
    data = [name for name in catalogue.SOURCES if name in catalogue.HELD_OUT and catalogue.missing(name) is None]
    tasks = []
    for family in SAMPLED_FAMILIES:
        found, seed = 0, 1000
        while found < setting.pick(1, 3) and seed < 1200:
            try:
                task = with_batch_size(sample_task(seed, [family], data), 32, 32)
            except ValueError:  # no data of the kind is here
                break
            if task.num_params <= LIMITS[setting.scale]:
                tasks.append(task)
                found += 1
            seed += 1
    return tasks


def jobs(setting: Setting) -> list[Job]:
    """Every optimizer that is installed, with one seed."""
    fixed = [(name, (0,)) for name in FIXED if OPPONENTS[name].missing is None]
    tuned = [(TUNED, EIGHT), (LIST, range(setting.pick(4, 10)))]
    steps = setting.pick(200, 500)
    places = [(f"{task.name} #{at}", task, 0.0, steps) for at, task in enumerate(sample(setting))]
    return replace(setting, seeds=setting.seeds[:1]).jobs("table", places, [*BOTH, *fixed, *tuned])


def columns(rows: Sequence[Run]) -> dict[str, list[Run]]:
    """Optimizers of the table, each with the rows that count: for tuned ones those of the best validation loss."""
    found: dict[str, list[Run]] = {}
    for name in values(rows, "name"):
        of = select(rows, name=name)
        trials = len(values(of, "trial"))
        if trials == 1:
            found[name] = of
            continue
        label = f"{name}, {trials} trials"
        found[label] = [row for task in values(of, "task") for row in best(select(of, task=task), "valid_loss")]
    return found


def normalised(rows: Sequence[Run], loss: str) -> dict[str, dict[str, float]]:
    """Optimizer -> task -> ``(L - L_best) / (L_init - L_best)``, at most 1, with the lowest loss of any run as L_best.

    Tasks that no run improves are left out.
    """
    lowest = {task: min(getattr(row, loss) for row in select(rows, task=task)) for task in values(rows, "task")}
    first = {row.task: getattr(row, f"initial_{loss}") for row in rows}
    return {
        name: {
            task: min(1.0, (mean(select(found, task=task), loss) - lowest[task]) / (first[task] - lowest[task]))
            for task in lowest
            if math.isfinite(first[task]) and first[task] > lowest[task]
        }
        for name, found in columns(rows).items()
    }


def figure(rows: Sequence[Run], path: Path) -> None:
    panels = []
    for loss, word in LOSSES.items():
        lines = []
        for order, (name, found) in enumerate(normalised(rows, loss).items()):
            ranks = [(rank + 1) / len(found) for rank in range(len(found))]
            label, colour = LABELS.get(name, (name, OTHERS[order % len(OTHERS)]))
            style = "-" if name in LABELS or order < len(LABELS) + len(OTHERS) else "--"
            lines.append(Line(label, sorted(found.values()), ranks, colour, style))
        panels.append(Panel(f"{word} loss", lines[::-1], "normalised loss", "share of tasks at or below"))
    draw(panels, f"Normalised losses after {rows[0].horizon:,} steps: further left and up is better", path)


def text(rows: Sequence[Run]) -> list[str]:
    found = {loss: normalised(rows, loss) for loss in LOSSES}
    names = list(found["train_loss"])
    cells = []
    for name in names:
        of = [list(found[loss][name].values()) for loss in LOSSES]
        cells.append([name, *(number(f(one)) for one in of for f in (statistics.fmean, statistics.median))])
    header = ["optimizer", *(f"{word} {f}" for word in LOSSES.values() for f in ("mean", "median"))]
    sentences = []
    for loss, word in LOSSES.items():
        for which, f in (("mean", statistics.fmean), ("median", statistics.median)):
            order = sorted(names, key=lambda name: f(list(found[loss][name].values())))
            places = [f"{name} is number {order.index(name) + 1}" for name in LABELS]
            sentences.append(
                f"By the {which} {word} loss, {' and '.join(places)} of {len(order)}; {order[0]} is first."
            )
        for name in LABELS:
            worst = sorted(found[loss][name], key=lambda task: -found[loss][name][task])[:3]
            said = ", ".join(f"{task} ({number(found[loss][name][task])})" for task in worst)
            sentences.append(f"{name}'s worst, {word} loss: {said}.")
    note = (
        f"{len(values(rows, 'task'))} tasks of the families for which there is held-out data here, {rows[0].horizon:,} "
        "steps, normalised loss (L - L_best) / (L_init - L_best): 0 is the best of all runs of the table on that "
        "task, 1 is the start or worse. The trial of a tuned optimizer is the one with the best validation loss on "
        "the task."
    )
    return [note, table(header, cells), bullets(sentences)]


EXPERIMENT = Experiment(
    name="table",
    title="Normalised losses over families of tasks",
    about=(
        "The paper's table in small: tasks from the sampled families, none of whose data meta-training sees, and "
        "optimizers with and without tuning. The paper has 100 tasks of 10,000 steps and up to 2,000 trials."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
