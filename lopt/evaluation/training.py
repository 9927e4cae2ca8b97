"""Train one model with one optimizer and record what happened: the loop every comparison is made of."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks.datasets import Dataset, Split
from lopt.tasks.task import VALID_ROWS

#: ``make_optimizer(params, total_steps)``: every optimizer, learned or not, is made this way.
MakeOptimizer = Callable[[Iterable[Tensor], int], torch.optim.Optimizer]

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
    make_optimizer: MakeOptimizer,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    num_records: int = 100,
    valid_every: int = 10,
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
        >>> from lopt.evaluation.baselines import adam
        >>> from lopt.tasks.datasets import digits
        >>> result = train(mlp(64, (32,), 10), digits(), adam, steps=200, batch_size=32)
        >>> result.final.test_accuracy > 0.8
        True
    """
    counts = {"steps": steps, "num_records": num_records, "valid_every": valid_every, "valid_rows": valid_rows}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    train_batches = batches(len(data.train.targets), batch_size, 2 * seed)
    rows = len(data.inner_valid.targets)
    valid_batches = batches(rows, min(valid_rows, rows), 2 * seed + 1)
    optimizer = make_optimizer(model.parameters(), steps)
    observe = getattr(optimizer, "observe", None)
    batch_losses: list[Tensor] = []
    records: list[Record] = []
    seconds = 0.0

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
            start = time.perf_counter()
            for step in range(begin, end):
                if observe is not None and step % valid_every == 0:
                    with torch.no_grad():
                        observe(valid_loss=_loss(model.eval(), data.inner_valid, next(valid_batches)))
                loss = _loss(model.train(), data.train, next(train_batches))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                batch_losses.append(loss.detach())
                step_arguments = {} if observe is None else {"loss": batch_losses[-1]}
                optimizer.step(**step_arguments)  # type: ignore[call-overload]
            batch_losses[-1].item()  # waits for the device, so that the clock is honest
            seconds += time.perf_counter() - start
            record(end)
    return TrainResult(steps, tuple(torch.stack(batch_losses).tolist()), tuple(records), seconds)


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


def _loss(model: nn.Module, split: Split, index: Tensor) -> Tensor:
    index = index.to(split.targets.device)
    return functional.cross_entropy(model(split.inputs[index]), split.targets[index])
