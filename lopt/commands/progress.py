"""How far a command is: a bar on a terminal; elsewhere a line on standard error every ten seconds, come what may."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lopt.commands.common import say
from lopt.meta.progress import duration

EVERY = 10.0  # seconds between lines


class Status:
    """What is done of some work; :meth:`update` is called as it goes on."""

    def __init__(self, what: str, bars: Progress) -> None:
        self.what, self._bars, self._began = what, bars, time.monotonic()
        self._bar = bars.add_task(what, total=None, state="")
        self._done, self._total, self._state = 0, 0, ""

    def update(self, done: int, total: int, state: str = "") -> None:
        """So much is done, of so much; ``state`` is what else there is to say."""
        self._done, self._total, self._state = done, total, state
        self._bars.update(self._bar, completed=done, total=total, state=state)

    @property
    def line(self) -> str:
        """All of it, in one line."""
        done = f"{self._done} of {self._total}, " if self._total else ""
        state = f", {self._state}" if self._state else ""
        return f"{self.what}: {done}{duration(time.monotonic() - self._began)}{state}"


@contextmanager
def progress(console: Console, what: str) -> Iterator[Status]:
    """Show the progress of what is done inside.

    Example:
        >>> with progress(Console(), "steps") as status:
        ...     for step in range(1, 4):
        ...         status.update(step, 3)
        >>> status.line
        'steps: 3 of 3, 0:00:00'
    """
    columns = ("{task.description}", BarColumn(14), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[state]}")
    ended = threading.Event()
    errors = Console(stderr=True)

    def lines(status: Status) -> None:
        while not ended.wait(EVERY):
            say(errors, status.line)

    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        status = Status(what, bars)
        if not console.is_terminal:
            threading.Thread(target=lines, args=(status,), daemon=True).start()
        try:
            yield status
        finally:
            ended.set()
