"""Work spread over processes of one thread each, which end with their parent."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import torch

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
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), data))
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, data: Path | None) -> None:
    """What a worker does first: one thread, the data, and an end of its own when its parent is no more."""
    torch.set_num_threads(1)
    if data is not None:
        datasets.FASHION_MNIST_FOLDER = data

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
