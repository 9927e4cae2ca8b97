"""Runs of one task: any optimizer on any task, and a grid of Adams as one batch.

Every run of one (task, seed) starts from the same parameters and sees the same minibatches. What is recorded is the
loss on whole splits, or on fixed minibatches of them where a task has no whole splits.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lopt.evaluation.opponents import evaluating, make_optimizer
from lopt.evaluation.suites import HeldOutTask
from lopt.tasks.task import SPLITS, Batch, SplitName, Task
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


#: ``make_optimizer(leaf tensors, steps)``: every optimizer, learned or not, is made this way.
OptimizerFactory = Callable[[list[Tensor], int], torch.optim.Optimizer]

#: Rows of a split (at least; at most so many minibatches) on which a loss is recorded for a task without whole splits,
#: and the seed that draws them.
EVALUATION_ROWS = 512
EVALUATION_BATCHES = 64
EVALUATION_SEED = 20_201_123

#: What an optimizer without guards raises when its gradients are not finite any more.
_BROKEN = (AssertionError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run of one optimizer on one task.

    Args:
        steps: where losses were recorded; the first is 0, before any step, the last the length of the run.
        losses: of every split, there; nan where the parameters had ceased to be finite.
        batch_losses: of the minibatch of every step, before it.
        times: seconds of training up to each of ``steps``: minibatches, gradients, optimizer, and validation losses for
            those who take them; not the evaluations.
        diverged: the parameters ceased to be finite, or the training loss ended far above where it began
            (:func:`limit`).
        state_bytes_per_param: memory of the optimizer's state after the run, in bytes per parameter.
        params: the final parameters.
    """

    steps: tuple[int, ...]
    losses: dict[SplitName, tuple[float, ...]]
    batch_losses: tuple[float, ...]
    times: tuple[float, ...]
    diverged: bool
    state_bytes_per_param: float
    params: dict[str, Tensor]

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return self.times[-1]

    @property
    def initial(self) -> dict[SplitName, float]:
        """Losses before the first step."""
        return {split: values[0] for split, values in self.losses.items()}

    @property
    def final(self) -> dict[SplitName, float]:
        """Losses after the last step."""
        return {split: values[-1] for split, values in self.losses.items()}


def train_task(
    task: Task,
    optimizer_factory: OptimizerFactory,
    seed: int,
    steps: int,
    *,
    record_every: int | None = None,
    valid_every: int = VALID_EVERY,
) -> Curve:
    """Train ``task`` from the initial parameters and minibatches of ``seed``, the same for every optimizer.

    An optimizer with an ``observe`` method is told the training loss of every step and, before every step number
    divisible by ``valid_every``, the loss of an inner_valid minibatch. The same call on the same machine with one
    thread gives the same bits.

    Args:
        record_every: record losses each time so many steps are done, besides the beginning and the end.

    Raises:
        ValueError: a number below one.

    Example:
        >>> from lopt.evaluation.opponents import make_optimizer
        >>> from lopt.tasks import sample_task
        >>> curve = train_task(sample_task(0), lambda params, steps: make_optimizer("adam", params, steps), 0, 50)
        >>> curve.steps, curve.final["train"] < curve.initial["train"], curve.diverged
        ((0, 50), True, False)
    """
    for name, count in {"steps": steps, "record_every": record_every or 1, "valid_every": valid_every}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    every = record_every or steps
    splits = {split: list(evaluation_batches(task, split)) for split in SPLITS}
    train, inner_valid = task.batches(seed, "train"), task.batches(seed, "inner_valid")
    params = {name: value.requires_grad_() for name, value in task.init(seed).items()}
    at, losses, times = [0], [_mean_losses(task, params, splits)], [0.0]
    batch_losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):  # for optimizers that draw random numbers
        torch.manual_seed(seed)
        optimizer = optimizer_factory(list(params.values()), steps)
        observe = getattr(optimizer, "observe", None)
        finite = True
        for begin in range(0, steps, every):
            end = min(begin + every, steps)
            started = time.perf_counter()
            for step in range(begin, end if finite else begin):
                if observe is not None and step % valid_every == 0:
                    with torch.no_grad():
                        observe(valid_loss=task.loss(params, next(inner_valid)))
                loss = task.loss(params, next(train))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                batch_losses.append(loss.detach())
                if not math.isfinite(batch_losses[-1].item()) and not _finite(params):
                    finite = False
                    break
                try:
                    optimizer.step(**({} if observe is None else {"loss": batch_losses[-1]}))  # type: ignore[call-overload]
                except _BROKEN:
                    finite = False
                    break
            times.append(times[-1] + time.perf_counter() - started)
            with evaluating(optimizer):
                losses.append(_mean_losses(task, params, splits) if finite else dict.fromkeys(SPLITS, math.nan))
                final = {name: value.detach().clone() for name, value in params.items()}
            at.append(end)
    by_split = {split: tuple(point[split] for point in losses) for split in SPLITS}
    _, diverged = limit([by_split[split][-1] for split in SPLITS], [by_split[split][0] for split in SPLITS])
    return Curve(
        steps=tuple(at),
        losses=by_split,
        batch_losses=tuple(torch.stack(batch_losses).tolist()),
        times=tuple(times),
        diverged=diverged,
        state_bytes_per_param=state_bytes(optimizer) / sum(value.numel() for value in params.values()),
        params=final,
    )


def evaluation_batches(task: Task, split: SplitName) -> Iterator[Any]:
    """What the loss of a split is measured on: all its rows, if the task has them, or fixed minibatches."""
    whole: Mapping[SplitName, Batch] | None = getattr(task, "splits", None)
    if whole is not None:
        yield from map(Batch, *(torch.split(rows, _ROWS) for rows in whole[split]))
        return
    rows = 0
    for batch in itertools.islice(task.batches(EVALUATION_SEED, split), EVALUATION_BATCHES):
        yield batch
        rows += max(len(batch[0]), 1)
        if rows >= EVALUATION_ROWS:
            return


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the tensors that an optimizer keeps between steps, parameters and gradients left out."""
    seen: dict[int, int] = {}

    def visit(thing: Any) -> None:
        if isinstance(thing, Tensor):
            seen[thing.data_ptr()] = max(seen.get(thing.data_ptr(), 0), thing.numel() * thing.element_size())
        elif isinstance(thing, Mapping):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                visit(value)

    visit(optimizer.state)
    visit([{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups])
    for group in optimizer.param_groups:
        for param in group["params"]:
            seen.pop(param.data_ptr(), None)
    return sum(seen.values())


def _finite(params: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in params.values())


@torch.no_grad()
def _mean_losses(
    task: Task, params: Mapping[str, Tensor], splits: Mapping[SplitName, Sequence[Any]]
) -> dict[SplitName, float]:
    """Mean loss over all rows of the minibatches of every split."""
    means: dict[SplitName, float] = {}
    for split, batches in splits.items():
        rows = [max(len(batch[0]), 1) for batch in batches]
        values = [task.loss(params, batch).double() * count for batch, count in zip(batches, rows, strict=True)]
        means[split] = float(torch.stack(values).sum()) / sum(rows)
    return means


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
    """The result of the one run of the learned optimizer; ``hint`` says whether it knows ``steps``."""
    name = "lopt" if hint else "lopt-untold"
    curve = train_task(task, lambda p, n: make_optimizer(name, p, n, theta=theta, impl=impl), seed, steps)
    final, initial = ([values[split] for split in RECORDED] for values in (curve.final, curve.initial))
    return [_result(1.0, "learned", final, initial, curve.seconds)]


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
    worst = [LOSS_LIMIT * value if value > 0 else value + (LOSS_LIMIT - 1) * abs(value) for value in initial]
    counted = tuple(min(loss, most) if math.isfinite(loss) else most for loss, most in zip(losses, worst, strict=True))
    return counted, not all(map(math.isfinite, losses)) or losses[0] > worst[0]
