"""lopt/meta/executors.py: order, shared values, errors, and processes that are killed."""

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lopt
from lopt.commands.meta_train import MetaTrain
from lopt.meta import executors
from lopt.meta.executors import LocalProcesses, Serial
from lopt.meta.ray_workers import RayWorkers
from lopt.meta.simulated import Simulated


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

    with pytest.raises(ZeroDivisionError, match="float division by zero") as error:
        close_after_the_error()
    trace = str(error.value.__cause__)
    told = r"unit 2, divide of 0\.0, failed in worker process \d+:\nTraceback \(most recent call last\):"
    assert re.match(told, trace)
    assert "return shared / item" in trace
    with pytest.raises(ValueError, match="workers: expected a positive number, got 0"):
        LocalProcesses(0)


class Local(Exception):
    """Does not survive pickling."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail(shared: None, item: int) -> None:
    raise Local(item, item)


def test_an_error_that_cannot_travel_is_told() -> None:
    executor = LocalProcesses(1)
    try:
        with pytest.raises(
            RuntimeError, match=r"unit 1, fail of 3, failed in worker process \d+:\n(.|\n)*Local: 3 and 3"
        ):
            executor.map(fail, None, [3])
    finally:
        executor.close()


def test_what_cannot_travel_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """First by who sends it, then by who cannot find it."""
    here = types.ModuleType("only_here")
    exec("def twice(shared, item):\n    return 2 * item", here.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", here)
    executor = LocalProcesses(1)
    try:
        with pytest.raises(pickle.PicklingError, match=r"units: cannot be sent to .*lambda.*top level"):
            executor.map(lambda shared, item: item, None, [1])
        with pytest.raises(
            ImportError, match=r"a worker cannot import what it was sent: No module named 'only_here'\. Put"
        ) as error:
            executor.map(here.twice, None, [1])
        assert "unit 1, twice of 1, failed in worker process" in str(error.value.__cause__)
    finally:
        executor.close()


def test_a_script_that_its_workers_run_again_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from lopt.meta.executors import LocalProcesses\nLocalProcesses(1).map(divmod, 7, [2])\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    told = 'workers: one ended with exit code 1, before it had finished a unit; .*if __name__ == "__main__":'
    assert re.search(f"RuntimeError: {told}", done.stderr)


def test_results_come_as_they_end(two: LocalProcesses) -> None:
    """The first item ends only when the second has come."""
    with tempfile.TemporaryDirectory() as folder:
        order = []
        for index, _ in two.stream(wait_for, Path(folder), [1, 0]):
            order.append(index)
            (Path(folder) / "come").touch()
        assert order == [1, 0]


def wait_for(shared: Path, item: int) -> None:
    while item and not (shared / "come").exists():
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_the_processes_of_a_command_end_with_it(end: str, tmp_path: Path) -> None:
    """``lopt evaluate`` with two busy workers, after one Ctrl-C, as a terminal sends it to all; and killed alone."""
    command = [sys.executable, "-m", "lopt", "evaluate", "--tasks", "spirals-32-32-3", "--horizons", "10000000"]
    command += ["--seeds", "0", "1", "--workers", "2", "--optimizers", "lopt", "--out", str(tmp_path)]
    # Python leaves an interrupt ignored where it was so at the start, as in what a shell runs in the background.
    code = "import signal, os, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", code, *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1])}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while (
                process.poll() is None and len(children.read_text().split()) < 3
            ):  # multiprocessing has one of its own
                time.sleep(0.01)
            if end == "interrupt":
                os.killpg(process.pid, signal.SIGINT)
                assert process.communicate(timeout=120)[1] == "lopt: interrupted\n"
                assert process.returncode == 130
            else:
                process.kill()
                process.communicate(timeout=120)  # standard error is closed when the last of them is gone
            while group_is_there(process.pid):
                time.sleep(0.01)
        finally:
            if group_is_there(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def group_is_there(group: int) -> bool:
    """Whether a process of the group runs, which one that nobody waits for does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"executor: ray is missing; pip install 'lopt\[ray\]'"):
        RayWorkers(1)
    with pytest.raises(ValueError, match="address, allow_different: expected --executor ray with them, got local"):
        MetaTrain(address="auto")


def test_the_program_imports_ray_and_loggers_of_others_late() -> None:
    code = "import lopt.cli, sys; print({'huggingface_hub', 'ray', 'tensorboard', 'wandb'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_processes_that_keep_dying_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "MAX_LOSSES", 1)
    executor = LocalProcesses(1)
    try:
        with pytest.raises(RuntimeError, match="workers: 2 processes died and no unit was finished in between"):
            executor.map(die_always, None, [0])
    finally:
        executor.close()


def wait_then_square(shared: Path, item: int) -> int:
    wait_for(shared, item == 0)
    return item * item


def test_a_unit_may_follow_from_results_and_what_is_not_wanted_any_more_has_no_effect(tmp_path: Path) -> None:
    """Units of results, here and in two processes; then one of two is at a unit that ends only after its flow."""
    for executor in (Serial(), LocalProcesses(2)):
        found: list[int] = []

        def units(found: list[int] = found) -> Iterator[tuple[int, int]]:
            while len(found) < 4:
                yield len(found), len(found) + 1  # shared value and item

        got = []
        flow = executor.flow(add, units())
        for index, result in flow:
            got.append(index)
            found.append(result)
        assert sorted(got) == list(range(len(got)))
        assert found[0] == 1
        assert set(found) <= {1, 3, 5, 7, 9}
        executor.close()
    two = LocalProcesses(2)
    flow = two.flow(wait_then_square, iter([(tmp_path, 0), (tmp_path, 3), (tmp_path, 4)]))
    assert [next(flow), next(flow)] == [(1, 9), (2, 16)]
    flow.close()
    before = [worker.process.pid for worker in two.workers]
    assert two.map(wait_then_square, tmp_path, [5, 6]) == [25, 36]  # by the other one
    (tmp_path / "come").touch()
    assert two.map(wait_then_square, tmp_path, [0, 1, 7]) == [0, 1, 49]
    assert [worker.process.pid for worker in two.workers] == before
    two.close()


def add(shared: int, item: int) -> int:
    return shared + item


def test_simulated_workers_end_units_in_the_order_of_their_times() -> None:
    """Three workers of 1, 2 and 5 seconds; each has what it keeps; a slow user keeps workers waiting."""
    executor = Simulated(3, lambda worker, index: [1.0, 2.0, 5.0][worker])
    found = list(executor.stream(count_own, None, range(9)))
    assert [index for index, _ in found] == [0, 1, 3, 5, 4, 6, 2, 8, 7]
    assert [own for _, own in found] == [1, 1, 2, 3, 2, 4, 1, 5, 3]
    assert (executor.now, executor.waited) == (6.0, 0.0)
    times = iter([0.0, 0.5, 0.5, 10.5, 10.5, 10.5])  # of the clock, before and after what its user does
    slow = Simulated(1, lambda worker, index: 1.0, lambda: next(times))
    assert [index for index, _ in slow.stream(count_own, None, range(2))] == [0, 1]
    assert (slow.now, slow.waited, slow.spent) == (12.5, 10.5, 10.5)


def count_own(shared: None, item: int) -> int:
    here = executors.kept()
    here.value = (here.value or 0) + 1
    return int(here.value)
