"""Where units of work run: in this process, in local processes, or (:mod:`lopt.meta.ray_workers`) on a cluster.

A unit is a pure function of what it is given, so an executor may run it anywhere and, after losing a process, again;
the results are the same bits. Another executor needs the two methods that :class:`Executor` leaves open.
"""

import os
import pickle
import reprlib
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

#: What NumPy's matrix products read when they are loaded; more threads than cores cost time.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

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

    @abstractmethod
    def stream(self, function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """``(index, function(shared, items[index]))`` of every item, as they end; to be used up, or closed after it.

        Raises:
            Exception: what a unit raised; elsewhere its cause names the unit and has the traceback.
            RuntimeError: what runs the units keeps dying.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the executor holds, whatever it is at; a second call does nothing."""


class Serial(Executor):
    """Runs units one after the other in this process."""

    def stream(self, function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See :class:`Executor`."""
        for index, item in enumerate(items):
            yield index, function(shared, item)

    def close(self) -> None:
        """Nothing to give back."""


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

    def stream(self, function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See :class:`Executor`."""
        common = pack((function, shared))
        messages = [pack(item) for item in items]
        waiting = list(range(len(items)))[::-1]
        left, losses = len(items), 0
        for worker in self.workers:
            worker.assign(common, None)
        while left:
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
                    waiting += [] if worker.unit is None else [worker.unit]
                    worker = self.workers[place] = worker.replace()
                    worker.assign(common, None)
                if worker.unit is None and waiting:
                    worker.assign(messages[waiting[-1]], waiting.pop())
            busy = {worker.connection: worker for worker in self.workers if worker.unit is not None and not worker.lost}
            for connection in wait(list(busy)) if busy else ():
                worker = busy[connection]  # type: ignore[index]
                answer = worker.receive()
                if answer is not None:
                    index, result, trace = answer
                    if trace is not None:
                        where = f"worker process {worker.process.pid}"
                        self.close()
                        fail(result, trace, f"{unit_name(function, items, index)} failed in {where}")
                    left, losses = left - 1, 0
                    yield index, result

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
        self.unit: int | None = None
        self.lost = False
        self.answered = False

    def assign(self, message: bytes, unit: int | None) -> None:
        """Send a message; ``unit`` is what must be given to another if the process dies, None for what all share."""
        self.unit = unit
        try:
            self.connection.send_bytes(pickle.dumps(unit))
            self.connection.send_bytes(message)
        except OSError:
            self.lost = True

    def receive(self) -> Any:
        """The next answer, or None if the process has died."""
        try:
            answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.lost = True
            return None
        self.unit, self.answered = None, True
        return answer

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
    """What a process does: None and what units share, then numbers and units until the next of the former."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    units = Units(b"")
    with suppress(EOFError, OSError):
        while True:
            unit, message = pickle.loads(connection.recv_bytes()), connection.recv_bytes()
            if unit is None:
                units = Units(message)
                continue
            connection.send_bytes(pickle.dumps((unit, *answer(Units.run, units, message))))


class Units:
    """Units of one stream in a worker: ``(function, shared)`` as :func:`pack` sent it is read for the first of them."""

    def __init__(self, common: bytes) -> None:
        self._bytes = common
        self._common: tuple[Any, Any] | None = None

    def run(self, message: bytes) -> Any:
        """The result of one, ``message`` being its item."""
        if self._common is None:
            self._common, self._bytes = unpack(self._bytes), b""
        function, shared = self._common
        return function(shared, unpack(message))


def pack(value: Any, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """``value``, for another process.

    Raises:
        pickle.PicklingError: it cannot be pickled; with what to do.
    """
    try:
        return dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.PicklingError(
            f"units: cannot be sent to another process: {error}. Define tasks, losses and models by class and def at "
            "the top level of a module, and give data as tensors or by a function that loads them; or stay in this one"
        ) from error


def unpack(message: bytes) -> Any:
    """What :func:`pack` was given.

    Raises:
        ImportError: a class or function of it is not found here; with what to do.
    """
    try:
        return pickle.loads(message)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"units: a worker cannot import what it was sent: {error}. Put tasks, losses and models into a module that "
            "workers find: a file beside the script, or a package that is installed on every machine"
        ) from error


def answer(function: Any, shared: Any, item: Any) -> tuple[Any, str | None]:
    """What a unit gave and None; or its error, None in place of one that does not survive pickling, and traceback."""
    try:
        return function(shared, item), None
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, trace
        return error, trace


def fail(error: Exception | None, trace: str, what: str) -> NoReturn:
    """Raise the error of a unit, with ``what`` failed and the traceback as its cause."""
    told = RuntimeError(f"{what}:\n{trace}")
    if error is None:
        raise told
    raise error from told


def unit_name(function: Any, items: Sequence[Any], index: int) -> str:
    """What a unit is called in errors.

    Example:
        >>> unit_name(divmod, [(1, 2), (3, 4)], 1)
        'unit 2 of 2, divmod of (3, 4),'
    """
    name = getattr(function, "__qualname__", repr(function))
    return f"unit {index + 1} of {len(items)}, {name} of {reprlib.repr(items[index])},"


def _end_with(parent: int) -> None:
    """Ends this process, in the midst of its work, when its parent is no more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def usable_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
