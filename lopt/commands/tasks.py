"""``lopt tasks``: what tasks there are, one in words and as a curve, their time per step, whether they train."""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from lopt.benchmark.rows import Row
from lopt.commands.common import Command, Outcome, OutFile, OutFolder, Seed, say, show_table, write_json
from lopt.commands.progress import progress
from lopt.commands.task_facts import check_row, task_facts, torch_optimizers
from lopt.evaluation.runs import RECORDED, OptimizerFactory, train_task
from lopt.figures import require_matplotlib
from lopt.optimizer import LearnedOptimizer
from lopt.provenance import commit, cpu_name, versions
from lopt.tables import append_csv
from lopt.tasks import FAMILIES, NETWORK_FAMILIES, SAMPLED_FAMILIES, Task, measure, plots, sample_task
from lopt.tasks.data import catalogue
from lopt.tasks.families import Family, with_batch_size
from lopt.tasks.measure import Check

#: Groups of data sets that --data knows besides their names.
GROUPS = {
    "core": catalogue.CORE,
    "meta-train": catalogue.META_TRAIN,
    "validation": catalogue.VALIDATION,
    "held-out": catalogue.HELD_OUT,
}

#: A training curve has about so many points.
POINTS = 20

FamilyName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAMILY")]
SeedNumber = Annotated[Seed, tyro.conf.Positional, tyro.conf.arg(metavar="[SEED]")]


@dataclass(frozen=True, kw_only=True)
class TasksCommand(Command):
    """What all commands about tasks have."""

    data: tuple[str, ...] = ("core",)
    """Data sets to sample from: core (made of numbers, needs nothing), meta-train, validation, held-out, or names
    (tasks list)."""

    batch_size: int | None = None
    """Take at most so many rows into a minibatch."""

    length: int | None = None
    """Take at most so many symbols of a text at once."""

    threads: int = 1
    """Processor threads. One is quickest for small models, and the quickest by far on a busy machine."""

    def task(self, family: str, seed: int) -> Task:
        """The sampled task, with the options applied."""
        names = tuple(name for group in self.data for name in GROUPS.get(group, (group,)))
        usable = tuple(name for name in names if name not in catalogue.ALSO_HELD_OUT)
        task = sample_task(seed, [_family(family)], usable)
        if self.batch_size is None and self.length is None:
            return task
        return with_batch_size(task, self.batch_size or 2**31, self.length)

    def run(self, console: Console) -> Outcome:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.work(console)
        finally:
            torch.set_num_threads(threads)

    def work(self, console: Console) -> Outcome:
        """What the command does."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the families of tasks and the data sets: which are for meta-training, which for validation, which held out,
    which are missing."""

    def run(self, console: Console) -> Outcome:
        named = (*SAMPLED_FAMILIES, *NETWORK_FAMILIES)
        families: dict[str, str] = {name: _first_line(type(sample_task(0, [name]))) for name in named}
        say(console, "Families (lopt tasks show FAMILY SEED describes a task):")
        for family, kind in families.items():
            say(console, f"  {family:27}{kind}")
        say(console, f"Small synthetic tasks, for the fused engine: {', '.join(FAMILIES)}")
        say(console, "Data (core: made of numbers, the same everywhere):")
        numbers = {}
        for name, source in catalogue.SOURCES.items():
            remedy = catalogue.missing(name)
            role = "core" if name in catalogue.CORE else source.role
            say(console, f"  {name:15}{source.kind:8}{role:12}{'here' if remedy is None else 'missing: ' + remedy}")
            numbers[name] = {"kind": source.kind, "role": role, "missing": remedy}
        return Outcome(0, {"command": "tasks list", "families": families, "data": numbers})


@dataclass(frozen=True, kw_only=True)
class ShowTask(TasksCommand):
    """Describe one task, and draw its loss curve under Adam at three learning rates."""

    family: FamilyName
    """Which family."""

    seed: SeedNumber = 0
    """Which task of it."""

    steps: int = 200
    """Length of the runs."""

    out: OutFolder = Path("runs/tasks")
    """Folder for the figure and the JSON file."""

    plot: bool = True
    """Do not draw the figure, which needs matplotlib."""

    def work(self, console: Console) -> Outcome:
        if self.plot:
            require_matplotlib("--no-plot")
        with progress(console, "time per step"):
            task = self.task(self.family, self.seed)
            facts = task_facts(task)
        say(console, f"{task.name}: {_first_line(type(task))}")
        show_table(console, ["", "value"], [[name, _text(value)] for name, value in facts.items() if name != "config"])
        show_table(console, ["config", "value"], [[name, _text(value)] for name, value in facts["config"].items()])
        rates = (1e-4, 1e-3, 1e-2)
        with progress(console, f"{task.name}, steps") as status:
            steps, losses = measure.adam_losses(
                task, rates, self.steps, points=min(self.steps, 50), on_step=status.update
            )
        lines = {f"Adam {rate:g}": (steps, row.tolist()) for rate, row in zip(rates, losses, strict=True)}
        numbers = {"command": "tasks show", "seed": self.seed, **facts, "steps": steps, "curves": losses.tolist()}
        write_json(self.out / f"{self.family}-{self.seed}.json", numbers)
        if self.plot:
            path = self.out / f"{self.family}-{self.seed}.png"
            plots.curves(lines, f"{task.name}: training loss", path)
            say(console, f"Wrote {path}")
        return Outcome(0, numbers)


@dataclass(frozen=True, kw_only=True)
class Time(TasksCommand):
    """Measure the time of a step (a minibatch, its loss and gradient) of tasks of each family."""

    families: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FAMILY ...]")] = SAMPLED_FAMILIES
    """Which families."""

    seeds: int = 5
    """Tasks of each family."""

    def work(self, console: Console) -> Outcome:
        rows, numbers = [], []
        for family in self.families:
            times, sizes = [], []
            with progress(console, f"{family}, tasks") as status:
                for seed in range(self.seeds):
                    status.update(seed, self.seeds)
                    task = self.task(family, seed)
                    times.append(measure.seconds_per_step(task, steps=3))
                    sizes.append(task.num_params)
                    numbers.append({"family": family, "seed": seed, "seconds": times[-1], "num_params": sizes[-1]})
            cells = [f"{1e3 * value:.2f}" for value in (min(times), statistics.median(times), max(times))]
            slow = sum(value > 0.1 for value in times) / len(times)
            rows.append([family, *cells, f"{slow:.0%}", f"{statistics.median(sizes):,.0f}"])
        show_table(console, ["family", "min ms", "median ms", "max ms", "over 100 ms", "median parameters"], rows)
        return Outcome(0, {"command": "tasks time", "versions": versions(), "commit": commit(), "tasks": numbers})


@dataclass(frozen=True, kw_only=True)
class TrainTask(TasksCommand):
    """Train one task with any optimizer of torch.optim, by name, or with the learned one."""

    family: FamilyName
    """Which family."""

    seed: SeedNumber = 0
    """Which task of it."""

    optimizer: str = "lopt"
    """lopt, or a class of torch.optim: Adam, AdamW, SGD, RMSprop, ..."""

    lr: float | None = None
    """Learning rate; the optimizer's own default when left out."""

    theta: str = "default"
    """Meta-parameters of the learned optimizer: a shipped name or a file."""

    steps: int = 1000
    """Length of the run."""

    run_seed: Seed = 0
    """Decides initial weights and minibatches."""

    out: OutFolder = Path("runs/tasks")
    """Folder for the figure and the JSON file."""

    plot: bool = True
    """Do not draw the figure, which needs matplotlib."""

    def work(self, console: Console) -> Outcome:
        if self.plot:
            require_matplotlib("--no-plot")
        task = self.task(self.family, self.seed)
        every = math.ceil(self.steps / POINTS)
        maker = self._maker(task)
        with progress(console, f"{task.name}, steps") as status:
            curve = train_task(task, maker, self.run_seed, self.steps, record_every=every, on_done=status.update)
        recorded = {split: curve.losses[split] for split in RECORDED}
        say(console, f"{task.name}, {task.num_params:,} parameters, {self.optimizer}, {self.steps} steps")
        shown = sorted({0, len(curve.steps) // 4, len(curve.steps) // 2, len(curve.steps) - 1})
        show_table(
            console,
            ["loss", *(f"step {curve.steps[at]}" for at in shown)],
            [[name, *(f"{losses[at]:.4g}" for at in shown)] for name, losses in recorded.items()],
        )
        say(console, f"{1e3 * curve.seconds / self.steps:.2f} ms per step")
        numbers: dict[str, Any] = {"command": "tasks train", "config": task.config}
        numbers |= {"options": dataclasses.asdict(self), "versions": versions(), "commit": commit()}
        numbers |= {"steps": curve.steps, "losses": recorded, "seconds": curve.seconds, "diverged": curve.diverged}
        stem = f"{self.family}-{self.seed}-{self.optimizer}"
        write_json(self.out / f"{stem}.json", numbers)
        if self.plot:
            path = self.out / f"{stem}.png"
            lines: dict[str, plots.Line] = {name: (curve.steps, losses) for name, losses in recorded.items()}
            plots.curves(lines, f"{task.name}, {self.optimizer}", path)
            say(console, f"Wrote {path}")
        return Outcome(0, numbers)

    def _maker(self, task: Task) -> OptimizerFactory:
        options: dict[str, Any] = {} if self.lr is None else {"lr": self.lr}
        if self.optimizer == "lopt":
            return lambda params, steps: LearnedOptimizer(
                [task.group(params)], self.theta, total_steps=steps, **options
            )
        known = torch_optimizers()
        if self.optimizer not in known:
            raise ValueError(f"optimizer: expected lopt or one of {', '.join(known)}, got {self.optimizer!r}")
        make = known[self.optimizer]
        return lambda params, _: make(params, **options)


@dataclass(frozen=True, kw_only=True)
class CheckTasks(TasksCommand):
    """Build many tasks of each family and see whether loss and gradient are finite and Adam makes progress.

    Progress is a fall of the training loss by 1% of its distance to the floor, within 30 or else 300 steps, at the
    better of the learning rates .001 and .01. Prints the shares, and every task that diverged.
    """

    families: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FAMILY ...]")] = SAMPLED_FAMILIES
    """Which families."""

    seeds: int = 20
    """Tasks of each family."""

    limit: float = math.inf
    """Leave out tasks that take more seconds per step than this."""

    batch_size: int | None = 8
    """Take at most so many rows into a minibatch: this is about whether, not how well."""

    length: int | None = 12
    """Take at most so many symbols of a text at once."""

    out: OutFile | None = None
    """Also append the table to this CSV file, a row for each family as it is done."""

    def work(self, console: Console) -> Outcome:
        rows, numbers = [], []
        for family in self.families:
            checks: dict[int, Check] = {}
            with progress(console, f"{family}, tasks") as status:
                for seed in range(self.seeds):
                    status.update(seed, self.seeds)
                    task = self.task(family, seed)
                    if math.isfinite(self.limit) and measure.seconds_per_step(task, steps=1) > self.limit:
                        continue
                    checks[seed] = measure.check(task)
                    numbers.append({"family": family, "seed": seed, **dataclasses.asdict(checks[seed])})
            row = check_row(family, checks)
            shares = [f"{int(row[column]) / max(len(checks), 1):.1%}" for column in ("finite", "progress")]
            left_out = self.seeds - len(checks)
            rows.append([family, str(len(checks)), str(left_out), *shares, row["diverged_seeds"] or "none"])
            if self.out is not None:
                options: Row = {"too_slow": left_out, "limit": self.limit, "batch_size": self.batch_size}
                options |= {"length": self.length, "data": " ".join(self.data)}
                append_csv(self.out, [row | options | {"machine": cpu_name(), **versions(), "commit": commit()}])
        show_table(console, ["family", "tasks", "too slow", "finite at start", "progress", "diverged seeds"], rows)
        return Outcome(0, {"command": "tasks check", "versions": versions(), "commit": commit(), "checks": numbers})


@dataclass(frozen=True, kw_only=True)
class Gallery(TasksCommand):
    """Draw one figure with a loss curve of one task per family, under Adam at three learning rates."""

    seed: SeedNumber = 0
    """Which task of each family."""

    steps: int = 200
    """Length of the runs."""

    batch_size: int | None = 16
    """Take at most so many rows into a minibatch."""

    length: int | None = 24
    """Take at most so many symbols of a text at once."""

    out: OutFile = Path("runs/tasks/gallery.png")
    """The figure."""

    families: tuple[str, ...] = field(default_factory=lambda: SAMPLED_FAMILIES)
    """Which families."""

    def work(self, console: Console) -> Outcome:
        require_matplotlib()
        rates, panels = (1e-4, 1e-3, 1e-2), {}
        for family in self.families:
            task = self.task(family, self.seed)
            with progress(console, f"{task.name}, steps") as status:
                steps, losses = measure.adam_losses(
                    task, rates, self.steps, points=min(self.steps, 40), on_step=status.update
                )
            lines = {f"Adam {rate:g}": (steps, row.tolist()) for rate, row in zip(rates, losses, strict=True)}
            panels[task.name] = lines
        plots.gallery(panels, self.out)
        say(console, f"Wrote {self.out}")
        return Outcome(0, {"command": "tasks gallery", "figure": self.out})


def _family(name: str) -> Family:
    known: tuple[Family, ...] = (*SAMPLED_FAMILIES, *NETWORK_FAMILIES, *FAMILIES)
    for family in known:
        if family == name:
            return family
    raise ValueError(f"family: expected one of {', '.join(known)}, got {name!r}")


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].rstrip(":")


def _text(value: Any) -> str:
    if isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return json.dumps(value)
