"""lopt/meta/ray_workers.py on a small cluster of this machine: same bits, whatever becomes of the workers."""

import csv
import dataclasses
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_cases import SMALL
from ray_units import (
    Local,
    die_after,
    die_always,
    die_once,
    divide,
    environment,
    fail,
    meet,
    model,
    node_of,
    rows,
    square_plus,
)
from rich.console import Console
from torch import Tensor, nn

import lopt
from lopt import Theta
from lopt.cli import main
from lopt.evaluation.processes import in_processes
from lopt.meta import asynchronous, checkpoint, ray_workers, trainer
from lopt.meta.config import Phase
from lopt.meta.executors import Executor, Serial
from lopt.meta.metrics import read_metrics
from lopt.meta.ray_workers import RayWorkers
from lopt.tasks import Batch, Task, from_module

ray = pytest.importorskip("ray", reason="needs the extra ray")
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs Ray's own cluster for tests")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip.*:FutureWarning")]

CLOCKS = ("seconds", "steps_per_second", "times")  # columns of runs.csv


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two processors, on one node."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    system = {"worker_niceness": 0, "enable_worker_prestart": False, "prestart_worker_first_driver": False}
    small = {"num_gpus": 0, "object_store_memory": ray_workers.OBJECT_STORE}
    found = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, **small, "include_dashboard": False, "_system_config": system},
    )
    yield found
    found.shutdown()


@contextmanager
def another_node(cluster: Any, cpus: int, **environment: str) -> Iterator[str]:
    """The id of a node that joins the cluster, and leaves in the end."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        node = cluster.add_node(num_cpus=cpus, num_gpus=0, object_store_memory=ray_workers.OBJECT_STORE)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
    try:
        yield node.node_id
    finally:
        cluster.remove_node(node)


def train(out: Path, executor: Executor) -> tuple[bytes, torch.Tensor, str]:
    """Theta's parameters, the moments and the states of runs that a run ends with."""
    theta = trainer.run(SMALL, out, executor=executor, console=Console(file=io.StringIO()))
    state = checkpoint.load(out / "checkpoint.pt")[2]
    return theta.flatten().numpy().tobytes(), torch.stack(tuple(state.moments[:2])), repr(state.carries)


class Deadly(RayWorkers):
    """Workers that die of the last group of every iteration, once each, when it is computed."""

    folder: Path

    def stream(self, function: Any, shared: Any, items: Any) -> Any:
        return super().stream(die_after, (self.folder, function, shared), items)


def test_meta_training_gives_the_same_bits_with_any_number_of_workers_and_losses(cluster: Any, tmp_path: Path) -> None:
    theta, moments, carries = train(tmp_path / "serial", Serial())
    for name, workers in (("one", 1), ("two", 2), ("killed", 2)):
        with closing((Deadly if name == "killed" else RayWorkers)(workers, cluster.address)) as executor:
            if isinstance(executor, Deadly):
                executor.folder = tmp_path
            found = train(tmp_path / name, executor)
        assert found[0] == theta
        assert torch.equal(found[1], moments)
        assert found[2] == carries
    assert len(list(tmp_path.glob("died-*"))) >= 5


class Here(Task):
    """By value, as Ray sends what a module that workers cannot import defines."""

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"x": torch.ones(3)}

    def loss(self, params: Any, batch: Any) -> Tensor:
        return (params["x"] - batch.targets).square().mean()

    def batches(self, seed: int, split: str, start: int = 0) -> Iterator[Batch]:
        return (Batch(torch.zeros(1, 0), torch.full((1, 3), 1.0 / (number + 2))) for number in itertools.count(start))


def test_tasks_of_ones_own_give_the_same_bits(cluster: Any, tmp_path: Path) -> None:
    tasks = [from_module(model, nn.functional.mse_loss, rows, batch_size=8), Here()]
    quick = {"inner_steps": 200, "pairs": 4, "pairs_per_task": 2, "validation_tasks": 1, "validation_horizons": (10,)}
    found = []
    with closing(RayWorkers(2, cluster.address)) as executor:
        for name, where in (("serial", 1), ("ray", executor)):
            out, phases = tmp_path / name, (Phase(1.0, (10, 20), "linear"),)
            lopt.meta_train("own", out, tasks=tasks, executor=where, phases=phases, warmup_from_file=0, **quick)
            found.append(Theta.load(out / "theta_last.safetensors").flatten())
    assert torch.equal(*found)
    assert not torch.equal(found[0], Theta.load("default").flatten())


def test_units(cluster: Any, tmp_path: Path) -> None:
    with closing(RayWorkers(None, cluster.address)) as executor:
        for shared in (1, 100):
            results = executor.map(square_plus, shared, range(20))
            assert [value for value, _ in results] == [shared + item * item for item in range(20)]
        assert len(executor.workers) <= 2
        assert os.getpid() not in {process for _, process in results}
        assert executor.map(square_plus, 0, []) == []
        assert executor.map(environment, "OPENBLAS_NUM_THREADS", [0]) == ["1"]
        before = set(executor.workers)
        assert executor.map(die_once, tmp_path, range(8)) == [10 * item for item in range(8)]
        assert {path.name for path in tmp_path.iterdir()} == {"2", "5"}
        assert set(executor.workers) != before
        assert dict(in_processes(abs, [-2, 1], executor)) == {-2: 2, 1: 1}
        with pytest.raises(RuntimeError, match=r"unit 1, die_always of 0, was lost with 6 workers, the last one"):
            executor.map(die_always, None, [0])


def test_an_error_names_the_unit_and_the_worker_and_has_the_traceback(cluster: Any) -> None:
    with (
        closing(RayWorkers(1, cluster.address)) as executor,
        pytest.raises(ZeroDivisionError, match="float division by zero") as error,
    ):
        executor.map(divide, 1.0, [2.0, 0.0])
    trace = str(error.value.__cause__)
    assert re.match(r"unit 2, divide of 0\.0, failed in worker .*process \d+:\nTraceback \(most recent", trace)
    assert "return shared / item" in trace
    with (
        closing(RayWorkers(1, cluster.address)) as executor,
        pytest.raises(RuntimeError, match=r"unit 1, fail of 3, failed in worker (.|\n)*Local: 3 and 3"),
    ):
        executor.map(fail, None, [3])
    assert issubclass(Local, Exception)


def test_a_worker_that_joins_later_takes_part(cluster: Any, tmp_path: Path) -> None:
    """Three units that end only together, on two processors until two units have begun."""
    with closing(RayWorkers(3, cluster.address)) as executor, ThreadPoolExecutor(1) as thread:
        nodes = thread.submit(executor.map, meet, tmp_path, range(3))
        while len(list(tmp_path.iterdir())) < 2 and not nodes.done():
            time.sleep(0.01)
        with another_node(cluster, 1) as node:
            found = nodes.result()
            assert sorted(map(found.count, set(found))) == [1, 2]
            assert found.count(node) == 1
        assert node not in executor.map(node_of, None, range(20))  # it has left


def work_until_refused(executor: RayWorkers, nodes: list[str]) -> None:
    while not executor.refused:
        nodes += executor.map(node_of, None, range(20))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs a second instruction set")
def test_a_worker_with_another_instruction_set_is_refused_unless_allowed(cluster: Any, tmp_path: Path) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    with another_node(cluster, 1, ATEN_CPU_CAPABILITY="default") as node:
        told = rf"refused worker .*\(.*\), process \d+: instruction set of torch DEFAULT \(here {here}\); its results"
        with closing(RayWorkers(3, cluster.address)) as executor:
            nodes: list[str] = []
            with pytest.warns(UserWarning, match=told):
                work_until_refused(executor, nodes)
            assert node not in nodes
            assert list(executor.refused) == [node]
            assert node not in executor.map(node_of, None, range(20))
        with closing(RayWorkers(3, cluster.address, allow_different=True)) as executor:
            assert node in executor.map(meet, tmp_path, range(3))


def test_where_all_workers_are_refused_that_is_an_error(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**ray_workers.fingerprint(), "lopt": "0.0"}
    monkeypatch.setattr(ray_workers, "fingerprint", lambda: other)
    with (
        closing(RayWorkers(1, cluster.address)) as executor,
        pytest.warns(UserWarning, match=rf"refused worker .*: lopt {lopt.__version__} \(here 0\.0\)"),
        pytest.raises(RuntimeError, match=r"workers: all were refused, .*: lopt .* \(here 0\.0\)"),
    ):
        executor.map(square_plus, 0, [1])


def test_a_cluster_of_this_machine_for_a_command(tmp_path: Path) -> None:
    command = ["meta-train", "--recipe", "tiny", "--inner-steps", "60", "--set", "pairs=2", "validation_tasks=1"]
    for name, options in (("serial", ["--workers", "1"]), ("ray", ["--executor", "ray", "--workers", "2"])):
        assert main([*command, "--out", str(tmp_path / name), *options]) == 0
    thetas = [lopt.Theta.load(tmp_path / name / "theta.safetensors").flatten() for name in ("serial", "ray")]
    assert torch.equal(*thetas)
    assert not ray.is_initialized()


def test_a_cluster_without_authentication_is_reached_after_one_of_this_process(cluster: Any) -> None:
    """Which turns authentication on, by which the other's head could not call this process back any more."""
    with closing(RayWorkers(1)) as executor:
        assert executor.map(max, 0, [1]) == [1]
    with closing(RayWorkers(1, cluster.address)) as executor:
        assert executor.map(max, 0, [1]) == [1]


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
def test_workers_that_never_wait(cluster: Any, tmp_path: Path) -> None:
    """Also when one is killed in between: each iteration has its estimates, all young enough."""
    config = dataclasses.replace(SMALL, staleness=3, keep_runs=True, inner_steps=1500, checkpoint_every=2)

    class Killed(RayWorkers):
        def flow(self, function: Any, units: Any) -> Any:
            for count, found in enumerate(super().flow(function, units)):
                if function is asynchronous.work and count == 30:
                    number = re.search(r"process (\d+)$", self.workers[0])
                    assert number is not None
                    os.kill(int(number[1]), signal.SIGKILL)
                yield found

    with closing(Killed(2, cluster.address)) as executor:
        theta = trainer.run(config, tmp_path, executor=executor, console=Console(file=io.StringIO()))
        lines = read_metrics(tmp_path)[1:]
        assert executor.map(square_plus, 1, [2])[0][0] == 5  # what was not waited for is out of the way
    assert lines[-1]["inner_steps"] >= 1500
    assert all(line["staleness_max"] <= 3 and 1 <= line["workers"] <= 2 for line in lines)
    assert max(line["workers"] for line in lines) == 2
    state = checkpoint.load(tmp_path / "checkpoint.pt")[2]
    assert state.carries
    assert theta.provenance["iterations"] == state.iteration == len(lines)


def test_an_evaluation_gives_the_same_rows(cluster: Any, tmp_path: Path) -> None:
    command = ["evaluate", "--tasks", "spirals-32-32-3", "--horizons", "10", "--seeds", "0", "1"]
    command += ["--optimizers", "lopt", "adam"]
    there = ["--executor", "ray", "--address", cluster.address, "--workers", "2"]
    for name, options in (("serial", ["--workers", "1"]), ("ray", there)):
        assert main([*command, "--out", str(tmp_path / name), *options]) == 0
    rows = []
    for name in ("serial", "ray"):
        with (tmp_path / name / "runs.csv").open(newline="") as file:
            rows.append([{key: row[key] for key in row if key not in CLOCKS} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_no_process_outlives_a_command(end: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lopt", "evaluate", "--tasks", "spirals-32-32-3", "--horizons", "10000000"]
    command += ["--seeds", "0", "--workers", "1", "--executor", "ray", "--optimizers", "lopt", "--out", str(tmp_path)]
    code = "import signal, os, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code, *command],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while process.poll() is None and "ray::_Worker.work" not in session(process.pid).values():
                time.sleep(0.05)
            if end == "interrupt":
                os.killpg(process.pid, signal.SIGINT)
                assert process.communicate(timeout=120)[1].splitlines()[-1] == "lopt: interrupted"
                assert process.returncode == 130
            else:
                process.kill()
                process.wait()
            agents = (
                {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} if end == "kill" else set()
            )  # they end a minute later
            while set(session(process.pid).values()) - agents:
                time.sleep(0.05)
        finally:
            for number in session(process.pid):
                with suppress(OSError):
                    os.kill(number, signal.SIGKILL)


def session(number: int) -> dict[int, str]:
    """The running processes of a session, and what they call themselves."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == number and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
    return found
