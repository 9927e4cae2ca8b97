"""What the validation loss is worth: the learned optimizer with and without ``observe(valid_loss=...)``."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from lopt.evaluation.comparison import MEASURES, Measure, Runs
from lopt.evaluation.jobs import Job
from lopt.evaluation.suites import suite
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LOPT
from lopt.experiments.rows import values
from lopt.experiments.setting import Setting
from lopt.experiments.words import bullets, table, tally
from lopt.figures import GREY, Line, Panel, draw
from lopt.tasks.task import VALID_ROWS

#: The learned optimizer without validation losses.
BLIND = "lopt-blind"

WORDS: dict[Measure, str] = {"train": "training", "test": "test"}


def jobs(setting: Setting) -> list[Job]:
    """All tasks of the small held-out suite that are here."""
    lengths = setting.pick((200, 1000), (200, 1000, 5000))
    tasks = [task for task in suite("small") if task.unavailable is None]
    places = [(task.name, task, float(steps), steps) for task in tasks for steps in lengths]
    return setting.jobs("validation-ablation", places, [("lopt", (0,)), (BLIND, (0,))])


def effect(rows: Sequence[Run], measure: Measure, steps: float) -> dict[str, float]:
    """Task -> loss with validation losses relative to that without."""
    found = Runs(rows).compare("lopt", BLIND, int(steps), measure)
    return found.ratios if found is not None else {}


def figure(rows: Sequence[Run], path: Path) -> None:
    panels, colours = [], {"train": ADAM, "test": LOPT}
    for steps in sorted(values(rows, "x")):
        test = effect(rows, "test", steps)
        tasks = sorted(test, key=lambda task: test[task])
        places = list(map(float, range(len(tasks))))
        lines = [Line("no effect", places, [1.0] * len(places), GREY, "--")]
        for measure in MEASURES:
            found = effect(rows, measure, steps)
            label = f"{WORDS[measure]} loss"
            lines.append(Line(label, places, [found[task] for task in tasks], colours[measure], "", "o"))
        panels.append(Panel(f"{steps:,g} steps", lines, "", "loss, with / without", log="y", ticks=tasks))
    draw(panels, "The learned optimizer with validation losses, relative to without", path)


def text(rows: Sequence[Run]) -> list[str]:
    parts, cells = [], []
    for steps in sorted(values(rows, "x")):
        for measure in MEASURES:
            found, word = effect(rows, measure, steps), WORDS[measure]
            cells.append([f"{steps:,g}", word, f"{statistics.geometric_mean(found.values()):.3f}"])
            parts.append(f"{steps:,g} steps, {word} loss with validation losses against without: {tally(found)}.")
    header = ["steps", "loss", "with / without, geometric mean over tasks"]
    note = (
        f"The same runs, told the number of steps, with the loss of {VALID_ROWS} inner_valid rows every tenth step and "
        "without any; 1% of the initial loss is added to both losses. Below 1 the validation losses help."
    )
    return [note, table(header, cells), bullets(parts)]


EXPERIMENT = Experiment(
    name="validation-ablation",
    title="With and without validation losses",
    about=(
        "The learned optimizer may be told the loss of held-out rows, so that it can see overfitting. The paper has "
        "this input and no measurement of what it is worth. Without it, the same theta runs on the training loss alone."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
