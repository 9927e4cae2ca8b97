"""What ``lopt tasks`` says of tasks, and which of torch's optimizers it can train them with."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from lopt.benchmark.rows import Row
from lopt.tasks import Task, measure
from lopt.tasks.data import catalogue
from lopt.tasks.measure import Check
from lopt.tasks.text_tasks import TextData


@cache
def torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The classes of torch.optim, by name, that take a step on a matrix and a vector with nothing but gradients.

    Not among them: those that need a closure, sparse gradients, or matrices alone.
    """
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for name in dir(torch.optim):
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            params = [torch.ones(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)]
            for param in params:
                param.grad = torch.ones_like(param)
            with suppress(ValueError, TypeError, RuntimeError, NotImplementedError):
                kind(params).step()  # type: ignore[call-arg]
                found[name] = kind
    return found


def check_row(family: str, checks: Mapping[int, Check]) -> Row:
    """Of the tasks of a family, by seed: how many are finite at the start and make progress, and which do not."""
    return {
        "family": family,
        "tasks": len(checks),
        "finite": sum(check.finite_loss and check.finite_gradient for check in checks.values()),
        "progress": sum(check.progress for check in checks.values()),
        "diverged_seeds": " ".join(str(seed) for seed, check in checks.items() if check.diverged),
        "stuck_seeds": " ".join(str(seed) for seed, check in checks.items() if not check.progress),
    }


def task_facts(task: Task) -> dict[str, Any]:
    """What can be said of a task: sizes, initial loss, floor, time per step, the hash of its text."""
    data = getattr(task, "data", None)
    sha = {"text_sha256": catalogue.corpus(data.name, data.variant).sha256} if isinstance(data, TextData) else {}
    return {
        "name": task.name,
        "num_params": task.num_params,
        "tensors": len(task.init(0)),
        "initial_loss": task.initial_loss(0),
        "loss_floor": task.loss_floor,
        "ms_per_step": 1e3 * measure.seconds_per_step(task),
        **sha,
        "config": task.config,
    }
