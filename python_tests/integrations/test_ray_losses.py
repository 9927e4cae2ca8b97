"""Meta-training on a Ray cluster that loses workers, a network and its head: the bits of one process, in the end.

The first is over in half a minute here; with SECONDS, EVERY = 180, 20 it lasts as long as one would watch it.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from meta_cases import SMALL
from ray_units import slowly
from rich.console import Console

import lopt
from lopt.meta import checkpoint, trainer
from lopt.meta.config import MetaTrainConfig
from lopt.meta.executors import Executor, Serial
from lopt.meta.metrics import read_metrics
from lopt.meta.ray_workers import OBJECT_STORE, RayWorkers

ray = pytest.importorskip("ray", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip.*:FutureWarning")]

SECONDS, EVERY = 24.0, 8.0  # of a run at least, and between two kills
PAUSE = 0.5  # seconds that a unit takes longer

CONFIG = dataclasses.replace(SMALL, inner_steps=1000, pairs=4, validate_every=10_000, checkpoint_every=3)


class Slow(RayWorkers):
    """Workers that take ``PAUSE`` longer, so that there is time for what happens to them."""

    def stream(self, function: Any, shared: Any, items: Any) -> Any:
        return super().stream(slowly, (PAUSE, function, shared), items)


def train(config: MetaTrainConfig, out: Path, executor: Executor, resume: bool = False) -> bytes:
    theta = trainer.run(config, out, executor=executor, resume=resume, console=Console(file=io.StringIO()))
    return theta.flatten().numpy().tobytes()


def node(*options: str, within: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[bytes]:
    """``ray start`` in a process group of its own, in whose foreground it stays; as if the user had no token of Ray."""
    ray_script = shutil.which("ray", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert ray_script is not None
    command = [*within, ray_script, "start", "--block", "--num-gpus", "0", *options]
    command += ["--object-store-memory", str(OBJECT_STORE), "--disable-usage-stats"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    everywhere = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_enable_worker_prestart": "0",
        **environment,
    }
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, **everywhere}, **quiet)  # type: ignore[call-overload,no-any-return]


@contextmanager
def head(
    address: str, cpus: int, within: tuple[str, ...] = (), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The head of a cluster at ``address``, which takes requests."""
    host, _, port = address.partition(":")
    options = ["--head", "--node-ip-address", host, "--port", port, "--include-dashboard", "false"]
    process = node(*options, "--num-cpus", str(cpus), within=within, **environment)
    try:
        check = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0)"
        while subprocess.run([*within, sys.executable, "-c", check, host, port], capture_output=True).returncode:
            assert process.poll() is None
            time.sleep(0.2)
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a node with all its processes."""
    for number in [process.pid, *session(process.pid)]:
        with suppress(OSError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def session(number: int) -> list[int]:
    """The running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == number and state != "Z":
                found.append(int(stat.parent.name))
    return found


needs_linux = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")


@needs_linux
def test_workers_are_killed_again_and_again_and_one_joins_halfway(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, inner_steps=int(40 * SECONDS / PAUSE))  # 10 to 30 of a pair's run in PAUSE
    expected = train(config, tmp_path / "serial", Serial())
    address, killed, joined, over = "127.0.0.1:6391", [0], [False], threading.Event()

    def assassin(executor: RayWorkers, stack: ExitStack) -> None:
        begun = time.monotonic()
        while not over.wait(EVERY):
            if not joined[0] and time.monotonic() - begun > SECONDS / 2:
                stack.callback(end, node("--address", address, "--num-cpus", "1"))
                joined[0] = True
            names = executor.workers
            number = re.search(r"process (\d+)$", names[killed[0] % len(names)]) if names else None
            if number is not None:
                os.kill(int(number[1]), signal.SIGKILL)
                killed[0] += 1

    with head(address, 2), ExitStack() as stack, closing(Slow(3, address)) as executor:
        thread = threading.Thread(target=assassin, args=(executor, stack))
        thread.start()
        try:
            found = train(config, tmp_path / "ray", executor)
        finally:
            over.set()
            thread.join()
    assert found == expected
    assert killed[0] >= SECONDS / EVERY - 1
    assert joined[0]


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from contextlib import closing
import json
import test_ray_losses as t
t.PAUSE = float(sys.argv[5])
config = t.MetaTrainConfig.from_json(json.loads(Path(sys.argv[2]).read_text()))
with closing(t.Slow(2, sys.argv[4])) as executor:
    t.train(config, Path(sys.argv[3]), executor, resume=sys.argv[6] == "resume")
"""


def command(config: MetaTrainConfig, out: Path, address: str, pause: float, how: str) -> list[str]:
    """What meta-trains in a process of its own."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config.to_json()))
    here = str(Path(__file__).parent)
    return [sys.executable, "-c", RUN, here, str(file), str(out), address, str(pause), how]


def environment() -> dict[str, str]:
    paths = [str(Path(lopt.__file__).parents[1]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}


def reached(out: Path) -> int:
    """The last iteration in metrics.jsonl."""
    return read_metrics(out)[-1]["iteration"] if (out / "metrics.jsonl").is_file() and read_metrics(out) else -1


@needs_linux
def test_when_the_head_is_killed_the_run_ends_and_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    expected = train(CONFIG, tmp_path / "serial", Serial())
    address, out = "127.0.0.1:6393", tmp_path / "ray"
    with head(address, 2) as first:
        run = subprocess.Popen(
            command(CONFIG, out, address, 0.2, "begin"), env=environment(), stderr=subprocess.DEVNULL
        )
        while reached(out) < 7:
            assert run.poll() is None
            time.sleep(0.1)
        end(first)
        at = reached(out)
        run.wait(timeout=300)
    assert run.returncode != 0
    saved = checkpoint.load(out / "checkpoint.pt")[2].iteration
    assert at - CONFIG.checkpoint_every <= saved
    with head(address, 2), closing(RayWorkers(2, address)) as executor:
        assert train(CONFIG, out, executor, resume=True) == expected


NETWORKS = ("lopt-one", "lopt-two")


def ip(*arguments: str, within: str | None = None) -> None:
    subprocess.run(["ip", *(() if within is None else ("-n", within)), *arguments], check=True, capture_output=True)


@contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    with ExitStack() as stack:
        try:
            for name in NETWORKS:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "eth0", "netns", NETWORKS[0], "type", "veth", "peer", "eth0", "netns", NETWORKS[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs leave to make network namespaces: {error.stderr.decode().strip()}")
        for number, name in enumerate(NETWORKS, 1):
            ip("addr", "add", f"10.77.0.{number}/24", "dev", "eth0", within=name)
            ip("link", "set", "lo", "up", within=name)
            ip("link", "set", "eth0", "up", within=name)
            ip("route", "add", "default", "via", f"10.77.0.{3 - number}", within=name)  # by which Ray finds its address
        yield


QUICK = {  # to take a node for dead after three seconds
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@needs_linux
def test_a_node_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    """For so long that it is taken for dead; it is started again when it notices, as a service would be."""
    config = dataclasses.replace(CONFIG, inner_steps=3000)
    expected = train(config, tmp_path / "serial", Serial())
    address, out = "10.77.0.1:6379", tmp_path / "ray"
    inside = [("ip", "netns", "exec", name) for name in NETWORKS]
    join = ("--address", address, "--node-ip-address", "10.77.0.2", "--num-cpus", "1")
    with two_networks(), head(address, 1, within=inside[0], **QUICK), ExitStack() as stack:
        other = node(*join, within=inside[1], **QUICK)
        stack.callback(lambda: end(other))
        told = (tmp_path / "told").open("wb")
        run = subprocess.Popen(
            [*inside[0], *command(config, out, address, PAUSE, "begin")], env=environment(), stderr=told
        )
        stack.callback(run.kill)

        def wait_for(workers: int) -> None:
            """An iteration whose units were computed by so many workers, by its time."""
            since = reached(out)
            while True:
                assert run.poll() is None, (tmp_path / "told").read_text()
                own = [line["seconds"] for line in (read_metrics(out) if reached(out) > since + 1 else [])[since + 2 :]]
                if any((seconds < 3.5 * PAUSE) == (workers == 2) for seconds in own):
                    return
                time.sleep(0.2)

        wait_for(2)
        ip("link", "set", "eth0", "down", within=NETWORKS[1])
        wait_for(1)
        time.sleep(2.0)
        ip("link", "set", "eth0", "up", within=NETWORKS[1])
        ip("route", "add", "default", "via", "10.77.0.1", within=NETWORKS[1])
        other.wait()
        other = node(*join, within=inside[1], **QUICK)
        wait_for(2)
        assert run.wait() == 0
    assert lopt.Theta.load(out / "theta.safetensors").flatten().numpy().tobytes() == expected
