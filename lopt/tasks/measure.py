"""What can be measured of a task: whether its loss and gradients are finite, whether Adam gets anywhere, time per step.

Runs of several learning rates go side by side, vmapped, on the same minibatches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lopt.tasks.adam import AdamConfig, batched_losses, train_adam
from lopt.tasks.task import Task

#: The two learning rates of :func:`check`, and the length of its runs: the longer where the shorter shows no progress.
LEARNING_RATES = (1e-3, 1e-2)
STEPS = (30, 300)

#: Progress is a fall of the loss by this part of its distance to the floor (of its size, where no floor is known).
PROGRESS = 0.01


@dataclass(frozen=True)
class Check:
    """Loss on fixed training minibatches at the start and after ``steps`` of Adam, for each of ``LEARNING_RATES``."""

    name: str
    num_params: int
    finite_loss: bool
    finite_gradient: bool
    start: float
    steps: int
    ends: tuple[float, ...]
    progress: bool
    seconds_per_step: float

    @property
    def diverged(self) -> bool:
        """Whether every run ended at a loss that is not finite or more than ten times that of the start."""
        limit = self.start + 9 * abs(self.start)
        return not any(math.isfinite(end) and end <= limit for end in self.ends)


def adam_losses(
    task: Task,
    learning_rates: Sequence[float],
    steps: int,
    seed: int = 0,
    points: int = 1,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[int], Tensor]:
    """Steps ``[points + 1]`` and the losses there ``[learning rates, points + 1]`` of runs with Adam.

    Losses are means over four fixed training minibatches.

    Args:
        on_step: called with the numbers of steps done and to do, before every step.

    Example:
        >>> from lopt.tasks import sample_task
        >>> steps, losses = adam_losses(sample_task(0, ["mlp"]), [1e-3, 1e-2], steps=20, points=2)
        >>> steps, losses.shape
        ([0, 10, 20], torch.Size([2, 3]))
    """
    evaluation = list(islice(task.batches(seed, "train"), 4))
    shapes = {name: torch.Size(shape) for name, shape in task.shapes.items()}
    at = sorted({round(steps * point / points) for point in range(points + 1)})
    recorded = []

    def record(step: int, params: Tensor) -> None:
        if on_step is not None:
            on_step(step, steps)
        if step in at:
            with torch.no_grad():
                losses = [batched_losses(task, params, shapes, batch) for batch in evaluation]
            recorded.append(torch.stack(losses).mean(dim=0))

    configs = [AdamConfig(rate) for rate in learning_rates]
    train_adam(task, seed, steps, configs, start=len(evaluation), on_step=record)
    return at, torch.stack(recorded, dim=1)


def check(task: Task, seed: int = 0) -> Check:
    """Losses and gradients at the start, and two short runs with Adam."""
    params, batch = task.init(seed), next(task.batches(seed, "train"))
    gradients: Any = torch.func.grad_and_value(task.loss)
    grads, loss = gradients(params, batch)
    for steps in STEPS:
        began = time.perf_counter()
        _, losses = adam_losses(task, LEARNING_RATES, steps, seed)
        seconds = (time.perf_counter() - began) / steps
        start, ends = float(losses[0, 0]), tuple(losses[:, -1].tolist())
        needed = PROGRESS * (abs(start) if task.loss_floor is None else start - task.loss_floor)
        progress = any(math.isfinite(end) and start - end > needed for end in ends)
        if progress:
            break
    return Check(
        name=task.name,
        num_params=task.num_params,
        finite_loss=bool(torch.isfinite(loss)),
        finite_gradient=all(bool(torch.isfinite(grad).all()) for grad in grads.values()),
        start=start,
        steps=steps,
        ends=ends,
        progress=progress,
        seconds_per_step=seconds,
    )


def seconds_per_step(task: Task, seed: int = 0, steps: int = 10) -> float:
    """Smallest time of one minibatch, loss and gradient, of ``steps`` after one that does not count."""
    params, batches = task.init(seed), task.batches(seed, "train")
    gradients: Any = torch.func.grad_and_value(task.loss)
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        _, loss = gradients(params, next(batches))
        float(loss)
        times.append(time.perf_counter() - began)
    return min(times[1:])
