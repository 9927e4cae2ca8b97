"""What a meta-training run says while it runs: a live display on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20  # plain lines in a whole run


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Reporter:
    """Shows iteration, meta-loss, inner steps per second, diverged runs and time left.

    A context manager; :meth:`update` is called after every iteration.

    Args:
        iteration, inner_steps: how far the run had come before.
        iterations: where it ends.
    """

    def __init__(self, console: Console, iteration: int, inner_steps: int, iterations: int) -> None:
        self.console, self.iterations = console, iterations
        self._begin = (time.monotonic(), iteration, inner_steps)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
        self._live = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._live.add_task("meta-training", total=iterations, completed=iteration, status="")

    def __enter__(self) -> "Reporter":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, metrics: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        time_begun, iteration_begun, steps_begun = self._begin
        iteration, elapsed = metrics["iteration"], max(time.monotonic() - time_begun, 1e-9)
        speed = (metrics["inner_steps"] - steps_begun) / elapsed
        status = f"meta-loss {metrics['meta_loss']:.4f}"
        if "validation" in metrics:
            status += f", validation {metrics['validation']:.4f}"
        status += f", {speed:,.0f} inner steps/s, {metrics['divergences']} diverged"
        self._live.update(self._bar, completed=iteration, status=status)
        every = -(-self.iterations // LINES)
        if not self.console.is_terminal and (iteration % every == 0 or iteration == self.iterations):
            left = elapsed / (iteration - iteration_begun) * (self.iterations - iteration)
            say(self.console, f"iteration {iteration}/{self.iterations}: {status}, {left:.0f} s left")
