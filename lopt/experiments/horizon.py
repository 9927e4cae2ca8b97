"""From short runs to runs much longer than those of meta-training."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from lopt.evaluation.jobs import Job
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import LEARNED
from lopt.experiments.race import RIVALS
from lopt.experiments.rows import over_x, relative, select, values
from lopt.experiments.setting import BOTH, EIGHT, Setting
from lopt.experiments.words import LOSSES, TUNED, bullets, table, tally
from lopt.figures import Panel, draw
from lopt.tasks.held_out import CONTEXT, HeldOutTask


def jobs(setting: Setting) -> list[Job]:
    """Every length is a run of its own: schedules and the learned optimizer know how long they have."""
    horizons = setting.pick((200, 500, 1000, 2000, 5000), (200, 500, 1000, 2000, 5000, 10_000, 20_000))
    tasks = (
        HeldOutTask(data="digits", sizes=(64, 32, 10), batch_size=64),
        HeldOutTask(data="characters", sizes=(CONTEXT * 28, 32, 28), batch_size=64),
        HeldOutTask(data="friedman1", sizes=(10, 32, 1)),
        HeldOutTask(data="fashion-mnist-7x7", sizes=(49, 32, 10), batch_size=64),
    )
    here = [task for task in tasks[: setting.pick(2, 4)] if task.unavailable is None]
    places = [(task.name, task, float(steps), steps) for task in here for steps in horizons]
    trials = setting.pick(EIGHT[1::2], EIGHT)
    return setting.jobs("horizon", places, [*BOTH, *((name, trials) for name in RIVALS)])


def figure(rows: Sequence[Run], path: Path) -> None:
    panels = []
    for loss, word in LOSSES.items():
        for task in values(rows, "task"):
            lines = [
                over_x(label, select(rows, task=task, name=name), loss, colour)
                for name, (label, colour) in reversed((LEARNED | RIVALS).items())
            ]
            panels.append(Panel(f"{task}: {word} loss", lines, "steps", log="xy"))
    draw(panels, "Final loss against the length of the run", path, columns=max(2, len(panels) // 2))


def text(rows: Sequence[Run]) -> list[str]:
    lrs, xs = len(values(select(rows, name="adam-tuned"), "trial")), sorted(values(rows, "x"))
    parts = [
        f"Final loss relative to that of the best of {lrs} learning rates for each task and length, {TUNED}; 1% of the "
        "initial loss is added to both. Below 1 is better than the opponent."
    ]
    for loss, word in LOSSES.items():
        cells, sentences = [], []
        for name, (label, _) in LEARNED.items():
            for rival, (rival_label, _) in RIVALS.items():
                found = {
                    x: {
                        task: relative(select(rows, x=x, task=task), name, rival, loss) for task in values(rows, "task")
                    }
                    for x in xs
                }
                means = [statistics.geometric_mean(found[x].values()) for x in xs]
                cells.append([f"{label} / {rival_label}", *(f"{value:.3f}" for value in means)])
                spoken = {f"{task} at {x:,g} steps": r for x in xs for task, r in found[x].items()}
                sentences.append(f"{word.capitalize()} loss of {label} against {rival_label}: {tally(spoken)}.")
        header = [f"{word} loss, geometric mean over tasks", *(f"{x:,g} steps" for x in xs)]
        parts += [table(header, cells), bullets(sentences)]
    return parts


EXPERIMENT = Experiment(
    name="horizon",
    title="Length of the run",
    about=(
        "The same small tasks, trained for 200 to 20,000 steps: far beyond most runs of meta-training. The learned "
        "optimizer is told the number of steps, or not."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
