"""``lopt evaluate``: the learned optimizer against Adam on a suite of tasks that meta-training never saw."""

import dataclasses
import itertools
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lopt.commands.common import Command, Outcome, say, show_table
from lopt.commands.weights import describe_theta
from lopt.evaluation.compare import Learned, Plan, Run, RunTable, execute
from lopt.evaluation.runs import LOSS_LIMIT, LRS
from lopt.evaluation.scores import NO_WORSE, REFERENCES, Score, scores
from lopt.evaluation.suites import HeldOutTask, SuiteName, load, suite
from lopt.meta.provenance import commit, versions

#: Tasks with at least this many rows of data, in all splits, are also scored apart.
LARGE = 10_000

LINES = 10  # of progress, off a terminal


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Score a theta against Adam on held-out tasks: small models on real data, never used for meta-training.

    The score of a task is (L + f) / (L_ref + f): final loss on a whole split, f = 1% of the initial loss, same
    initial weights and minibatches, mean over the seeds; below 1 is better than the reference. References are Adam
    and cosine Adam at 7 learning rates, chosen for each task. Every run is a row of runs.csv in --out; rows that are
    there are not run again, so another theta costs only its own runs.
    """

    suite: SuiteName = "small"
    """Which tasks."""

    theta: str = "default"
    """Meta-parameters: a shipped name (see lopt weights show) or a file."""

    horizons: tuple[int, ...] = (200, 1000, 2000)
    """Lengths of the runs in steps."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed decides initial weights and minibatches."""

    hint: Literal["both", "with", "without"] = "both"
    """Whether the learned optimizer is told the number of steps (total_steps); both runs it both ways."""

    references: bool = True
    """Also run Adam. Without, final losses are shown relative to the initial ones: enough to see what diverges."""

    tasks: tuple[str, ...] = ()
    """Names of some tasks of the suite; all that are available if none is given."""

    data: Path | None = None
    """Folder with the IDX files of Fashion-MNIST, if they are not where the Debian package puts them."""

    impl: Literal["auto", "cpu", "reference", "sim"] = "auto"
    """Implementation of the learned optimizer."""

    workers: int | None = None
    """Processes; one per processor if not given. Does not change results."""

    out: Path = Path("runs/evaluate")
    """Folder for runs.csv."""

    per_task: bool = False
    """Also show the ratios of every task."""

    def __post_init__(self) -> None:
        for name in ("horizons", "seeds"):
            values, least = getattr(self, name), {"horizons": 1, "seeds": 0}[name]
            if not values or len(set(values)) < len(values) or min(values) < least:
                raise ValueError(f"{name}: expected numbers from {least} on, at least one and none twice, got {values}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")

    def run(self, console: Console) -> Outcome:
        tasks, skipped = self._tasks()
        learned = Learned.load(self.theta, self.impl)
        hints = {"both": (True, False), "with": (True,), "without": (False,)}[self.hint]
        if not learned.theta.spec.horizon_input:
            hints = (False,)
        plan = Plan(
            suite=self.suite,
            tasks=tasks,
            horizons=self.horizons,
            seeds=self.seeds,
            hints=hints,
            learned=learned,
            references=self.references,
        )
        say(console, describe_theta(self.theta, learned.theta))
        say(console, f"sha256 {learned.theta_sha256}, implementation {learned.impl}")
        if not learned.theta.spec.horizon_input and self.hint != "without":
            say(console, "This theta has no horizon input: it is run once, without the hint")
        for name, reason in skipped.items():
            say(console, f"Skipped {name}: {reason}")
        for task in tasks:
            if task.data == "characters":
                text = f"help topics of Python {platform.python_version()}"
                say(console, f"Text of {task.name}: {text}, sha256 of its rows {task.data_sha256}")
        table = RunTable(self.out / "runs.csv")
        runs = self._execute(console, plan, table)

        large = [task.name for task in tasks if _rows(task) >= LARGE]
        groups = {"all": runs} | ({"large": [run for run in runs if run.task in large]} if large else {})
        found = {name: scores(group) for name, group in groups.items()} if self.references else {}
        for horizon in self.horizons:
            say(console, "")
            say(console, f"{horizon} steps, {len(tasks)} tasks ({len(large)} large: {LARGE:,} rows or more)")
            if not self.references:
                _show_losses(console, [run for run in runs if run.horizon == horizon])
                continue
            _show_scores(console, {name: [s for s in group if s.horizon == horizon] for name, group in found.items()})
            if self.per_task:
                _show_tasks(console, [s for s in found["all"] if s.horizon == horizon])
        diverged = _diverged(runs)
        say(console, "")
        if self.references:
            say(
                console,
                f"Ratio: geometric mean over tasks ± standard deviation over {len(self.seeds)} seeds. "
                f"No worse: share of tasks up to {NO_WORSE}.",
            )
        for hint in hints:
            count, total = diverged[f"lopt {_hint(hint)}"]
            say(
                console,
                f"Diverged, learned optimizer {_hint(hint)}: {count} of {total} runs "
                f"(counted as {LOSS_LIMIT:g} times the initial loss)",
            )
        say(console, f"Every run is in {table.path}")
        return Outcome(
            0,
            {
                "command": "evaluate",
                "options": dataclasses.asdict(self),
                "versions": versions(),
                "commit": commit(),
                "theta": {
                    "name": self.theta,
                    "sha256": learned.theta_sha256,
                    "code_sha256": learned.code_sha256,
                    "implementation": learned.impl,
                    "provenance": learned.theta.provenance,
                },
                "tasks": {task.name: _facts(task) for task in tasks},
                "skipped": skipped,
                "learning_rates": LRS,
                "scores": {
                    name: [{**dataclasses.asdict(s), "summary": s.summary._asdict()} for s in group]
                    for name, group in found.items()
                },
                "diverged": {name: {"runs": count, "of": total} for name, (count, total) in diverged.items()},
                "runs": [dataclasses.asdict(run) for run in runs],
            },
        )

    def _tasks(self) -> tuple[tuple[HeldOutTask, ...], dict[str, str]]:
        """The tasks to run, and why others are not."""
        if self.data is not None:
            load("fashion-mnist", self.data)  # a folder that was asked for must be good
        everything = suite(self.suite, self.data)
        names = [task.name for task in everything]
        unknown = sorted(set(self.tasks) - set(names))
        if unknown:
            raise ValueError(f"tasks: {', '.join(unknown)} not in suite {self.suite}, which has {', '.join(names)}")
        wanted = [task for task in everything if not self.tasks or task.name in self.tasks]
        reasons = {task.name: task.unavailable for task in wanted}
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        tasks = tuple(task for task in wanted if task.name not in skipped)
        if not tasks:
            raise FileNotFoundError(f"suite {self.suite}: no task is available; {'; '.join(set(skipped.values()))}")
        return tasks, skipped

    def _execute(self, console: Console, plan: Plan, table: RunTable) -> list[Run]:
        workers = self.workers or len(os.sched_getaffinity(0))
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("batches of runs", total=None)

            def on_done(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)
                if console.is_terminal:
                    return
                if done == 0:
                    say(
                        console,
                        f"{len(plan.jobs)} batches of runs, of which {len(plan.jobs) - total} are in {table.path}",
                    )
                elif done % math.ceil(total / LINES) == 0:
                    say(console, f"{done}/{total}")

            return execute(plan, table, workers, on_done)


def _rows(task: HeldOutTask) -> int:
    return sum(len(split.targets) for split in task.splits.values())


def _facts(task: HeldOutTask) -> dict[str, Any]:
    return {**task.config, "rows": _rows(task), "sha256": task.fingerprint, "data_sha256": task.data_sha256}


def _hint(hint: bool) -> str:
    return "with hint" if hint else "without hint"


def _diverged(runs: Sequence[Run]) -> dict[str, tuple[int, int]]:
    """Diverged runs and all runs, by optimizer."""
    counts: dict[str, tuple[int, int]] = {}
    for run in runs:
        name = f"lopt {_hint(run.hint)}" if run.optimizer == "lopt" else f"adam {run.schedule} {run.lr:g}"
        count, total = counts.get(name, (0, 0))
        counts[name] = (count + run.diverged, total + 1)
    return counts


def _show_scores(console: Console, groups: dict[str, list[Score]]) -> None:
    """One row per loss and reference, three columns per hint; for the large tasks, the tuned references only."""
    hints = list(dict.fromkeys(s.hint for s in groups["all"]))
    header = ["loss, against"]
    for hint in hints:
        header += [f"ratio {_hint(hint)}", "no worse", "worst"]
    rows = []
    for group, found in groups.items():
        for loss, references in REFERENCES.items():
            for reference in references[: None if group == "all" else 2]:
                same = [s for s in found if s.loss == loss and s.reference == reference.name]
                where = f"{loss.removesuffix('_loss')}{'' if group == 'all' else ', large tasks'}"
                row = [f"{where}: {reference.name}"]
                for s in same:
                    spread = "" if math.isnan(s.spread) else f" ± {s.spread:.3f}"
                    worst = f"{s.ratios[s.summary.worst]:.2f} {s.summary.worst}"
                    row += [f"{s.summary.ratio:.3f}{spread}", f"{s.summary.no_worse:.0%}", worst]
                rows.append(row)
    show_table(console, header, rows)


def _show_losses(console: Console, runs: Sequence[Run]) -> None:
    """One row per task: final over initial loss, the mean over the seeds, for every split and hint."""
    losses, hints = ("train_loss", "test_loss"), list(dict.fromkeys(run.hint for run in runs))
    header = ["final / initial loss", *(f"{loss.removesuffix('_loss')} {_hint(h)}" for h in hints for loss in losses)]
    rows: list[list[Any]] = []
    for task in dict.fromkeys(run.task for run in runs):
        row: list[Any] = [task]
        for hint, loss in itertools.product(hints, losses):
            same = [run for run in runs if run.task == task and run.hint == hint]
            ratios = [getattr(run, loss) / getattr(run, f"initial_{loss}") for run in same]
            row.append(f"{sum(ratios) / len(ratios):.4f}")
        rows.append(row)
    show_table(console, header, rows)


def _show_tasks(console: Console, found: Sequence[Score]) -> None:
    """One row per task, its ratio against the first two references of both losses, for every hint."""
    shown: list[Score] = [s for s in found if s.reference in [reference.name for reference in REFERENCES[s.loss][:2]]]
    header = ["task"]
    for s in shown:
        header.append(f"{s.loss.removesuffix('_loss')}: {s.reference}, {_hint(s.hint)}")
    rows: list[list[Any]] = [[task, *(f"{s.ratios[task]:.3f}" for s in shown)] for task in shown[0].ratios]
    show_table(console, header, rows)
