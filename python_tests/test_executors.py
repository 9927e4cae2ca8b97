"""lopt/meta/executors.py: order, shared values, errors, and processes that are killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lopt.meta import executors
from lopt.meta.executors import LocalProcesses, Serial


@pytest.fixture(scope="module")
def two() -> Iterator[LocalProcesses]:
    executor = LocalProcesses(2)
    yield executor
    executor.close()


def square_plus(shared: int, item: int) -> tuple[int, int]:
    return shared + item * item, os.getpid()


def die_once(shared: Path, item: int) -> int:
    """Kills its own process at the first attempt at items 2 and 5."""
    if item in (2, 5):
        marker = shared / str(item)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return 10 * item


def die_always(shared: None, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def setting(shared: str, item: int) -> str | None:
    return os.environ.get(shared)


def divide(shared: float, item: float) -> float:
    return shared / item


def test_results_come_in_order_from_both_processes(two: LocalProcesses) -> None:
    for shared in (1, 100):
        results = two.map(square_plus, shared, range(40))
        assert [value for value, _ in results] == [value for value, _ in Serial().map(square_plus, shared, range(40))]
        assert os.getpid() not in {process for _, process in results}
    assert two.map(square_plus, 0, []) == []


def test_processes_are_told_to_use_one_thread_and_this_one_is_not(two: LocalProcesses) -> None:
    name, mine = "OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS")
    assert two.map(setting, name, [0]) == ["1"]
    assert os.environ.get(name) == mine


def test_a_killed_process_loses_only_its_unit(two: LocalProcesses, tmp_path: Path) -> None:
    before = {worker.process.pid for worker in two.workers}
    assert two.map(die_once, tmp_path, range(8)) == [10 * item for item in range(8)]
    assert {path.name for path in tmp_path.iterdir()} == {"2", "5"}
    assert {worker.process.pid for worker in two.workers} != before
    idle = two.workers[0].process
    assert idle.pid is not None
    os.kill(idle.pid, signal.SIGKILL)
    idle.join()
    assert [value for value, _ in two.map(square_plus, 0, range(3))] == [0, 1, 4]


def test_a_failing_unit_is_an_error_with_its_traceback() -> None:
    def close_after_the_error() -> None:
        executor = LocalProcesses(1)
        try:
            executor.map(divide, 1.0, [2.0, 0.0])
        finally:
            executor.close()  # must not hide the error

    with pytest.raises(RuntimeError, match=r"a unit of work failed in a worker process:(.|\n)*ZeroDivisionError"):
        close_after_the_error()
    with pytest.raises(ValueError, match="workers: expected a positive number, got 0"):
        LocalProcesses(0)


def test_processes_that_keep_dying_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "MAX_LOSSES", 1)
    executor = LocalProcesses(1)
    try:
        with pytest.raises(RuntimeError, match="workers: 2 processes died and no unit was finished in between"):
            executor.map(die_always, None, [0])
    finally:
        executor.close()
