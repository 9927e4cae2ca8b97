"""Evaluate optimizers on a suite: which runs are needed, and in how many processes they run.

All runs are rows of one CSV file (:mod:`lopt.evaluation.table`). What does not depend on theta is computed once, and an
interrupted evaluation goes on where it stopped.
"""

import ast
import hashlib
import itertools
import json
import math
import pickle
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

import lopt
from lopt import kernels
from lopt.evaluation.adam_grid import GRID, adam_results
from lopt.evaluation.opponents import LEARNED, Opponent, make_optimizer, opponent
from lopt.evaluation.processes import fill
from lopt.evaluation.runs import Result, result, train_task
from lopt.evaluation.step_times import StepTime, StepTimes, measure
from lopt.evaluation.suites import data_of, family_of, fingerprint
from lopt.evaluation.table import KEY, LOSSES, Run, RunTable
from lopt.meta.executors import Executor
from lopt.optimizer import LearnedOptimizer
from lopt.provenance import origin
from lopt.rule import WEIGHTS, Theta, shipped
from lopt.tasks.held_out import HeldOutTask
from lopt.tasks.scripts import Script
from lopt.tasks.task import Task

#: The references of the small suite, for any other as well: 14 Adams in one batch.
ADAM_GRID = "adam-grid"

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
class Job:
    """A run, or those of the Adam grid, which belong together.

    ``optimizer`` is a name without budget; ``trial`` is which of the opponent's trials.
    """

    task: Task
    horizon: int
    seed: int
    optimizer: str
    trial: int = 0

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What distinguishes its runs, in columns of the table."""
        if self.optimizer == ADAM_GRID:
            return [{"schedule": config.schedule, "lr": config.lr, "settings": ""} for config in GRID]
        if self.optimizer in LEARNED:
            settings = json.dumps({"average": True}) if self.optimizer == "lopt-averaged" else ""
            return [{"schedule": "learned", "lr": 1.0, "settings": settings}]
        trial = opponent(self.optimizer).trials[self.trial]
        return [{"schedule": "", "lr": trial["lr"], "settings": json.dumps(trial, sort_keys=True)}]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs that an evaluation consists of.

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
    def jobs(self) -> list[Job]:
        """All jobs, computed or not."""
        found: list[Job] = []
        for task in self.tasks:
            for horizon, seed, name in itertools.product(self.lengths(task), self.seeds, self.optimizers):
                single = name in LEARNED or name == ADAM_GRID
                trials = 1 if single else len(opponent(name).trials)
                base = name.partition("@")[0]
                found += [
                    Job(task=task, horizon=horizon, seed=seed, optimizer=base, trial=trial) for trial in range(trials)
                ]
        return list(dict.fromkeys(found))  # nadamw-list@10 is part of nadamw-list@100

    def lengths(self, task: Task) -> tuple[int, ...]:
        """Of the runs of a task."""
        return self.horizons or task.steps if isinstance(task, Script) else self.horizons

    def missing(self, table: RunTable) -> list[Job]:
        """The jobs of which ``table`` lacks a run."""
        return [job for job in self.jobs if not all(key in table.rows for key in self.keys(job))]

    def keys(self, job: Job) -> list[tuple[Any, ...]]:
        """The keys of a job's runs."""
        identity = self.identity(job)
        return [tuple({**identity, **settings}[name] for name in KEY) for settings in job.settings]

    def runs(self, job: Job, results: Sequence[Result]) -> list[Run]:
        """The rows of a job that has ended."""
        shared: dict[str, Any] = {**self.identity(job), **origin()}
        found = []
        for settings, outcome in zip(job.settings, results, strict=True):
            losses: dict[str, Any] = {LOSSES[split]: value for split, value in outcome.losses.items()}
            losses |= {f"initial_{LOSSES[split]}": value for split, value in outcome.initial.items()}
            losses |= {"curve": "", "times": ""}
            if outcome.curve:
                at = outcome.curve
                losses["curve"] = json.dumps(list(zip(at["step"], at["train"], at["test"], strict=True)))
                losses["times"] = json.dumps([round(seconds, 6) for seconds in at["seconds"]])
            found.append(
                Run(
                    **shared,
                    **settings,
                    **losses,
                    diverged=outcome.diverged,
                    seconds=outcome.seconds,
                    steps_per_second=job.horizon / outcome.seconds,
                    state_bytes_per_param=outcome.state_bytes_per_param,
                    num_params=job.task.num_params,
                    trial=job.trial,
                    family=family_of(job.task),
                    data=data_of(job.task),
                )
            )
        return found

    def identity(self, job: Job) -> dict[str, Any]:
        """Columns of a job's rows that say what was run."""
        learned = self.learned if job.optimizer in LEARNED else None
        if job.optimizer in LEARNED and learned is None:
            raise ValueError(f"optimizers: {job.optimizer} needs a theta, and none was given")
        if learned is not None:
            name, impl = "lopt", learned.impl
        elif job.optimizer == ADAM_GRID:
            name, impl = "adam", "torch"
        else:
            name, impl = job.optimizer, opponent(job.optimizer).version or ""
        return {
            "suite": self.suite,
            "task": job.task.name,
            "task_sha256": fingerprint(job.task),
            "optimizer": name,
            "seed": job.seed,
            "horizon": job.horizon,
            "hint": job.optimizer == "lopt",
            "impl": impl,
            "theta_sha256": learned.theta_sha256 if learned else "",
            "code_sha256": learned.code_sha256 if learned else "",
        }


def execute(
    plan: Plan,
    table: RunTable,
    workers: int | Executor,
    on_done: Callable[[int, int], None] | None = None,
    data: Path | None = None,
) -> list[Run]:
    """Run what ``table`` lacks, in ``workers`` processes, and return all runs of the plan in its order.

    A job is computed by one thread and depends on nothing but itself: the number of workers changes no result.
    Jobs that ended are in the table, whatever becomes of the others; in the end the file is sorted.

    Args:
        workers: number of processes, or what runs the jobs.
        on_done: called with the numbers of jobs done and to do, at the beginning and after every job.
        data: folder with Fashion-MNIST's IDX files, for the processes.

    Raises:
        RuntimeError: jobs that failed, after all others have ended.
    """
    missing = plan.missing(table)
    missing.sort(key=_cost, reverse=True)  # the long ones first, so that no worker is left alone with one at the end
    learned = pickle.dumps(plan.learned)  # bytes, since tensors would travel as open files
    try:
        fill(
            table,
            missing,
            partial(_work, learned, plan.points),
            plan.runs,
            name=lambda job: f"{job.optimizer} on {job.task.name}",
            workers=workers,
            on_done=on_done,
            data=data,
        )
    finally:
        if missing:
            table.tidy()
    return [table.rows[key] for job in plan.jobs for key in plan.keys(job)]


def measure_steps(plan: Plan, table: StepTimes, on_done: Callable[[int, int], None] | None = None) -> None:
    """Measure what ``table`` lacks: seconds per step of the plan's optimizers, one task after another, in this process.

    All optimizers of a task are measured together, with their first trials; the batched grid of Adams is not.

    Args:
        on_done: called with the numbers of tasks done and to do, at the beginning and after every task.
    """
    names = [name for name in dict.fromkeys(name.partition("@")[0] for name in plan.optimizers) if name != ADAM_GRID]
    here = origin()

    def keys(task: Task) -> list[tuple[str, ...]]:
        found = [plan.identity(Job(task=task, horizon=1, seed=0, optimizer=name)) for name in names]
        return [
            (plan.suite, one["task_sha256"], name, one["impl"], here["machine"])
            for name, one in zip(names, found, strict=True)
        ]

    missing = [task for task in plan.tasks if not all(key in table.rows for key in keys(task))]

    def measured(task: Task) -> dict[str, list[float]]:
        return measure(task, {name: partial(_make, plan.learned, task, name, 0) for name in names})

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
            for (_, sha256, name, impl, _) in keys(task)
            if found[name]
        ]

    fill(table, missing, measured, rows, name=lambda task: task.name, on_done=on_done)
    if missing:
        table.tidy()


def _make(
    learned: Learned | None, task: Task, name: str, trial: int, params: list[torch.Tensor], steps: int
) -> torch.optim.Optimizer:
    """The optimizer of that name for a task; it may be the learned one."""
    more: dict[str, Any] = {"theta": learned.theta, "impl": learned.impl} if learned else {}
    return make_optimizer(name, params, steps, trial, task=task, **more)


def _work(learned: bytes, points: int, job: Job) -> list[Result]:
    """The results of a job."""
    if job.optimizer == ADAM_GRID:
        return adam_results(job.task, job.seed, job.horizon)
    curve = train_task(
        job.task,
        partial(_make, pickle.loads(learned), job.task, job.optimizer, job.trial),
        job.seed,
        job.horizon,
        record_every=math.ceil(job.horizon / points),
    )
    return [result(curve)]


def missing_packages(names: Sequence[str]) -> dict[str, str]:
    """Those optimizers whose package is not installed, and what to do about it."""
    found: dict[str, Opponent] = {name: opponent(name) for name in names if name not in (*LEARNED, ADAM_GRID)}
    return {name: one.missing for name, one in found.items() if one.missing is not None}


def _cost(job: Job) -> float:
    """Roughly the seconds of a job, in some unit."""
    grid = job.optimizer == ADAM_GRID
    if isinstance(job.task, HeldOutTask):
        return job.horizon * (1e5 + job.task.num_params * (job.task.batch_size * len(GRID) if grid else 50))
    return job.horizon * (1e6 + job.task.num_params * 50) * (len(GRID) / 3 if grid else 1)


#: Modules at the top of the package that have no part in a step.
NOT_THE_OPTIMIZER = ("__main__", "cli", "figures", "files", "provenance")


def code_sha256() -> str:
    """SHA-256 of the code of the learned optimizer: the sources that were compiled, and what the modules at the top of
    the package, of rule and of kernels do, whatever their comments and docstrings say."""
    package = Path(lopt.__file__).parent
    parts = [*package.glob("*.py"), *package.glob("rule/*.py"), *package.glob("kernels/*.py")]
    modules = sorted(file for file in parts if file.stem not in NOT_THE_OPTIMIZER)
    digest = hashlib.sha256(kernels.source_sha256().encode())
    for file in modules:
        digest.update(ast.dump(without_docstrings(ast.parse(file.read_text(encoding="utf-8")))).encode())
    return digest.hexdigest()


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same program, with ``...`` where a docstring was.

    Example:
        >>> ast.unparse(without_docstrings(ast.parse("def f(x):\\n    'Twice x.'\\n    return 2 * x")))
        'def f(x):\\n    ...\\n    return 2 * x'
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant(...))
    return tree
