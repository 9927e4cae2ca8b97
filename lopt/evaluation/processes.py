"""Work spread over processes of one thread each, which end with their parent."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lopt.meta.executors import LocalProcesses
from lopt.tasks import datasets

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, data: Path | None = None
) -> Iterator[tuple[Job, Result]]:
    """``(job, work(job))`` for every job, as they end; in this process, in order, if ``workers`` is at most 1.

    Args:
        work: can be pickled, if there are several workers.
        data: folder with Fashion-MNIST's IDX files, for the processes.

    Raises:
        Exception: what ``work`` raised; jobs that have not ended are given up.

    Example:
        >>> list(in_processes(abs, [-2, 1], workers=1))
        [(-2, 2), (1, 1)]
    """
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in jobs:
                yield job, work(job)
        finally:
            torch.set_num_threads(threads)
        return
    processes = LocalProcesses(workers)
    try:
        for index, result in processes.stream(_unit, (work, data), jobs):
            yield jobs[index], result
    finally:
        processes.close()


def _unit(shared: tuple[Callable[[Any], Any], Path | None], job: Any) -> Any:
    work, data = shared
    if data is not None:
        datasets.FASHION_MNIST_FOLDER = data
    return work(job)
