"""Train a model where it is, as :mod:`lopt.evaluation.runs` trains tasks, and record losses and accuracy."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.evaluation.runs import VALID_EVERY, OptimizerFactory, Training
from lopt.tasks.datasets import Dataset, Split
from lopt.tasks.task import VALID_ROWS, Batch, SplitName, Task

#: Losses and accuracies of a split are those of its first 10,000 rows (all of them in small data sets).
EVALUATION_ROWS = 10_000


@dataclass(frozen=True)
class Record:
    """Mean cross-entropy on train and test rows and accuracy on test rows, after ``step`` steps."""

    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """One finished run: the minibatch loss of every step, the records (the first before step 0), the seconds.

    ``seconds`` is the time of the training loop: minibatches, forward, backward, optimizer and, for an
    optimizer that takes them, validation losses. The evaluations between the steps are left out.
    """

    steps: int
    batch_losses: tuple[float, ...]
    records: tuple[Record, ...]
    seconds: float

    @property
    def final(self) -> Record:
        """The last record."""
        return self.records[-1]

    @property
    def ms_per_step(self) -> float:
        """Milliseconds of training per step."""
        return 1e3 * self.seconds / self.steps


def train(
    model: nn.Module,
    data: Dataset,
    make_optimizer: OptimizerFactory,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    num_records: int = 100,
    valid_every: int = VALID_EVERY,
    valid_rows: int = VALID_ROWS,
    on_record: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``data.train`` with softmax cross-entropy, and return the curves.

    The same seed gives every optimizer the same minibatches and the same dropout masks. An optimizer with an
    ``observe`` method is also told the losses: the training loss at every step and, before every step number
    divisible by ``valid_every``, the loss of ``valid_rows`` rows of ``data.inner_valid``, or of all that it has.

    Args:
        model: maps inputs ``[rows, ...]`` to logits ``[rows, num_classes]``; on the device of ``data``.
        steps, batch_size, seed: length of the run, rows per minibatch, order of the minibatches.
        num_records: measurements along the run, at equal distances; one before the first step comes on top.
        on_record: called with each measurement, outside the measured time.

    Raises:
        ValueError: a count below one, or a batch that does not fit into the training split.

    Example:
        >>> from lopt.tasks.datasets import digits
        >>> adam = lambda params, steps: torch.optim.Adam(params)
        >>> result = train(mlp(64, (32,), 10), digits(), adam, steps=200, batch_size=32)
        >>> result.final.test_accuracy > 0.8
        True
    """
    if num_records < 1:
        raise ValueError(f"num_records: expected at least 1, got {num_records}")
    task = _Supervised(model, data, batch_size, min(valid_rows, len(data.inner_valid.targets)))
    run = Training(task, make_optimizer, seed, steps, valid_every=valid_every, valid_rows=valid_rows)
    records: list[Record] = []

    def record(step: int) -> None:
        train_loss, _ = evaluate(model, data.train)
        records.append(Record(step, train_loss, *evaluate(model, data.test)))
        if on_record is not None:
            on_record(records[-1])

    device = data.train.inputs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        record(0)
        interval = math.ceil(steps / num_records)
        for begin in range(0, steps, interval):
            end = min(begin + interval, steps)
            run.advance(end - begin)
            record(end)
    return TrainResult(steps, tuple(torch.stack(run.batch_losses).tolist()), tuple(records), run.seconds)


class _Supervised(Task):
    """A model that is trained where it is: its parameters are those of the task, and losses are those of the model, in
    train mode where there are gradients."""

    def __init__(self, model: nn.Module, data: Dataset, batch_size: int, valid_rows: int) -> None:
        self.model, self.data = model, data
        self.sizes: dict[SplitName, int] = {"train": batch_size, "inner_valid": valid_rows}

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        return functional.cross_entropy(self.model.train(torch.is_grad_enabled())(batch.inputs), batch.targets)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        rows: Split = getattr(self.data, split)
        order = batches(len(rows.targets), self.sizes[split], 2 * seed + (split != "train"))
        there = (index.to(rows.targets.device) for index in order)
        return (Batch(rows.inputs[index], rows.targets[index]) for index in there)

    def num_batches(self, rows: int) -> int:
        return 1


def batches(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers ``[batch_size]`` without end; each epoch is a new permutation without its incomplete rest.

    Raises:
        ValueError: the batch is empty or larger than the split.

    Example:
        >>> [sorted(batch.tolist()) for batch, _ in zip(batches(2, 2, seed=0), range(2))]
        [[0, 1], [0, 1]]
    """
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size: expected between 1 and the {rows} rows of the split, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)

    def epochs() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(rows, generator=generator)
            yield from order[: rows - rows % batch_size].view(-1, batch_size)

    return epochs()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of ``model`` in eval mode on ``EVALUATION_ROWS`` of ``split``."""
    outputs = model.eval()(split.inputs[:EVALUATION_ROWS])
    targets = split.targets[:EVALUATION_ROWS]
    accuracy = (outputs.argmax(1) == targets).to(torch.float64).mean()
    return functional.cross_entropy(outputs, targets).item(), accuracy.item()


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, seed: int = 0) -> nn.Sequential:
    """A perceptron ``inputs -> hidden... -> outputs`` with ReLU and torch's default initialisation.

    Inputs of any shape ``[rows, ...]`` are flattened. ``seed`` draws the initial values; the global
    random state is left as it was.

    Example:
        >>> [tuple(param.shape) for param in mlp(64, (32,), 10).parameters()]
        [(32, 64), (32,), (10, 32), (10,)]
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))
