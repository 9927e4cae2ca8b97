"""Evaluate a theta on a suite: which runs are needed, where they are kept, and in how many processes they run.

All runs are rows of one CSV file. A row is found again by what its result depends on (:attr:`Run.key`), so the
references, which do not depend on theta, are computed once, and an interrupted evaluation goes on where it stopped.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import lopt
from lopt.evaluation.runs import GRID, RECORDED, Result, adam_results, learned_results
from lopt.evaluation.suites import HeldOutTask
from lopt.meta.provenance import commit, versions
from lopt.optimizer import LearnedOptimizer
from lopt.theta import WEIGHTS, Theta, shipped

LossName = Literal["train_loss", "valid_loss", "test_loss"]
LOSSES: tuple[LossName, ...] = ("train_loss", "valid_loss", "test_loss")
assert len(LOSSES) == len(RECORDED)

#: The columns that identify a run.
KEY = (
    "task_sha256",
    "horizon",
    "seed",
    "optimizer",
    "hint",
    "impl",
    "theta_sha256",
    "code_sha256",
    "schedule",
    "lr",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a row of the CSV file. Losses are means over whole splits, ``valid`` is outer_valid."""

    suite: str
    task: str
    optimizer: str
    schedule: str
    lr: float
    seed: int
    horizon: int
    hint: bool
    train_loss: float
    valid_loss: float
    test_loss: float
    initial_train_loss: float
    initial_valid_loss: float
    initial_test_loss: float
    diverged: bool
    seconds: float
    impl: str
    task_sha256: str
    theta_sha256: str
    code_sha256: str
    commit: str
    lopt: str
    torch: str
    numpy: str
    python: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What the result depends on; a run whose key is known need not be run again."""
        return tuple(getattr(self, name) for name in KEY)


COLUMNS = {field.name: field.type for field in dataclasses.fields(Run)}


class RunTable:
    """The runs in a CSV file: read at once, appended to as they come in.

    The last row of a process that was killed while it wrote is ignored.

    Raises:
        ValueError: the file is a table of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[tuple[Any, ...], Run] = {}
        rows = list(csv.reader(io.StringIO(path.read_text()))) if path.is_file() else []
        if rows and rows[0] != list(COLUMNS):
            raise ValueError(
                f"{path}: expected the columns {', '.join(COLUMNS)}; move the file or choose another --out"
            )
        for row in rows[1:]:
            if len(row) == len(COLUMNS):
                run = _parse(row)
                self.runs[run.key] = run

    def append(self, runs: Sequence[Run]) -> None:
        """Add runs, here and in the file."""
        self.runs.update({run.key: run for run in runs})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes()[-1:] if self.path.is_file() else b""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if not before:
            writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(run) for run in runs)
        with self.path.open("a") as file:
            file.write(("\n" if before not in (b"", b"\n") else "") + text.getvalue())


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The learned optimizer under evaluation; the hashes are of the file of theta and of the code."""

    theta: Theta
    theta_sha256: str
    code_sha256: str
    impl: str

    @classmethod
    def load(cls, source: str, impl: str = "auto") -> "Learned":
        """The shipped theta of that name, or a theta file; ``auto`` is settled here.

        Raises:
            FileNotFoundError: neither a name nor a file.
        """
        theta = Theta.load(source)
        path = WEIGHTS / f"{source}.safetensors" if source in shipped() else Path(source)
        probe = LearnedOptimizer([torch.zeros(1, requires_grad=True)], theta, impl=impl)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(theta=theta, theta_sha256=sha256, code_sha256=code_sha256(), impl=probe.implementation)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs that belong together: the Adam grid, or one run of the learned optimizer, on one task from one seed."""

    task: HeldOutTask
    horizon: int
    seed: int
    optimizer: Literal["adam", "lopt"]
    hint: bool = False

    @property
    def settings(self) -> list[tuple[float, str]]:
        """Learning rate and schedule of its runs."""
        return [(config.lr, config.schedule) for config in GRID] if self.optimizer == "adam" else [(1.0, "learned")]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs that an evaluation consists of.

    Args:
        learned: what is evaluated.
        hints: whether the learned optimizer is told the number of steps; ``(True, False)`` runs it both ways.
        references: whether the Adam grid is run, too.
    """

    suite: str
    tasks: tuple[HeldOutTask, ...]
    horizons: tuple[int, ...]
    seeds: tuple[int, ...]
    hints: tuple[bool, ...]
    learned: Learned
    references: bool = True

    @property
    def jobs(self) -> list[Job]:
        """All jobs, computed or not."""
        return [
            job
            for task, horizon, seed in itertools.product(self.tasks, self.horizons, self.seeds)
            for job in (
                *([Job(task=task, horizon=horizon, seed=seed, optimizer="adam")] if self.references else []),
                *(Job(task=task, horizon=horizon, seed=seed, optimizer="lopt", hint=hint) for hint in self.hints),
            )
        ]

    def keys(self, job: Job) -> list[tuple[Any, ...]]:
        """The keys of a job's runs."""
        identity = self._identity(job)
        return [
            tuple({**identity, "lr": lr, "schedule": schedule}[name] for name in KEY) for lr, schedule in job.settings
        ]

    def runs(self, job: Job, results: Iterable[Result]) -> list[Run]:
        """The rows of a job that has ended."""
        shared: dict[str, Any] = {**self._identity(job), "commit": commit() or "", **versions()}

        def run(result: Result) -> Run:
            losses: dict[str, Any] = dict(zip(LOSSES, result.losses, strict=True))
            losses |= {f"initial_{name}": value for name, value in zip(LOSSES, result.initial, strict=True)}
            return Run(
                **shared,
                **losses,
                schedule=result.schedule,
                lr=result.lr,
                diverged=result.diverged,
                seconds=result.seconds,
            )

        return [run(result) for result in results]

    def _identity(self, job: Job) -> dict[str, Any]:
        learned = job.optimizer == "lopt"
        return {
            "suite": self.suite,
            "task": job.task.name,
            "task_sha256": job.task.fingerprint,
            "optimizer": job.optimizer,
            "seed": job.seed,
            "horizon": job.horizon,
            "hint": job.hint,
            "impl": self.learned.impl if learned else "torch",
            "theta_sha256": self.learned.theta_sha256 if learned else "",
            "code_sha256": self.learned.code_sha256 if learned else "",
        }


def execute(plan: Plan, table: RunTable, workers: int, on_done: Callable[[int, int], None] | None = None) -> list[Run]:
    """Run what ``table`` lacks, in ``workers`` processes, and return all runs of the plan in its order.

    A job is computed by one thread and depends on nothing but itself: the number of workers changes no result.
    Jobs that ended are in the table, whatever becomes of the others.

    Args:
        on_done: called with the numbers of jobs done and to do, at the beginning and after every job.
    """
    missing = [job for job in plan.jobs if not all(key in table.runs for key in plan.keys(job))]
    missing.sort(key=_cost, reverse=True)  # the long ones first, so that no worker is left alone with one at the end
    done = 0

    def report() -> None:
        if on_done is not None:
            on_done(done, len(missing))

    report()
    learned = pickle.dumps(plan.learned)  # bytes, since tensors would travel as open files
    for job, results in _map(missing, learned, min(workers, len(missing))):
        table.append(plan.runs(job, results))
        done += 1
        report()
    return [table.runs[key] for job in plan.jobs for key in plan.keys(job)]


def _map(jobs: Sequence[Job], learned: bytes, workers: int) -> Iterator[tuple[Job, list[Result]]]:
    """The jobs with their results, as they end."""
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in jobs:
                yield job, _work(job, learned)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(_work, job, learned): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _work(job: Job, learned: bytes) -> list[Result]:
    if job.optimizer == "adam":
        return adam_results(job.task, job.seed, job.horizon)
    what: Learned = pickle.loads(learned)
    return learned_results(job.task, job.seed, job.horizon, what.theta, what.impl, job.hint)


def _cost(job: Job) -> float:
    """Roughly the seconds of a job, in some unit."""
    sizes = job.task.sizes
    params = sum(a * b for a, b in itertools.pairwise(sizes))
    return job.horizon * (1e5 + params * (job.task.batch_size * len(GRID) if job.optimizer == "adam" else 50))


def _parse(row: Sequence[str]) -> Run:
    values: dict[str, Any] = {}
    for (name, kind), text in zip(COLUMNS.items(), row, strict=True):
        values[name] = text == "True" if kind is bool else kind(text)  # type: ignore[operator]
    return Run(**values)


def code_sha256() -> str:
    """SHA-256 of the code of the learned optimizer: the modules at the top of the package, compiled ones too."""
    folder = Path(lopt.__file__).parent
    files = sorted(file for file in folder.iterdir() if file.suffix in (".py", ".so", ".pyd") and file.stem != "cli")
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
