"""Runs of one task: any optimizer on any task.

Every run of one (task, seed) starts from the same parameters and sees the same minibatches. What is recorded is the
loss on whole splits, or on fixed minibatches of them where a task has no whole splits.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lopt.evaluation.opponents import evaluating
from lopt.evaluation.suites import EVALUATION
from lopt.tasks.task import SPLITS, VALID_ROWS, Batch, SplitName, Task

#: Splits of the experiments' losses: optimizers are compared on the first and last, tuned by the first or second.
RECORDED: tuple[SplitName, ...] = ("train", "outer_valid", "test")

#: The learned optimizer is told the loss of ``VALID_ROWS`` rows of inner_valid before every such step.
VALID_EVERY = 10

#: A loss that is not finite, or above this many times the initial one, counts as this many times the initial one.
LOSS_LIMIT = 10.0

ROWS_AT_ONCE = 5000  # evaluated at once


#: ``make_optimizer(leaf tensors, steps)``: every optimizer, learned or not, is made this way.
OptimizerFactory = Callable[[list[Tensor], int], torch.optim.Optimizer]

#: What an optimizer without guards raises when gradients are not finite any more: then a divergence, otherwise a fault.
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


class Training:
    """A run in progress: an optimizer, a task, its parameters and minibatches.

    An optimizer with an ``observe`` method is told the training loss of every step and, before every step number
    divisible by ``valid_every``, the loss of so many inner_valid minibatches as have ``valid_rows`` rows, unless the
    task says that there is none (``validated``).

    Args:
        steps: length of the run, for optimizers that are told.

    Attributes:
        params: now; leaf tensors.
        seconds: of training so far: minibatches, gradients, optimizer, and validation losses for those who take them.
        batch_losses: of the minibatch of every step, before it.
        finite: whether parameters are; otherwise no further step is taken.

    Raises:
        ValueError: a number below one.

    Example:
        >>> from lopt.tasks import sample_task
        >>> run = Training(sample_task(0), lambda params, steps: torch.optim.SGD(params, lr=0.1), seed=0, steps=9)
        >>> run.advance(2)
        >>> run.advance(7)
        >>> len(run.batch_losses), run.finite
        (9, True)
    """

    def __init__(
        self,
        task: Task,
        optimizer_factory: OptimizerFactory,
        seed: int,
        steps: int,
        *,
        valid_every: int = VALID_EVERY,
        valid_rows: int = VALID_ROWS,
    ) -> None:
        for name, count in {"steps": steps, "valid_every": valid_every, "valid_rows": valid_rows}.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        self.task = task
        self.params = {name: value.requires_grad_() for name, value in task.init(seed).items()}
        self.optimizer = optimizer_factory(list(self.params.values()), steps)
        self.batch_losses: list[Tensor] = []
        self.seconds = 0.0
        self.finite = True
        self._train, self._inner_valid = task.batches(seed, "train"), task.batches(seed, "inner_valid")
        self._valid_every = valid_every if task.validated else None
        self._valid_batches = task.num_batches(valid_rows)
        self._observe = getattr(self.optimizer, "observe", None)

    def advance(self, count: int) -> None:
        """Take so many steps, fewer if the parameters cease to be finite.

        Raises:
            RuntimeError: the optimizer raised though parameters and gradients were finite and the loss was low.
        """
        started = time.perf_counter()
        for _ in range(count):
            if not self.finite:
                break
            self._step()
        self.seconds += time.perf_counter() - started

    def _step(self) -> None:
        task, params, step = self.task, self.params, len(self.batch_losses)
        if self._observe is not None and self._valid_every is not None and step % self._valid_every == 0:
            with torch.no_grad():
                batches = itertools.islice(self._inner_valid, self._valid_batches)
                self._observe(valid_loss=_joint_loss(task, params, batches))
        loss = task.loss(params, next(self._train))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.batch_losses.append(loss.detach())
        now = self.batch_losses[-1].item()
        if not math.isfinite(now) and not _finite(params.values()):
            self.finite = False
            return
        told = {} if self._observe is None else {"loss": self.batch_losses[-1]}
        try:
            self.optimizer.step(**told)  # type: ignore[call-overload]
        except _BROKEN as error:
            _, exploded = limit([now], [self.batch_losses[0].item()])
            if not exploded and _finite(params.values()) and _finite(v.grad for v in params.values()):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} on {task.name}, step {step}, loss {now:.4g}, "
                    f"parameters and gradients finite: {type(error).__name__}: {error}"
                ) from error
            self.finite = False


def train_task(
    task: Task,
    optimizer_factory: OptimizerFactory,
    seed: int,
    steps: int,
    *,
    record_every: int | None = None,
    valid_every: int = VALID_EVERY,
    valid_rows: int = VALID_ROWS,
    on_done: Callable[[int, int], None] | None = None,
) -> Curve:
    """Train ``task`` from the initial parameters and minibatches of ``seed``, the same for every optimizer.

    Optimizers are told losses as in :class:`Training`. The same call on the same machine with one thread gives the same
    bits.

    Args:
        record_every: record losses each time so many steps are done, besides the beginning and the end.
        on_done: called with the numbers of steps done and to do, each time losses have been recorded.

    Raises:
        ValueError: a number below one.
        RuntimeError: the optimizer raised in a step though parameters and gradients were finite and the loss was low.

    Example:
        >>> from lopt.evaluation.opponents import make_optimizer
        >>> from lopt.tasks import sample_task
        >>> curve = train_task(sample_task(0), lambda params, steps: make_optimizer("adam", params, steps), 0, 50)
        >>> curve.steps, curve.final["train"] < curve.initial["train"], curve.diverged
        ((0, 50), True, False)
    """
    with torch.random.fork_rng(devices=[]):  # for optimizers that draw random numbers
        torch.manual_seed(seed)
        run = Training(task, optimizer_factory, seed, steps, valid_every=valid_every, valid_rows=valid_rows)
        every = steps if record_every is None else record_every
        if every < 1:
            raise ValueError(f"record_every: expected at least 1, got {every}")
        splits = {split: list(evaluation_batches(task, split)) for split in SPLITS}
        at, losses, times = [0], [_mean_losses(task, run.params, splits)], [0.0]
        for begin in range(0, steps, every):
            end = min(begin + every, steps)
            run.advance(end - begin)
            times.append(run.seconds)
            with evaluating(run.optimizer):
                losses.append(_mean_losses(task, run.params, splits) if run.finite else dict.fromkeys(SPLITS, math.nan))
                final = {name: value.detach().clone() for name, value in run.params.items()}
            at.append(end)
            if on_done is not None:
                on_done(end, steps)
    by_split = {split: tuple(point[split] for point in losses) for split in SPLITS}
    _, diverged = limit([by_split[split][-1] for split in SPLITS], [by_split[split][0] for split in SPLITS])
    return Curve(
        steps=tuple(at),
        losses=by_split,
        batch_losses=tuple(torch.stack(run.batch_losses).tolist()),
        times=tuple(times),
        diverged=diverged,
        state_bytes_per_param=state_bytes(run.optimizer) / sum(value.numel() for value in run.params.values()),
        params=final,
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one run.

    Args:
        losses: at the end, of some splits, as they count (:func:`limit`).
        initial: of the same splits, before the first step.
        state_bytes_per_param: of the optimizer; nan if not measured.
        curve: along the run, lists of the same length by name: "step", "seconds" of training until there, and losses.
    """

    losses: dict[SplitName, float]
    initial: dict[SplitName, float]
    diverged: bool
    seconds: float
    state_bytes_per_param: float = math.nan
    curve: dict[str, list[float]] = field(default_factory=dict)


def counted(
    losses: Mapping[SplitName, float], initial: Mapping[SplitName, float], seconds: float, **more: Any
) -> Result:
    """The result of a run that ended with these losses, the training loss among them."""
    splits = sorted(losses, key=lambda split: split != "train")  # the training loss decides on divergence
    limited, diverged = limit([losses[split] for split in splits], [initial[split] for split in splits])
    return Result(
        losses=dict(zip(splits, limited, strict=True)),
        initial=dict(initial),
        diverged=diverged,
        seconds=seconds,
        **more,
    )


def result(curve: Curve) -> Result:
    """The result of a run with its curve; losses that are not finite there count as at the end."""
    along = {"step": list(curve.steps), "seconds": list(curve.times)} | {
        str(split): [limit([loss], [curve.losses[split][0]])[0][0] for loss in curve.losses[split]]
        for split in RECORDED
    }
    return counted(
        curve.final,
        curve.initial,
        curve.seconds,
        state_bytes_per_param=curve.state_bytes_per_param,
        curve=along,
    )


def evaluation_batches(task: Task, split: SplitName) -> Iterator[Any]:
    """What the loss of a split is measured on: all its rows, if the task has them, or fixed minibatches."""
    whole: Mapping[SplitName, Batch] | None = getattr(task, "splits", None)
    if whole is not None:
        yield from map(Batch, *(torch.split(rows, ROWS_AT_ONCE) for rows in whole[split]))
        return
    rows = 0
    for batch in itertools.islice(task.batches(EVALUATION.seed, split), EVALUATION.batches):
        yield batch
        rows += max(len(batch[0]), 1)
        if rows >= EVALUATION.rows:
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


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


def _joint_loss(task: Task, params: Mapping[str, Tensor], batches: Iterable[Any]) -> Tensor:
    """Mean loss of some minibatches; in one pass where these are rows and nothing else."""
    some = list(batches)
    if all(isinstance(batch, Batch) for batch in some):
        return task.loss(params, Batch(*map(torch.cat, zip(*some, strict=True))))
    return torch.stack([task.loss(params, batch) for batch in some]).mean()


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
