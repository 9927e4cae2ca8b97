"""Runs of one task: a grid of Adams as one batch, and the learned optimizer, with the same minibatches.

Every run of one (task, seed) starts from the same parameters and sees the same minibatches. What is recorded is the
loss on whole splits after the last step.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lopt.evaluation.suites import HeldOutTask
from lopt.optimizer import LearnedOptimizer
from lopt.tasks.task import Batch, SplitName, Task
from lopt.theta import Theta

Schedule = Literal["constant", "cosine"]

#: Learning rates of the references, half decades; each with both schedules.
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")

#: Splits whose loss is recorded, in this order.
RECORDED: tuple[SplitName, ...] = ("train", "outer_valid", "test")

#: The learned optimizer is told the loss of an inner_valid minibatch before every such step.
VALID_EVERY = 10

#: A loss that is not finite, or above this many times the initial one, counts as this many times the initial one.
LOSS_LIMIT = 10.0

_ROWS = 5000  # evaluated at once


class Result(NamedTuple):
    """What became of one run; ``losses`` and ``initial`` are those of the splits ``RECORDED``."""

    lr: float
    schedule: str
    losses: tuple[float, ...]
    initial: tuple[float, ...]
    diverged: bool
    seconds: float


@dataclass(frozen=True)
class AdamConfig:
    """One Adam of a grid."""

    lr: float
    schedule: Schedule = "constant"


GRID = tuple(AdamConfig(lr, schedule) for schedule in SCHEDULES for lr in LRS)


def train_adam(
    task: Task, seed: int, steps: int, configs: Sequence[AdamConfig] = GRID
) -> tuple[Tensor, dict[str, torch.Size]]:
    """Train with every configuration at once, and return the flat parameters ``[configs, P]`` and their shapes.

    One step of all of them is one batched gradient and one update of ``[configs, P]`` tensors, by the formula of
    ``torch.optim.Adam`` (betas .9 and .999, eps 1e-8):

    ``param -= lr_t / (1 - .9^t) * mom / (sqrt(rms / (1 - .999^t)) + eps)`` at t = 1, 2, ...

    where the cosine schedule has ``lr_t = lr (1 + cos(pi (t - 1) / steps)) / 2``.

    Source: D. Kingma, J. Ba, arXiv:1412.6980.
    """
    init = task.init(seed)
    shapes = {name: value.shape for name, value in init.items()}
    params = flatten(init).repeat(len(configs), 1).requires_grad_()
    mom, rms = torch.zeros_like(params), torch.zeros_like(params)
    constant = [config.schedule == "constant" for config in configs]
    batches = task.batches(seed, "train")
    for t in range(1, steps + 1):
        losses = batched_losses(task, params, shapes, next(batches))
        (grads,) = torch.autograd.grad(losses.sum(), params)
        half_cosine = (1 + math.cos(math.pi * (t - 1) / steps)) / 2
        lrs = [c.lr * (1.0 if flat else half_cosine) for c, flat in zip(configs, constant, strict=True)]
        step_size = torch.tensor([lr / (1 - 0.9**t) for lr in lrs]).unsqueeze(1)
        with torch.no_grad():
            mom.lerp_(grads, 1 - 0.9)
            rms.mul_(0.999).addcmul_(grads, grads, value=1 - 0.999)
            denominator = rms.sqrt().div_(math.sqrt(1 - 0.999**t)).add_(1e-8)
            params.addcmul_(step_size, mom / denominator, value=-1.0)
    return params.detach(), shapes


def train_learned(task: Task, seed: int, steps: int, theta: Theta, impl: str, hint: bool) -> dict[str, Tensor]:
    """Train with the learned optimizer and return the parameters; ``hint`` says whether it knows ``steps``.

    It is told the training loss at every step and an inner_valid loss every ``VALID_EVERY`` steps.
    """
    params = {name: value.requires_grad_() for name, value in task.init(seed).items()}
    optimizer = LearnedOptimizer(list(params.values()), theta, total_steps=steps if hint else None, impl=impl)
    train, inner_valid = task.batches(seed, "train"), task.batches(seed, "inner_valid")
    for step in range(steps):
        if step % VALID_EVERY == 0:
            with torch.no_grad():
                optimizer.observe(valid_loss=task.loss(params, next(inner_valid)))
        loss = task.loss(params, next(train))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(loss=loss.detach())
    return {name: value.detach() for name, value in params.items()}


def adam_results(task: HeldOutTask, seed: int, steps: int) -> list[Result]:
    """One result per configuration of ``GRID``; each gets its share of the seconds of the batch."""
    begin = time.perf_counter()
    params, shapes = train_adam(task, seed, steps)
    seconds = (time.perf_counter() - begin) / len(GRID)
    initial = _recorded(task, flatten(task.init(seed)).unsqueeze(0), shapes)[0]
    final = _recorded(task, params, shapes)
    return [
        _result(config.lr, config.schedule, losses, initial, seconds)
        for config, losses in zip(GRID, final, strict=True)
    ]


def learned_results(task: HeldOutTask, seed: int, steps: int, theta: Theta, impl: str, hint: bool) -> list[Result]:
    """The result of the one run of the learned optimizer."""
    init = task.init(seed)
    shapes = {name: value.shape for name, value in init.items()}
    begin = time.perf_counter()
    params = train_learned(task, seed, steps, theta, impl, hint)
    seconds = time.perf_counter() - begin
    initial, final = _recorded(task, torch.stack([flatten(init), flatten(params)]), shapes)
    return [_result(1.0, "learned", final, initial, seconds)]


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """All parameters in one row ``[P]``."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def batched_losses(task: Task, params: Tensor, shapes: Mapping[str, torch.Size], batch: Batch) -> Tensor:
    """Losses ``[configs]`` of flat parameters ``[configs, P]`` on one batch."""

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return task.loss(values, batch)

    losses: Tensor = torch.func.vmap(loss)(params)
    return losses


@torch.no_grad()
def _recorded(task: HeldOutTask, params: Tensor, shapes: Mapping[str, torch.Size]) -> list[tuple[float, ...]]:
    """For every row of ``params`` the mean losses over all rows of the splits ``RECORDED``."""
    losses = []
    for name in RECORDED:
        rows = task.splits[name]
        total = torch.zeros(len(params), dtype=torch.float64)
        for begin in range(0, len(rows.inputs), _ROWS):
            part = Batch(rows.inputs[begin : begin + _ROWS], rows.targets[begin : begin + _ROWS])
            total += batched_losses(task, params, shapes, part).double() * len(part.inputs)
        losses.append((total / len(rows.inputs)).tolist())
    return list(zip(*losses, strict=True))


def _result(lr: float, schedule: str, losses: Sequence[float], initial: Sequence[float], seconds: float) -> Result:
    limited, diverged = limit(losses, initial)
    return Result(lr, schedule, limited, tuple(initial), diverged, seconds)


def limit(losses: Sequence[float], initial: Sequence[float]) -> tuple[tuple[float, ...], bool]:
    """Losses as they count, and whether the run diverged: some loss not finite, or the training loss (the first)
    above ``LOSS_LIMIT`` times the initial one.

    Example:
        >>> limit((float("nan"), 1.0, 30.0), (2.0, 2.0, 2.0))
        ((20.0, 1.0, 20.0), True)
    """
    worst = [LOSS_LIMIT * value for value in initial]
    counted = tuple(min(loss, most) if math.isfinite(loss) else most for loss, most in zip(losses, worst, strict=True))
    return counted, not all(map(math.isfinite, losses)) or losses[0] > worst[0]
