"""Work spread over processes of one thread each, which end with their parent."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lopt.meta.executors import Executor, LocalProcesses
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
