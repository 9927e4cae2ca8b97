"""Where units run: workers of a Ray cluster, which may join, leave and die at any time (extra ``ray``).

What units share (theta among it) is put into the cluster's object store once, an item travels with its unit. A worker
is an actor on one thread; it lives on between iterations, and with it the tasks and data that it has made. A unit whose
worker is lost is computed again by another. A worker that would compute other bits, with other code or another
instruction set, is refused with its name.
"""

import logging
import os
import pickle
import platform
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from lopt import kernels
from lopt.meta.executors import MAX_LOSSES, ONE_THREAD, Executor, Feed, Unit, kept, usable_cores
from lopt.meta.units import Units, answer, fail
from lopt.provenance import cpu_info, package_sha256, versions

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

#: Bytes of shared memory of a cluster that is started here: thetas and results are small.
OBJECT_STORE = 128 << 20

#: By which Ray's authentication is chosen. Starting a cluster turns it on for all that the process connects to later;
#: a cluster without it then takes the process for dead, as it may not call it back, and with it all its workers.
MODE = "RAY_AUTH_MODE"

PATIENCE = 30.0  # seconds without any worker after which that is said

#: Of a cluster that is started here. Ray would make workers nice, and keep some for tasks that never come.
_SYSTEM = {"worker_niceness": 0, "enable_worker_prestart": False, "prestart_worker_first_driver": False}


class RayWorkers(Executor):
    """Runs units on workers of a Ray cluster; results are the same bits as in this process, whatever becomes of them.

    Args:
        workers: how many there may be at a time, each with one of the cluster's CPUs; as many as it has CPUs now where
            not given. Those for which there is no CPU yet begin their work when a node joins.
        address: of a running cluster, or ``"auto"``; None starts one on this machine, which ends with :meth:`close`.
            Where the program has called ``ray.init``, that cluster is used and left as it is.
        allow_different: take workers whose code or instruction set is not the one here, too; results are then not the
            same bits.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at that address.
        ValueError: not a positive number.
    """

    def __init__(
        self, workers: int | None = None, address: str | None = None, *, allow_different: bool = False
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected a positive number, got {workers}")
        self._ray = ray = _import_ray()
        self._ours = not ray.is_initialized()
        self._turned_on = False  # authentication, by starting a cluster
        if self._ours:
            self._connect(address, workers or usable_cores())
        if workers is None:
            workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._here = None if allow_different else fingerprint()
        self._actor = ray.remote(num_cpus=1, runtime_env={"env_vars": ONE_THREAD})(_Worker)
        self.refused: dict[str, str] = {}  # node -> the name of its worker and why
        self._failed_starts = 0
        self._why = ""  # of the last
        self._places = [self._new() for _ in range(workers)]

    def _connect(self, address: str | None, cores: int) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is not None:
            self._ray.init(address=address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {"num_cpus": cores, "num_gpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        self._turned_on = MODE not in os.environ
        self._ray.init(address="local", _node_ip_address="127.0.0.1", _system_config=_SYSTEM, **local, **quiet)

    def flow(self, function: Callable[[S, T], R], units: Iterator[tuple[S, T]]) -> Generator[tuple[int, R], None, None]:
        """See :class:`lopt.meta.executors.Executor`."""
        # cloudpickle takes along what a script or notebook defines
        feed = Feed(function, units, self._ray.cloudpickle.dumps, self._ray.put)
        try:
            while feed.left():
                for place in self._places:
                    place.take(feed)
                for place in self._ended():
                    unit, place.unit = place.unit, None
                    try:
                        found = self._ray.get(place.ref)
                    except self._ray.exceptions.RayError as error:
                        self._lost(place, error)
                        if unit is not None:
                            self._again(unit, place, error)
                        continue
                    place.ref, self._failed_starts = None, 0
                    if unit is None:
                        self._greet(place, *found)
                        continue
                    unit.feed.back(unit)
                    if unit.wanted:
                        result, trace = pickle.loads(found)
                        if trace is not None:
                            self.close()
                            fail(result, trace, f"{unit.name} failed in worker {place.name}")
                        yield unit.index, result
                    place.take(feed)
        finally:
            feed.open = False

    def _again(self, unit: Unit, place: "_Place", error: Exception) -> None:
        unit.feed.back(unit, lost=True)
        if unit.wanted and unit.losses > MAX_LOSSES:
            self.close()
            raise RuntimeError(
                f"{unit.name} was lost with {unit.losses} workers, the last one {place.name}; is there enough memory? "
                f"({self._why})"
            ) from error

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        while self._places:
            with suppress(Exception):  # of a cluster that is gone
                self._ray.kill(self._places.pop().actor)
        if self._ours:
            self._ours = False
            self._ray.shutdown()
            if self._turned_on:
                _turn_off_authentication()

    @property
    def workers(self) -> list[str]:
        """Names of those that are here and accepted."""
        return [place.name for place in self._places if place.name]

    def _new(self) -> "_Place":
        """A worker that is being started: on a node that was not refused, as soon as one has a CPU to spare."""
        others = {"ray.io/node-id": f"!in({','.join(self.refused)})"} if self.refused else {}
        actor = self._actor.options(label_selector=others).remote()
        return _Place(actor, actor.identity.remote(sys.path))

    def _ended(self) -> list["_Place"]:
        """The places that have something to say, when there are any."""
        by_ref = {place.ref: place for place in self._places if place.ref is not None}
        timeout = None
        if not any(place.name for place in self._places):
            self._check_nodes()
            timeout = PATIENCE
        ended, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=timeout)
        if not ended:
            warnings.warn(
                f"no worker yet: {len(self._places)} wait for a CPU of the cluster, which has "
                f"{self._ray.cluster_resources().get('CPU', 0):g}",
                stacklevel=2,
            )
            return []
        ended, _ = self._ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        return [by_ref[ref] for ref in ended]

    def _greet(self, place: "_Place", node: str, name: str, theirs: dict[str, str]) -> None:
        """A worker has started: take it, or refuse it and wait for one elsewhere."""
        here = theirs if self._here is None else self._here
        different = [f"{key} {theirs[key]} (here {here[key]})" for key in here if theirs[key] != here[key]]
        if not different:
            place.name = name
            return
        if node not in self.refused:
            self.refused[node] = f"{name}: {', '.join(different)}"
            warnings.warn(
                f"refused worker {self.refused[node]}; its results would not be the same bits. Give its node the same "
                "lopt and torch, or allow different workers",
                stacklevel=2,
            )
        self._replace(place)

    def _lost(self, place: "_Place", error: Exception) -> None:
        self._why = " ".join(str(error).split())[:300]
        if not place.name:
            self._failed_starts += 1
            if self._failed_starts > MAX_LOSSES * len(self._places):
                self.close()
                raise RuntimeError(
                    f"workers: {self._failed_starts} did not start; is lopt installed on every node, and RAY_AUTH_MODE "
                    f"here what the cluster was started with? ({self._why})"
                ) from error
        self._replace(place)

    def _replace(self, place: "_Place") -> None:
        with suppress(Exception):
            self._ray.kill(place.actor)
        self._places[self._places.index(place)] = self._new()

    def _check_nodes(self) -> None:
        """Raises RuntimeError where every node of the cluster was refused."""
        if not self.refused:
            return
        nodes = {node["NodeID"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        if nodes <= self.refused.keys():
            self.close()
            raise RuntimeError(
                f"workers: all were refused, as their results would not be the same bits: "
                f"{'; '.join(self.refused.values())}. Give them the same lopt and torch, or allow different workers"
            )


class _Place:
    """Where one worker is, or is to be."""

    def __init__(self, actor: Any, ref: Any) -> None:
        self.actor = actor
        self.ref = ref  # of what it will say next: who it is, then results; None while it has nothing to do
        self.name = ""  # as soon as it is accepted
        self.unit: Unit | None = None
        self.told: Any = None  # function and shared value of its units

    def take(self, feed: Feed) -> None:
        """The next unit, if it is here and has none."""
        if not self.name or self.unit is not None:
            return
        self.unit = feed.next()
        if self.unit is None:
            return
        if self.told is not self.unit.common:
            self.told = self.unit.common
            self.actor.share.remote(self.told)
        self.ref = self.actor.work.remote(self.unit.message)


class _Worker:
    """The actor: :meth:`share`, then units until the next of these."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._units = Units(b"")

    def identity(self, path: list[str]) -> tuple[str, str, dict[str, str]]:
        """Its node, its name, and what its results depend on. From now on it also finds modules where ``path`` says."""
        import ray

        sys.path += [folder for folder in path if folder not in sys.path]
        kept().worker = f"{ray.util.get_node_ip_address()} ({platform.node()}), process {os.getpid()}"
        return ray.get_runtime_context().get_node_id(), kept().worker, fingerprint()

    def share(self, common: bytes) -> None:
        """Function and shared value of the units to come."""
        self._units = Units(common)

    def work(self, message: bytes) -> bytes:
        """The answer of a unit, see :func:`lopt.meta.units.answer`."""
        return pickle.dumps(answer(Units.run, self._units, message))


def fingerprint() -> dict[str, str]:
    """What the bits of results depend on, beside the configuration."""
    return {
        **versions(),
        "code": package_sha256()[:12],
        "instruction set of lopt": kernels.simd_selected(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "processors of": (cpu_info("vendor_id") or [platform.machine()])[0],  # by which libraries choose their products
    }


def _turn_off_authentication() -> None:
    """Undo what starting a cluster did to this process (:data:`MODE`); it has no public function for that."""
    os.environ.pop(MODE, None)
    with suppress(Exception):
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        text = f"executor: {error.name} is missing; pip install 'lopt[ray]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    return ray
