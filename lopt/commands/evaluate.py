"""``lopt evaluate``: the learned optimizer and its opponents on a suite of tasks that meta-training never saw."""

import dataclasses
import itertools
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lopt.commands.common import Outcome, OutFolder, Seed, say, show_table
from lopt.commands.progress import progress
from lopt.commands.report import show_comparisons
from lopt.commands.weights import describe_theta
from lopt.commands.workers import Spread
from lopt.evaluation.adam_grid import ADAM_GRID, LRS
from lopt.evaluation.comparison import NO_WORSE, Runs
from lopt.evaluation.jobs import Learned, Plan, execute, measure_steps, missing, missing_packages
from lopt.evaluation.report import Report
from lopt.evaluation.runs import LOSS_LIMIT
from lopt.evaluation.scores import REFERENCES, Score, scores
from lopt.evaluation.step_times import StepTimes
from lopt.evaluation.suites import (
    SuiteName,
    data_of,
    family_of,
    fingerprint,
    suite,
    take_fashion_mnist_from,
    unavailable,
)
from lopt.evaluation.table import LEARNED, Run, RunTable
from lopt.provenance import commit, versions
from lopt.tasks.data import catalogue
from lopt.tasks.held_out import HeldOutTask
from lopt.tasks.task import Task
from lopt.tasks.text_tasks import TextData

#: Tasks with at least this many rows of data, in all splits, are also scored apart.
LARGE = 10_000

#: What the learned optimizer is told under each of its names.
HINTS = {
    "lopt": "with hint",
    "lopt-untold": "without hint",
    "lopt-averaged": "without hint, averaged",
    "lopt-blind": "with hint, without validation losses",
}

#: Lengths of runs if none is given, and where they are others; none: those of each script.
HORIZONS = (200, 1000, 2000)
LENGTHS: dict[SuiteName, tuple[int, ...]] = {
    "language": (500, 2000, 5000),
    "language-validation": (500, 2000),
    "vision": (500, 2000),
    "scripts": (),
}

#: What runs beside the learned optimizer if nothing is named: one trial each.
LINE_UP = (
    "adam",
    "adamw-cosine",
    "adamw-averaged",
    "muon",
    "soap",
    "nadamw-list-1",
    "prodigy",
    "dog",
    "mechanic",
    "schedule-free",
    "prodigy-schedule-free",
)

#: And on these suites: what is tuned for each task, or the scripts' own.
LINE_UPS: dict[SuiteName, tuple[str, ...]] = {
    "small": (ADAM_GRID,),
    "language": ("adamw-warmup-tuned", "muon-warmup-tuned"),
    "language-validation": ("adamw-warmup-tuned", "muon-warmup-tuned"),
    "vision": ("adamw-warmup-tuned", "muon-warmup-tuned"),
    "scripts": ("script", "script-adams"),
}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Spread):
    """Score a theta against other optimizers on held-out tasks: models on real data, never used for meta-training.

    The score of a task is (L + f) / (L_ref + f): final loss on a split, f = 1% of the initial loss, same initial
    weights and minibatches, mean over the seeds; below 1 is better than the reference. Opponents run as their authors
    recommend, or with the best of several trials, chosen for each task on outer_valid. Every run is a row of runs.csv
    in --out; rows that are there are not run again, so another theta costs only its own runs, and an interrupted
    evaluation goes on. lopt report shows what came out.
    """

    suite: SuiteName = "small"
    """Which tasks: small perceptrons; twelve families; images and text, with some larger models; models as people
    write them, of language on held-out texts, of language on other texts, by which to choose recipes and thetas, of
    images; training scripts that many people start from."""

    optimizers: tuple[str, ...] = ()
    """Names as in lopt.evaluation.opponents, or lopt, lopt-untold, lopt-averaged (untold, at the average of its
    iterates), lopt-blind (told no validation losses), adam-grid (14 Adams in one batch). NAME@K tries K settings for
    each task. If none is given: lopt as --hint says, and opponents without tuning, or on some suites others: adam-grid
    (small), eight AdamWs and eight Muons (language, vision), the scripts' own and three Adams (scripts)."""

    theta: str = "default"
    """Meta-parameters: a shipped name (see lopt weights show) or a file."""

    horizons: tuple[int, ...] = ()
    """Lengths of the runs in steps. If none is given 200, 1000 and 2000; for language 500, 2000 and 5000, to choose by
    and for vision 500 and 2000; for scripts each one's own."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """A seed decides initial weights and minibatches."""

    hint: Literal["both", "with", "without"] = "both"
    """Whether the learned optimizer is told the number of steps (total_steps); both runs it both ways. With
    --optimizers the names say it."""

    references: bool = True
    """Do not run opponents, if --optimizers names none; losses are then shown relative to the initial ones."""

    tasks: tuple[str, ...] = ()
    """Names of some tasks of the suite; all that are available if none is given."""

    data: Path | None = None
    """Folder with the IDX files of Fashion-MNIST, if they are not where the Debian package puts them."""

    impl: Literal["auto", "cpu", "reference", "sim"] = "auto"
    """Implementation of the learned optimizer."""

    out: OutFolder = Path("runs/evaluate")
    """Folder for runs.csv."""

    step_times: bool = False
    """Then also measure the seconds per step of every optimizer on every task, in one process, into step_times.csv in
    --out: what lopt report compares by second. Nothing else should run on the machine."""

    per_task: bool = False
    """Also show the ratios of every task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("horizons", "seeds"):
            values, least = getattr(self, name), {"horizons": 1, "seeds": 0}[name]
            if len(set(values)) < len(values) or min(values, default=least) < least:
                raise ValueError(f"{name}: expected numbers from {least} on, none twice, got {values}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one")
        if self.optimizers and self.hint != "both":
            raise ValueError(
                f"hint: expected none beside optimizers, whose names say it (lopt is told the number of steps, "
                f"lopt-untold and lopt-averaged are not), got {self.hint!r}"
            )

    def run(self, console: Console) -> Outcome:
        tasks, skipped = self._tasks()
        names = self._names()
        absent = missing_packages(names)
        for name, reason in (skipped | absent).items():
            say(console, f"Skipped {name}: {reason}")
        names = tuple(name for name in names if name not in absent)
        learned = Learned.load(self.theta, self.impl) if set(names) & set(LEARNED) else None
        if learned is not None:
            say(console, describe_theta(self.theta, learned.theta))
            say(console, f"sha256 {learned.theta_sha256}, implementation {learned.impl}")
            if not learned.theta.spec.horizon_input and "lopt" in names:
                say(console, "This theta has no horizon input: it is run once, without the hint")
                names = tuple(dict.fromkeys("lopt-untold" if name == "lopt" else name for name in names))
        if not names:
            raise ValueError(f"optimizers: none can be run; {'; '.join(absent.values())}")
        for line in dict.fromkeys(filter(None, map(_text, tasks))):
            say(console, line)
        plan = Plan(
            suite=self.suite,
            tasks=tasks,
            horizons=self.horizons or LENGTHS.get(self.suite, HORIZONS),
            seeds=self.seeds,
            optimizers=names,
            learned=learned,
        )
        table = RunTable(self.out / "runs.csv")
        runs = self._execute(console, plan, table)
        numbers = self._against_adam(console, plan, runs) if self.suite == "small" and ADAM_GRID in names else {}
        report = Report(runs=Runs(runs), title="", facts={})
        lengths = sorted({job.horizon for job in plan.jobs})
        for horizon in () if numbers else lengths:
            if report.ours and report.others:
                show_comparisons(console, report, horizon)
                continue
            say(console, "")
            say(console, f"{horizon} steps, {sum(horizon in plan.lengths(task) for task in tasks)} tasks")
            _show_losses(console, [run for run in runs if run.horizon == horizon])
        diverged = _diverged(runs)
        say(console, "")
        if numbers:
            say(
                console,
                f"Ratio: geometric mean over tasks ± standard deviation over {len(self.seeds)} seeds. "
                f"No worse: share of tasks up to {NO_WORSE}.",
            )
        for name, (count, total) in diverged.items():
            if name in LEARNED or (count and not numbers):
                who = f"learned optimizer {HINTS[name]}" if name in LEARNED else name
                say(
                    console,
                    f"Diverged, {who}: {count} of {total} runs (counted as {LOSS_LIMIT:g} times the initial loss)",
                )
        say(console, f"Every run is in {table.path}; lopt report {self.out} compares them")
        return Outcome(
            0,
            {
                "command": "evaluate",
                "options": dataclasses.asdict(self),
                "versions": versions(),
                "commit": commit(),
                "theta": None
                if learned is None
                else {
                    "name": self.theta,
                    "sha256": learned.theta_sha256,
                    "code_sha256": learned.code_sha256,
                    "implementation": learned.impl,
                    "provenance": learned.theta.provenance,
                },
                "tasks": {task.name: _facts(task) for task in tasks},
                "skipped": skipped | absent,
                "learning_rates": LRS,
                "scores": numbers,
                "diverged": {name: {"runs": count, "of": total} for name, (count, total) in diverged.items()},
                "runs": [dataclasses.asdict(run) for run in runs],
            },
        )

    def _names(self) -> tuple[str, ...]:
        """The optimizers to run."""
        if self.optimizers:
            return tuple(dict.fromkeys(self.optimizers))
        told = {"both": ("lopt", "lopt-untold"), "with": ("lopt",), "without": ("lopt-untold",)}[self.hint]
        return (*told, *(LINE_UPS.get(self.suite, LINE_UP) if self.references else ()))

    def _against_adam(self, console: Console, plan: Plan, runs: list[Run]) -> dict[str, Any]:
        """Scores against the grid of Adams, shown for all and for large tasks."""
        large = [task.name for task in plan.tasks if isinstance(task, HeldOutTask) and _rows(task) >= LARGE]
        groups = {"all": runs} | ({"large": [run for run in runs if run.task in large]} if large else {})
        found = {name: scores(group) for name, group in groups.items()}
        for horizon in plan.horizons if found["all"] else ():
            say(console, "")
            say(console, f"{horizon} steps, {len(plan.tasks)} tasks ({len(large)} large: {LARGE:,} rows or more)")
            _show_scores(console, {name: [s for s in group if s.horizon == horizon] for name, group in found.items()})
            if self.per_task:
                _show_tasks(console, [s for s in found["all"] if s.horizon == horizon])
        return {
            name: [{**dataclasses.asdict(s), "summary": s.summary._asdict()} for s in group]
            for name, group in found.items()
        }

    def _tasks(self) -> tuple[tuple[Task, ...], dict[str, str]]:
        """The tasks to run, and why others are not."""
        if self.data is not None:
            take_fashion_mnist_from(self.data)
        everything = suite(self.suite, self.data)
        names = [task.name for task in everything]
        unknown = sorted(set(self.tasks) - set(names))
        if unknown:
            raise ValueError(f"tasks: {', '.join(unknown)} not in suite {self.suite}, which has {', '.join(names)}")
        wanted = [task for task in everything if not self.tasks or task.name in self.tasks]
        reasons = {task.name: unavailable(task) for task in wanted}
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        tasks = tuple(task for task in wanted if task.name not in skipped)
        if not tasks:
            raise FileNotFoundError(f"suite {self.suite}: no task is available; {'; '.join(set(skipped.values()))}")
        return tasks, skipped

    def _execute(self, console: Console, plan: Plan, table: RunTable) -> list[Run]:
        lacking = len(missing(plan.jobs, table))
        say(console, f"{lacking} batches of runs, of {len(plan.jobs)}, that {table.path} lacks")
        with progress(console, "batches of runs") as status, self.spread() as workers:
            runs = execute(plan.jobs, table, workers, status.update, self.data)
        if self.step_times:
            with progress(console, "step times, tasks") as status:
                measure_steps(plan, StepTimes(self.out), status.update)
        return runs


def _rows(task: HeldOutTask) -> int:
    return sum(len(split.targets) for split in task.splits.values())


def _facts(task: Task) -> dict[str, Any]:
    facts = {**task.config, "family": family_of(task), "num_params": task.num_params, "sha256": fingerprint(task)}
    if isinstance(task, HeldOutTask):
        return {**facts, "rows": _rows(task), "data_sha256": task.data_sha256}
    data = task.data  # type: ignore[attr-defined]
    text = {"data_sha256": catalogue.corpus(data.name, data.variant).sha256} if isinstance(data, TextData) else {}
    return facts | text


def _text(task: Task) -> str | None:
    """Which text a task reads, since some change with the versions of Python and torch; None if it reads none."""
    if data_of(task) == "characters":
        return f"Text characters: help topics of Python {platform.python_version()}, {_facts(task)['data_sha256']}"
    data = getattr(task, "data", None)
    if not isinstance(data, TextData):
        return None
    corpus = catalogue.corpus(data.name, data.variant)
    return f"Text {data.label}: {corpus.source}, sha256 {corpus.sha256}"


def _hint(hint: bool) -> str:
    return "with hint" if hint else "without hint"


def _diverged(runs: Sequence[Run]) -> dict[str, tuple[int, int]]:
    """Diverged runs and all runs, by optimizer; Adams of the grid one by one."""
    counts: dict[str, tuple[int, int]] = {}
    for run in runs:
        name = run.name if run.schedule in ("", "learned") else f"adam {run.schedule} {run.lr:g}"
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
    """One row per task: final over initial loss, the mean over seeds and trials, for every optimizer."""
    losses = ("train_loss", "test_loss")
    names = list(dict.fromkeys(run.name for run in runs))
    header = ["final / initial loss", *(f"{loss.removesuffix('_loss')} {name}" for name in names for loss in losses)]
    rows: list[list[Any]] = []
    for task in dict.fromkeys(run.task for run in runs):
        row: list[Any] = [task]
        for name, loss in itertools.product(names, losses):
            same = [run for run in runs if run.task == task and run.name == name]
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
