"""Work spread over processes of one thread each, which end with their parent."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lopt.meta.executors import Executor, LocalProcesses
from lopt.tables import CsvTable
from lopt.tasks import datasets

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int | Executor, data: Path | None = None
) -> Iterator[tuple[Job, Result]]:
    """``(job, work(job))`` for every job, as they end; in this process, in order, if ``workers`` is 1.

    Args:
        work: can be pickled, if it is not for this process.
        workers: number of processes, no more than there are jobs, or what runs the jobs, which is not closed.
        data: folder with Fashion-MNIST's IDX files, for the processes.

    Raises:
        Exception: what ``work`` raised; jobs that have not ended are given up.

    Example:
        >>> list(in_processes(abs, [-2, 1], workers=1))
        [(-2, 2), (1, 1)]
    """
    if isinstance(workers, int) and min(workers, len(jobs)) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in jobs:
                yield job, work(job)
        finally:
            torch.set_num_threads(threads)
        return
    executor = LocalProcesses(min(workers, len(jobs))) if isinstance(workers, int) else workers
    try:
        for index, result in executor.stream(_unit, (work, data), jobs):
            yield jobs[index], result
    finally:
        if executor is not workers:
            executor.close()


def _unit(shared: tuple[Callable[[Any], Any], Path | None], job: Any) -> Any:
    work, data = shared
    if data is not None:
        datasets.FASHION_MNIST_FOLDER = data
    return work(job)


def fill(
    table: CsvTable[Any],
    jobs: Sequence[Job],
    work: Callable[[Job], Result],
    rows: Callable[[Job, Result], Sequence[Any]],
    *,
    name: Callable[[Job], str],
    workers: int | Executor = 1,
    on_done: Callable[[int, int], None] | None = None,
    data: Path | None = None,
) -> None:
    """Do jobs that ``table`` lacks; the rows of each are in it, and in its file, as soon as it has ended.

    A job is done by one thread and depends on nothing but itself: the number of workers changes no result.

    Args:
        work: see :func:`in_processes`, as for ``workers`` and ``data``.
        rows: of a job and what came of it.
        name: of a job, for errors.
        on_done: called with the numbers of jobs done and to do, at the beginning and after every job.

    Raises:
        RuntimeError: jobs that failed, after all others have ended.
    """
    report = on_done or (lambda done, total: None)
    failures: list[str] = []
    report(0, len(jobs))
    for done, (job, outcome) in enumerate(in_processes(partial(_outcome, work), jobs, workers, data), 1):
        if isinstance(outcome, Exception):
            failures.append(f"{name(job)}: {type(outcome).__name__}: {outcome}")
        else:
            table.append(rows(job, outcome))
        report(done, len(jobs))
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(jobs)} jobs failed; the first: {failures[0]}")


def _outcome(work: Callable[[Job], Result], job: Job) -> Result | Exception:
    try:
        return work(job)
    except Exception as error:  # one broken run must not cost the others; the caller says what failed
        return error
