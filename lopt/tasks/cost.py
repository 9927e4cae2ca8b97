"""Predicted time per step of a task, without a clock: operations, numbers and multiply-adds are counted.

The forward pass of one minibatch is made without values, on the meta device. With nonnegative coefficients that are
measured once for a machine::

    seconds = per_op ops + per_element elements + per_multiply_add multiply_adds

Predictions are a function of the task and three numbers, so that what is chosen by them is the same on every machine
(with one version of torch: another may count an operation more).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lopt.files import write_text
from lopt.tasks import measure
from lopt.tasks.task import Task, map_tensors

BATCH_OPS = 10


class Work(NamedTuple):
    """What one minibatch and its loss take; the backward pass is in proportion."""

    ops: float  # operations of torch, and BATCH_OPS for the minibatch
    elements: float  # numbers written, those of the minibatch included
    multiply_adds: float  # of products of matrices and of convolutions


class _Enough(Exception):
    """No need to count on."""


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the work of what runs under it, until ``enough`` says that it is."""

    def __init__(self, elements: int, multiply_adds: float, enough: Callable[[Work], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops, self.elements, self.multiply_adds, self.enough = BATCH_OPS, elements, multiply_adds, enough

    @property
    def work(self) -> Work:
        return Work(float(self.ops), float(self.elements), self.multiply_adds)

    def check(self) -> None:
        if self.enough(self.work):
            raise _Enough

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and not func.is_view:
            self.ops += 1
            self.elements += out.numel()
            if name in ("mm", "bmm", "mv"):
                self.multiply_adds += out.numel() * args[0].shape[-1]
            elif name == "addmm":
                self.multiply_adds += out.numel() * args[1].shape[-1]
            elif name == "convolution":
                self.multiply_adds += out.numel() * args[1][0].numel()
            if self.ops % 16 == 0:
                self.check()
        return out


def work(task: Task, enough: Callable[[Work], bool] = lambda _: False) -> Work:
    """Count what the first minibatch of a task and its loss take; stops where ``enough`` says so of a part of it.

    Example:
        >>> from lopt.tasks.synthetic import Perceptron
        >>> work(Perceptron(seed=0, data="mixture", inputs=8, hidden=(16,), outputs=4, batch_size=2)).multiply_adds
        384.0
    """
    numbers: list[int] = []

    def to_meta(value: Tensor) -> Tensor:
        numbers.append(value.numel())
        return value.to("meta")

    batch = map_tensors(to_meta, next(task.batches(0, "train")))
    params = {name: torch.empty(shape, device="meta") for name, shape in task.shapes.items()}
    count = _Count(sum(numbers), task.batch_work, enough)
    with torch.no_grad(), suppress(_Enough), count:
        task.loss(params, batch)
    return count.work


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step (minibatch, loss and gradient of one run) by what it takes, in nanoseconds for each.

    The defaults were measured on one core of an EPYC virtual machine with AVX-512, 12 tasks of each of 17 families: of
    half, the predicted and the measured time are within a factor of 1.23, of nine in ten within 1.9.
    """

    per_op: float = 16_000.0
    per_element: float = 1.7
    per_multiply_add: float = 0.056

    def seconds(self, task: Task, limit: float = math.inf) -> float:
        """Predicted time per step; above ``limit`` not all of it."""
        return self.of(work(task, lambda part: self.of(part) > limit))

    def of(self, counted: Work) -> float:
        """Predicted time of a step that takes this."""
        each = self.per_op, self.per_element, self.per_multiply_add
        return 1e-9 * sum(a * b for a, b in zip(each, counted, strict=True))

    @classmethod
    def fit(cls, counted: Sequence[Work], seconds: Sequence[float]) -> "CostModel":
        """The nonnegative coefficients with the smallest squared relative errors."""
        measured = torch.tensor(list(seconds), dtype=torch.float64)[:, None] * 1e9
        columns = torch.tensor([list(one) for one in counted], dtype=torch.float64) / measured
        best, smallest = (0.0, 0.0, 0.0), float("inf")
        for some in (list(c) for n in (1, 2, 3) for c in combinations(range(3), n)):
            found = torch.linalg.lstsq(columns[:, some], torch.ones_like(measured)).solution[:, 0]
            error = float((columns[:, some] @ found - 1.0).square().sum())
            if bool((found >= 0).all()) and error < smallest:
                values = dict(zip(some, found.tolist(), strict=True))
                best, smallest = (values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)), error
        return cls(*best)

    @classmethod
    def measured(cls, tasks: Sequence[Task]) -> "CostModel":
        """Coefficients of this machine, from the time that these tasks take on it."""
        return cls.fit([work(task) for task in tasks], [measure.seconds_per_step(task) for task in tasks])

    @classmethod
    def cached(cls, path: str | os.PathLike[str], tasks: Sequence[Task]) -> "CostModel":
        """What the JSON file holds; where there is none, it is measured on ``tasks`` and written."""
        path = Path(path)
        if not path.exists():
            write_text(path, json.dumps(asdict(cls.measured(tasks)), indent=1) + "\n")
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a cost model, or damaged ({error}); remove it, to measure anew") from error
