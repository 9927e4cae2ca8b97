"""What there is to run, and running it: jobs, whose runs are rows of one CSV file (:mod:`lopt.evaluation.table`).

What does not depend on theta is computed once, and an evaluation or experiment that was interrupted goes on where it
stopped.
"""

import hashlib
import itertools
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.evaluation.adam_grid import ADAM_GRID, BATCHED, GRID, adam_results
from lopt.evaluation.opponents import Opponent, make_optimizer, opponent
from lopt.evaluation.processes import fill
from lopt.evaluation.runs import Result, result, train_task
from lopt.evaluation.step_times import StepTime, StepTimes, measure
from lopt.evaluation.suites import data_of, family_of, fingerprint
from lopt.evaluation.table import KEY, LEARNED, LOSSES, TOLD, Run, RunTable
from lopt.meta.executors import Executor
from lopt.optimizer import LearnedOptimizer
from lopt.provenance import code_sha256, origin
from lopt.rule import WEIGHTS, Theta, shipped
from lopt.tasks.held_out import HeldOutTask
from lopt.tasks.scripts import Script
from lopt.tasks.task import Task

#: A curve has the beginning and this many points, the last of which is the end.
POINTS = 4


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The learned optimizer under evaluation; the hashes are of the file of theta and of the code."""

    theta: Theta
    theta_sha256: str
    code_sha256: str
    impl: str

    @classmethod
    def load(cls, source: Theta | str | PathLike[str], impl: str = "auto") -> "Learned":
        """A theta, the shipped one of that name, or a theta file; ``auto`` is settled here.

        Raises:
            FileNotFoundError: neither a name nor a file.
        """
        if isinstance(source, Theta):
            theta, content = source, source.to_bytes()
        else:
            theta = Theta.load(source)
            path = WEIGHTS / f"{source}.safetensors" if source in shipped() else Path(source)
            content = path.read_bytes()
        probe = LearnedOptimizer([torch.zeros(1, requires_grad=True)], theta, impl=impl)
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(theta=theta, theta_sha256=sha256, code_sha256=code_sha256(), impl=probe.implementation)


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """A run, or several Adams that are trained as one batch; subclasses say of what.

    Args:
        suite: or name of an experiment.
        optimizer: a name without budget.
        trials: which of the opponent's trials.
        x: place on the axis of an experiment.
        learned: of those whose optimizer is learned.
    """

    suite: str
    optimizer: str
    horizon: int
    seed: int
    trials: tuple[int, ...] = (0,)
    x: float = 0.0
    learned: Learned | None = field(default=None, compare=False, repr=False)

    @property
    @abstractmethod
    def subject(self) -> dict[str, Any]:
        """Columns ``task``, a name, and ``task_sha256``, a hash of all that a result depends on beside the fields."""

    @abstractmethod
    def measure(self) -> list[Result]:
        """Do it, on one thread, with the same numbers every time, but for the seconds: a result for each run."""

    @property
    def facts(self) -> dict[str, Any]:
        """Further columns."""
        return {}

    @property
    def cost(self) -> float:
        """Roughly the seconds, in some unit."""
        return self.horizon

    @property
    def impl(self) -> str:
        """Implementation of the learned optimizer, or the package an opponent comes from."""
        return opponent(self.optimizer).version or ""

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What distinguishes its runs, in columns of the table."""
        if self.optimizer in LEARNED:
            settings = LEARNED[self.optimizer]
            return [{"schedule": "learned", "lr": 1.0, "settings": json.dumps(settings) if settings else ""}]
        trials = {trial: opponent(self.optimizer).trials[trial] for trial in self.trials}
        return [
            {"schedule": "", "lr": float(chosen["lr"]), "settings": json.dumps(chosen, sort_keys=True), "trial": trial}
            for trial, chosen in trials.items()
        ]

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that say what is run."""
        learned = self.learned if self.optimizer in LEARNED else None
        if self.optimizer in LEARNED and learned is None:
            raise ValueError(f"optimizers: {self.optimizer} needs a theta, and none was given")
        return {
            **self.subject,
            "suite": self.suite,
            "optimizer": "lopt" if learned else "adam" if self.optimizer == ADAM_GRID else self.optimizer,
            "seed": self.seed,
            "horizon": self.horizon,
            "hint": self.optimizer in TOLD,
            "impl": learned.impl if learned else self.impl,
            "theta_sha256": learned.theta_sha256 if learned else "",
            "code_sha256": learned.code_sha256 if learned else "",
        }

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """The keys of its rows."""
        identity = self.identity
        return [tuple({**identity, **settings}[name] for name in KEY) for settings in self.settings]

    def rows(self, results: Sequence[Result]) -> list[Run]:
        """The rows of a job that has ended."""
        shared: dict[str, Any] = {**self.identity, **self.facts, "x": self.x, **origin()}
        return [
            Run(**shared, **settings, **_columns(outcome), steps_per_second=self.horizon / outcome.seconds)
            for settings, outcome in zip(self.settings, results, strict=True)
        ]

    def make(self, params: Sequence[Tensor], steps: int, task: Task | None = None) -> torch.optim.Optimizer:
        """Its optimizer; it may be the learned one."""
        more: dict[str, Any] = {"theta": self.learned.theta, "impl": self.learned.impl} if self.learned else {}
        return make_optimizer(self.optimizer, params, steps, self.trials[0], task=task, **more)


@dataclass(frozen=True, kw_only=True)
class TaskJob(Job):
    """Trains a task; losses are those of :func:`~lopt.evaluation.runs.train_task`, as they count (``limit``).

    Args:
        name: of the task in tables and figures, if not its own.
        points: of a curve after its beginning; with none there is no curve.
    """

    task: Task
    name: str = ""
    points: int = POINTS

    @property
    def subject(self) -> dict[str, Any]:
        return {"task": self.name or self.task.name, "task_sha256": fingerprint(self.task)}

    @property
    def facts(self) -> dict[str, Any]:
        task = self.task
        return {"num_params": task.num_params, "family": family_of(task), "data": data_of(task)}

    @property
    def impl(self) -> str:
        return "torch" if self.optimizer == ADAM_GRID else super().impl

    @property
    def settings(self) -> list[dict[str, Any]]:
        if self.optimizer == ADAM_GRID:
            return [{"schedule": config.schedule, "lr": config.lr, "settings": ""} for config in GRID]
        return super().settings

    @property
    def cost(self) -> float:
        batched = len(GRID) if self.optimizer == ADAM_GRID else len(self.trials)
        if isinstance(self.task, HeldOutTask):
            rows = self.task.batch_size * batched if batched > 1 else 50
            return self.horizon * (1e5 + self.task.num_params * rows)
        return self.horizon * (1e6 + self.task.num_params * 50) * max(1, batched / 3)

    def measure(self) -> list[Result]:
        if self.optimizer == ADAM_GRID:
            return adam_results(self.task, self.seed, self.horizon)
        if len(self.trials) > 1:
            configs = [replace(BATCHED[self.optimizer], lr=settings["lr"]) for settings in self.settings]
            return adam_results(self.task, self.seed, self.horizon, configs)
        every = math.ceil(self.horizon / max(1, self.points))
        make = partial(self.make, task=self.task)
        found = result(train_task(self.task, make, self.seed, self.horizon, record_every=every))
        return [found if self.points else replace(found, curve={})]


def _columns(outcome: Result) -> dict[str, Any]:
    """Columns of what came of a run."""
    found: dict[str, Any] = {LOSSES[split]: value for split, value in outcome.losses.items()}
    found |= {f"initial_{LOSSES[split]}": value for split, value in outcome.initial.items()}
    found |= {"diverged": outcome.diverged, "seconds": outcome.seconds}
    at = outcome.curve
    if "train" in at:
        found["curve"] = json.dumps(list(zip(at["step"], at["train"], at["test"], strict=True)))
        found["times"] = json.dumps([round(seconds, 6) for seconds in at["seconds"]])
    elif at:
        rounded = {name: [float(f"{value:.6g}") for value in values] for name, values in at.items()}
        found["curve"] = json.dumps(rounded, separators=(",", ":"))
    return found | {"state_bytes_per_param": outcome.state_bytes_per_param}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs that an evaluation consists of.

    Args:
        horizons: lengths of the runs; if there is none, those of each script.
        optimizers: names: those of ``LEARNED`` are the learned one, "adam-grid" is the references of the small suite,
            others are opponents, ``NAME@k`` with k trials.
        learned: the learned optimizer; may be None if it is not among the optimizers.
        points: of a curve after its beginning.
    """

    suite: str
    tasks: tuple[Task, ...]
    horizons: tuple[int, ...]
    seeds: tuple[int, ...]
    optimizers: tuple[str, ...]
    learned: Learned | None
    points: int = POINTS

    @property
    def jobs(self) -> list[TaskJob]:
        """All jobs, computed or not."""
        found = [
            self.job(task, name.partition("@")[0], horizon, seed, trial)
            for task in self.tasks
            for horizon, seed, name in itertools.product(self.lengths(task), self.seeds, self.optimizers)
            for trial in range(1 if name in (*LEARNED, ADAM_GRID) else len(opponent(name).trials))
        ]
        return list(dict.fromkeys(found))  # nadamw-list@10 is part of nadamw-list@100

    def job(self, task: Task, name: str, horizon: int = 1, seed: int = 0, trial: int = 0) -> TaskJob:
        """One of them."""
        learned = self.learned if name in LEARNED else None
        how: dict[str, Any] = {"optimizer": name, "trials": (trial,), "learned": learned, "points": self.points}
        return TaskJob(suite=self.suite, task=task, horizon=horizon, seed=seed, **how)

    def lengths(self, task: Task) -> tuple[int, ...]:
        """Of the runs of a task."""
        return self.horizons or task.steps if isinstance(task, Script) else self.horizons


def missing(jobs: Sequence[Job], table: RunTable) -> list[Job]:
    """The jobs of which ``table`` lacks a run."""
    return [job for job in jobs if not all(key in table.rows for key in job.keys)]


def execute(
    jobs: Sequence[Job],
    table: RunTable,
    workers: int | Executor = 1,
    on_done: Callable[[int, int], None] | None = None,
    data: Path | None = None,
    *,
    in_order: bool = False,
) -> list[Run]:
    """Run what ``table`` lacks, in ``workers`` processes, and return all runs of the jobs in their order.

    A job is computed by one thread and depends on nothing but itself: the number of workers changes no result.
    Jobs that ended are in the table, whatever becomes of the others; in the end the file is sorted. A job of which any
    run is missing is run whole, so that its losses are the same to the bit.

    Args:
        workers: number of processes, or what runs the jobs.
        on_done: called with the numbers of jobs done and to do, at the beginning and after every job.
        data: folder with Fashion-MNIST's IDX files, for the processes.
        in_order: the file has the order of the jobs.

    Raises:
        RuntimeError: jobs that failed, after all others have ended.
    """
    todo = sorted(missing(jobs, table), key=lambda job: -job.cost)  # the long ones first: no worker is left alone
    keys = [key for job in jobs for key in job.keys]
    try:
        fill(
            table,
            todo,
            _measure,
            lambda job, found: job.rows(found),
            name=lambda job: f"{job.optimizer} on {job.subject['task']}",
            workers=workers,
            on_done=on_done,
            data=data,
        )
    finally:
        if todo:
            table.tidy(keys if in_order else ())
    return [table.rows[key] for key in keys]


def _measure(job: Job) -> list[Result]:
    return job.measure()


def measure_steps(plan: Plan, table: StepTimes, on_done: Callable[[int, int], None] | None = None) -> None:
    """Measure what ``table`` lacks: seconds per step of the plan's optimizers, one task after another, in this process.

    All optimizers of a task are measured together, with their first trials; the batched grid of Adams is not.

    Args:
        on_done: called with the numbers of tasks done and to do, at the beginning and after every task.
    """
    names = [name for name in dict.fromkeys(name.partition("@")[0] for name in plan.optimizers) if name != ADAM_GRID]
    here = origin()

    def keys(task: Task) -> dict[str, tuple[str, ...]]:
        found = {name: plan.job(task, name).identity for name in names}
        return {
            name: (plan.suite, one["task_sha256"], name, one["impl"], here["machine"]) for name, one in found.items()
        }

    def measured(task: Task) -> dict[str, list[float]]:
        return measure(task, {name: partial(plan.job(task, name).make, task=task) for name in names})

    def rows(task: Task, found: dict[str, list[float]]) -> list[StepTime]:
        return [
            StepTime(
                suite=plan.suite,
                task=task.name,
                task_sha256=sha256,
                optimizer=name,
                impl=impl,
                seconds=statistics.median(found[name]),
                least=min(found[name]),
                most=max(found[name]),
                **here,
            )
            for (_, sha256, name, impl, _) in keys(task).values()
            if found[name]
        ]

    todo = [task for task in plan.tasks if not all(key in table.rows for key in keys(task).values())]
    fill(table, todo, measured, rows, name=lambda task: task.name, on_done=on_done)
    if todo:
        table.tidy()


def missing_packages(names: Sequence[str]) -> dict[str, str]:
    """Those optimizers whose package is not installed, and what to do about it."""
    found: dict[str, Opponent] = {name: opponent(name) for name in names if name not in (*LEARNED, ADAM_GRID)}
    return {name: one.missing for name, one in found.items() if one.missing is not None}
