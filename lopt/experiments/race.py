"""One larger model: losses along the run of the learned optimizer and of tuned opponents."""

from collections.abc import Sequence
from pathlib import Path

from lopt.experiments.figures import ADAM, LEARNED, OTHER
from lopt.experiments.rows import Row, best, line, mean, relative, select, values
from lopt.experiments.runs import Run, Setting
from lopt.experiments.training import EIGHT, TaskRun, learned, tuned
from lopt.experiments.words import LOSSES, TUNED, bullets, change, number, table
from lopt.figures import GREY, Panel, draw
from lopt.tasks.task import Task

RIVALS = {"adam-tuned": ("Adam, best lr", ADAM), "adamw-cosine-tuned": ("AdamW cosine, best lr", OTHER)}


def race(setting: Setting, tasks: Sequence[Task], steps: int) -> list[Run]:
    """The learned optimizer, told and untold, and two opponents at four (small) or eight learning rates."""
    trials = setting.pick(EIGHT[1::2], EIGHT)
    return [
        TaskRun(task=problem.name, problem=problem, steps=steps, seed=seed, points=setting.pick(10, 20), **how)
        for problem in tasks
        for how in (*learned(setting.theta), *(one for name in RIVALS for one in tuned(name, trials)))
        for seed in setting.seeds
    ]


def figure(title: str, rows: Sequence[Row], path: Path) -> None:
    """Training and test loss of every task."""
    panels = []
    for task in values(rows, "task"):
        for split, word in (("train", "training"), ("test", "test")):
            here, lines = select(rows, task=task), []
            for name in RIVALS:
                for trial in values(select(here, optimizer=name), "trial"):
                    lines.append(line("other lrs", select(here, optimizer=name, trial=trial), "step", split, GREY, 0.6))
            for name, (label, colour) in (*RIVALS.items(), *reversed(LEARNED.items())):
                lines.append(line(label, best(select(here, optimizer=name), f"{split}_loss"), "step", split, colour))
            top = 1.1 * lines[-1].y[0]
            lines = [one._replace(y=[min(value, top) for value in one.y]) for one in lines]
            panels.append(Panel(f"{task}\n{word} loss", lines, "step", log="y"))
    draw(panels, title, path, columns=2)


def text(rows: Sequence[Row]) -> list[str]:
    parts = []
    for task in values(rows, "task"):
        here, cells, sentences = select(rows, task=task), [], []
        for name, (label, _) in (LEARNED | RIVALS).items():
            row = [label]
            for loss in LOSSES:
                found = best(select(here, optimizer=name), loss)
                lrs = values(select(here, optimizer=name), "lr")
                edge = ", at the edge of the grid" if found[0].lr in (min(lrs), max(lrs)) else ""
                row.append(number(mean(found, loss)) + (f" (lr {found[0].lr:.1e}{edge})" if name in RIVALS else ""))
            found = select(here, optimizer=name)
            row.append(f"{1e3 * mean(found, 'seconds') / found[0].steps:.1f}")
            cells.append(row)
        for name, (label, _) in LEARNED.items():
            for loss, word in LOSSES.items():
                said = [f"{change(relative(here, name, r, loss))} that of {RIVALS[r][0]}" for r in RIVALS]
                sentences.append(f"The final {word} loss of {label} is {' and '.join(said)}.")
            curve = select(here, optimizer=name)
            lowest = sum(min(row.along("test")) for row in curve) / len(curve)
            rise = mean(curve, "test_loss") / lowest
            if rise > 1.02:
                sentences.append(f"Its test loss ends {100 * (rise - 1):.0f}% above its lowest value along the run.")
        rates = len(values(select(here, optimizer="adam-tuned"), "trial"))
        note = (
            f"{here[0].steps:,} steps; opponents at the best of {rates} learning rates, {TUNED}. "
            "Where final losses are compared, 1% of the initial loss is added to both."
        )
        parts += [
            f"**{task}**: {note}",
            table(["optimizer", *LOSSES.values(), "ms per step"], cells),
            bullets(sentences),
        ]
    return parts
