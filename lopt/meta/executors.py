"""Where units of work run: in this process, in local processes, or (:mod:`lopt.meta.ray_workers`) on a cluster.

A unit is a pure function of what it is given, so an executor may run it anywhere and, after losing a process, again;
the results are the same bits. Only units that say so use what earlier ones left with the same worker (:func:`kept`).
Another executor needs the two methods that :class:`Executor` leaves open.
"""

import os
import pickle
import platform
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from lopt.meta.units import Units, answer, fail, pack, unit_name

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

#: What NumPy's matrix products read when they are loaded; more threads than cores cost time.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

SHARED, UNIT = b"shared", b"unit"  # kinds of messages to a process

MAX_LOSSES = 5  # processes that may die without finishing a unit in between

GUARD = (
    "before it had finished a unit; its error is printed above. Where that is about the bootstrapping phase: processes "
    'import the script anew, so what it does belongs under `if __name__ == "__main__":`'
)


class Executor(ABC):
    """Runs units of work; function, shared and items can be pickled, and function is found by its name anywhere."""

    def map(self, function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> list[R]:
        """``[function(shared, item) for item in items]``; errors are those of :meth:`stream`."""
        results = dict(self.stream(function, shared, items))
        return [results[index] for index in range(len(items))]

    def stream(
        self, function: Callable[[S, T], R], shared: S, items: Sequence[T]
    ) -> Generator[tuple[int, R], None, None]:
        """``(index, function(shared, items[index]))`` of every item, as they end; errors are those of :meth:`flow`."""
        return self.flow(function, ((shared, item) for item in items))

    @abstractmethod
    def flow(self, function: Callable[[S, T], R], units: Iterator[tuple[S, T]]) -> Generator[tuple[int, R], None, None]:
        """``(index, function(shared, item))`` of every unit ``(shared, item)``, as they end.

        The next unit is asked for when a worker has nothing to do, so it may depend on what was yielded before. When
        this is closed early, what workers are at is not waited for: it ends without effect.

        Raises:
            Exception: what a unit raised; elsewhere its cause names the unit and has the traceback.
            RuntimeError: what runs the units keeps dying.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the executor holds, whatever it is at; a second call does nothing."""


@dataclass
class Kept:
    """What units leave for later ones of the same worker."""

    worker: str  # its name
    value: Any = None


_kept = Kept(f"{platform.node()} {os.getpid()}")


def kept() -> Kept:
    """That of the worker by which the caller is run: this process, where an executor does not say otherwise."""
    return _kept


@contextmanager
def keeping(other: Kept) -> Iterator[None]:
    """Inside, units are run by another worker in the same process."""
    global _kept
    before, _kept = _kept, other
    try:
        yield
    finally:
        _kept = before


class Serial(Executor):
    """Runs units one after the other in this process."""

    def flow(self, function: Callable[[S, T], R], units: Iterator[tuple[S, T]]) -> Generator[tuple[int, R], None, None]:
        """See :class:`Executor`."""
        for index, (shared, item) in enumerate(units):
            yield index, function(shared, item)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(slots=True)
class Unit:
    """A unit on its way to workers."""

    feed: "Feed"
    index: int
    item: Any
    common: Any  # function and shared value, for workers
    message: bytes  # the item, for workers
    losses: int = 0  # workers that were lost with it

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for its result."""
        return self.feed.open

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return unit_name(self.feed.function, self.item, self.index)


class Feed:
    """The units of a flow, for an executor whose workers are elsewhere; those that were lost come first.

    Args:
        dumps: pickles.
        publish: makes of a pickled function and shared value what workers are told.
    """

    def __init__(
        self,
        function: Callable[[S, T], R],
        units: Iterator[tuple[S, T]],
        dumps: Callable[[Any], bytes],
        publish: Callable[[bytes], Any] = bytes,
    ) -> None:
        self.function, self.open, self.out = function, True, 0
        self._units, self._dumps, self._publish = units, dumps, publish
        self._count = 0
        self._shared: Any = self  # which no unit has
        self._common: Any = None
        self._waiting: list[Unit] = []

    def left(self) -> bool:
        """Whether there are units with workers, or to come; only where there are none with workers it looks."""
        if not self.out and not self._waiting:
            self._waiting += [] if (unit := self._new()) is None else [unit]
        return bool(self.out or self._waiting)

    def next(self) -> Unit | None:
        """For a worker; None where there are no more for now."""
        unit = self._waiting.pop() if self._waiting else self._new()
        self.out += unit is not None
        return unit

    def back(self, unit: Unit, lost: bool = False) -> None:
        """A worker has no more to do with it."""
        self.out -= 1
        if lost:
            unit.losses += 1
            self._waiting.append(unit)

    def _new(self) -> Unit | None:
        for shared, item in self._units:
            if shared is not self._shared:
                self._shared, self._common = shared, self._publish(pack((self.function, shared), self._dumps))
            self._count += 1
            return Unit(self, self._count - 1, item, self._common, pack(item, self._dumps))
        return None


class LocalProcesses(Executor):
    """Runs units in processes of this machine, each on one thread; a process that dies is replaced.

    Its unit is computed again by another, so a killed process loses nothing but its unit's work.

    Args:
        workers: number of processes.

    Raises:
        ValueError: not a positive number.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected a positive number, got {workers}")
        self.workers = [_Worker() for _ in range(workers)]

    def flow(self, function: Callable[[S, T], R], units: Iterator[tuple[S, T]]) -> Generator[tuple[int, R], None, None]:
        """See :class:`Executor`."""
        feed = Feed(function, units, pickle.dumps)
        losses = 0
        try:
            while feed.left():
                for place, worker in enumerate(self.workers):
                    if worker.lost:
                        code = worker.failed()
                        if code is not None:
                            self.close()
                            raise RuntimeError(f"workers: one ended with exit code {code}, {GUARD}")
                        losses += 1
                        if losses > MAX_LOSSES:
                            raise RuntimeError(
                                f"workers: {losses} processes died and no unit was finished in between; "
                                "is there enough memory for so many?"
                            )
                        if worker.unit is not None:
                            worker.unit.feed.back(worker.unit, lost=True)
                        worker = self.workers[place] = worker.replace()
                    worker.take(feed)
                if any(worker.lost for worker in self.workers):
                    continue
                busy = {worker.connection: worker for worker in self.workers if worker.unit is not None}
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]
                    unit, found = worker.unit, worker.receive()
                    if found is None or unit is None:
                        continue
                    unit.feed.back(unit)
                    losses = 0
                    if unit.wanted:
                        result, trace = found
                        if trace is not None:
                            where = f"worker process {worker.process.pid}"
                            self.close()
                            fail(result, trace, f"{unit.name} failed in {where}")
                        yield unit.index, result
                    worker.take(feed)
        finally:
            feed.open = False

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.connection.close()
        while self.workers:
            self.workers.pop().end()


class _Worker:
    """A process and the unit it works on."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        with _environment(ONE_THREAD), _without_interrupts():
            self.process.start()
        theirs.close()  # so that the death of the process is the end of the file
        self.unit: Unit | None = None
        self.told: Any = None  # function and shared value of its units
        self.lost = False
        self.answered = False

    def take(self, feed: Feed) -> None:
        """The next unit, if it has none."""
        if self.unit is not None or self.lost:
            return
        self.unit = feed.next()
        if self.unit is None:
            return
        try:
            if self.told is not self.unit.common:
                self._send(SHARED, self.unit.common)
                self.told = self.unit.common
            self._send(UNIT, self.unit.message)
        except OSError:
            self.lost = True

    def receive(self) -> Any:
        """The answer to its unit, or None if the process has died."""
        try:
            found = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.lost = True
            return None
        self.unit, self.answered = None, True
        return found

    def _send(self, kind: bytes, message: bytes) -> None:
        self.connection.send_bytes(kind)
        self.connection.send_bytes(message)

    def failed(self) -> int | None:
        """Exit code of a process that is lost by an error of its own, before it had answered, as another would be; None
        if it was killed, or has answered."""
        self.process.join(timeout=1.0)
        code = self.process.exitcode or 0
        return code if code > 0 and not self.answered else None

    def end(self) -> None:
        """Close the connection, on which a process without work ends; kill it if it does not."""
        self.connection.close()
        self.process.join(timeout=1.0 if self.unit is None else 0.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()

    def replace(self) -> "_Worker":
        """A new process in place of this one."""
        self.end()
        return _Worker()


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is for this process, which then ends those that it starts in here; one that comes meanwhile comes after.

    They inherit the mask: a handler of their own would come too late, after seconds of imports. multiprocessing's own
    process is started before, as that would unblock the signal. The mask is this thread's; what another thread is given
    is only noted here, or it would come between a process and what it is told to do.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if noted:
            signal.raise_signal(signal.SIGINT)


def _serve(connection: Connection, parent: int) -> None:
    """What a process does: what units share, then units until the next of the former."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    units = Units(b"")
    with suppress(EOFError, OSError):
        while True:
            kind, message = connection.recv_bytes(), connection.recv_bytes()
            if kind == SHARED:
                units = Units(message)
                continue
            connection.send_bytes(pickle.dumps(answer(Units.run, units, message)))


def _end_with(parent: int) -> None:
    """Ends this process, in the midst of its work, when its parent is no more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def usable_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
