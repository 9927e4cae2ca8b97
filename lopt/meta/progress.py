"""What a meta-training run says while it runs: a live display on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

EVERY = 30.0  # seconds between plain lines; validations always have one


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Reporter:
    """Shows iteration, inner steps per second, meta-loss, validation, diverged runs and time left.

    A context manager; :meth:`update` is called after every iteration.

    Args:
        inner_steps: how far the run had come before.
        budget: inner steps at which it ends.
    """

    def __init__(self, console: Console, inner_steps: int, budget: int) -> None:
        self.console, self.budget = console, budget
        self._begin = (time.monotonic(), inner_steps)
        self._said = -EVERY
        self._smooth: float | None = None
        self._validation = ""
        columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.fields[status]}"))
        self._live = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._live.add_task("meta-training", total=budget, completed=inner_steps, status="")

    def __enter__(self) -> "Reporter":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, metrics: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        begun, steps_begun = self._begin
        now, steps, loss = time.monotonic(), metrics["inner_steps"], metrics["meta_loss"]
        elapsed = max(now - begun, 1e-9)
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        if "validation" in metrics:
            self._validation = f", validation {metrics['validation']:.4f}"
        speed = (steps - steps_begun) / elapsed
        left = max(0.0, self.budget - steps) / max(speed, 1e-9)
        status = (
            f"iteration {metrics['iteration']}, phase {metrics['phase'] + 1}: meta-loss {self._smooth:.4f}"
            f"{self._validation}, {speed:,.0f} inner steps/s, {metrics['divergences']} diverged, "
            f"{duration(left)} left"
        )
        self._live.update(self._bar, completed=min(steps, self.budget), status=status)
        due = now - self._said >= EVERY or "validation" in metrics or steps >= self.budget
        if due and not self.console.is_terminal:
            self._said = now
            say(self.console, f"{min(1.0, steps / self.budget):4.0%} {status}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(3725.0)
        '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
