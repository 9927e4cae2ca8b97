"""One larger model: losses along the run of the learned optimizer and of tuned opponents."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lopt.evaluation.jobs import Job
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LEARNED, OTHER
from lopt.experiments.rows import best, line, mean, relative, select, values
from lopt.experiments.setting import BOTH, EIGHT, Setting
from lopt.experiments.words import LOSSES, TUNED, bullets, change, number, table
from lopt.figures import GREY, Panel, draw
from lopt.tasks.task import Task

RIVALS = {"adam-tuned": ("Adam, best lr", ADAM), "adamw-cosine-tuned": ("AdamW cosine, best lr", OTHER)}


def race(
    name: str, title: str, drawn: str, about: str, tasks: Callable[[Setting], Sequence[Task]], small: int, full: int
) -> Experiment:
    """The learned optimizer, told and untold, and two opponents at four (small) or eight learning rates.

    Args:
        drawn: title of the figure.
        small, full: steps at each scale.
    """

    def jobs(setting: Setting) -> list[Job]:
        places = [(task.name, task, 0.0, setting.pick(small, full)) for task in tasks(setting)]
        trials = setting.pick(EIGHT[1::2], EIGHT)
        optimizers = [*BOTH, *((rival, trials) for rival in RIVALS)]
        return setting.jobs(name, places, optimizers, points=setting.pick(10, 20))

    about += " Theta has seen perceptrons only, unless its provenance says more."
    return Experiment(name=name, title=title, about=about, jobs=jobs, figure=partial(figure, drawn), text=text)


def figure(title: str, rows: Sequence[Run], path: Path) -> None:
    """Training and test loss of every task."""
    panels = []
    for task in values(rows, "task"):
        for split, word in (("train", "training"), ("test", "test")):
            here, lines = select(rows, task=task), []
            for name in RIVALS:
                for trial in values(select(here, name=name), "trial"):
                    lines.append(line("other lrs", select(here, name=name, trial=trial), "step", split, GREY, 0.6))
            for name, (label, colour) in (*RIVALS.items(), *reversed(LEARNED.items())):
                lines.append(line(label, best(select(here, name=name), f"{split}_loss"), "step", split, colour))
            top = 1.1 * lines[-1].y[0]
            lines = [one._replace(y=[min(value, top) for value in one.y]) for one in lines]
            panels.append(Panel(f"{task}\n{word} loss", lines, "step", log="y"))
    draw(panels, title, path, columns=2)


def text(rows: Sequence[Run]) -> list[str]:
    parts = []
    for task in values(rows, "task"):
        here, cells, sentences = select(rows, task=task), [], []
        for name, (label, _) in (LEARNED | RIVALS).items():
            row = [label]
            for loss in LOSSES:
                found = best(select(here, name=name), loss)
                lrs = values(select(here, name=name), "lr")
                edge = ", at the edge of the grid" if found[0].lr in (min(lrs), max(lrs)) else ""
                row.append(number(mean(found, loss)) + (f" (lr {found[0].lr:.1e}{edge})" if name in RIVALS else ""))
            found = select(here, name=name)
            row.append(f"{1e3 * mean(found, 'seconds') / found[0].horizon:.1f}")
            cells.append(row)
        for name, (label, _) in LEARNED.items():
            for loss, word in LOSSES.items():
                said = [f"{change(relative(here, name, r, loss))} that of {RIVALS[r][0]}" for r in RIVALS]
                sentences.append(f"The final {word} loss of {label} is {' and '.join(said)}.")
            curve = select(here, name=name)
            lowest = sum(min(row.along("test")) for row in curve) / len(curve)
            rise = mean(curve, "test_loss") / lowest
            if rise > 1.02:
                sentences.append(f"Its test loss ends {100 * (rise - 1):.0f}% above its lowest value along the run.")
        rates = len(values(select(here, name="adam-tuned"), "trial"))
        note = (
            f"{here[0].horizon:,} steps; opponents at the best of {rates} learning rates, {TUNED}. "
            "Where final losses are compared, 1% of the initial loss is added to both."
        )
        parts += [
            f"**{task}**: {note}",
            table(["optimizer", *LOSSES.values(), "ms per step"], cells),
            bullets(sentences),
        ]
    return parts
