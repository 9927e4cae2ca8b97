"""Tiny tasks made from a seed alone: quadratics with known minima, and small perceptrons on generated data.

The data of a task is the same on every machine: it is drawn with NumPy's PCG64 and computed in float64; where
a matrix product is involved (teacher networks), values are rounded to multiples of 2^-12, so that the order of
summation on a machine does not show.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.seeds import derive, generator, minibatch_key, minibatch_rows
from lopt.tasks.task import SPLITS, Batch, SplitName, Task

Family = Literal["quadratic", "mixture", "teacher"]
FAMILIES: tuple[Family, ...] = ("quadratic", "mixture", "teacher")

#: Shares of the rows of a data set.
SHARES: dict[SplitName, float] = {"train": 0.5, "inner_valid": 0.125, "outer_valid": 0.25, "test": 0.125}


@dataclass(frozen=True, kw_only=True)
class SyntheticTask(Task):
    """What synthetic tasks share: rows in four splits, and minibatches of rows drawn with replacement.

    Args:
        seed: of the data.
        rows: of all splits together.
        batch_size: rows of a minibatch.
    """

    seed: int
    rows: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.rows < 20:
            raise ValueError(f"rows: expected at least 20, for four splits, got {self.rows}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {self.batch_size}")

    def _rows(self) -> Batch:
        """All rows; independent of each other and in random order."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"type": type(self).__name__, **fields}

    @cached_property
    def splits(self) -> dict[SplitName, Batch]:
        """The rows of every split."""
        inputs, targets = self._rows()
        ends = [int(end * self.rows) for end in itertools.accumulate(SHARES.values())]
        bounds = zip(SPLITS, [0, *ends[:-1]], ends, strict=True)
        return {split: Batch(inputs[start:end], targets[start:end]) for split, start, end in bounds}

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        rows, key = self.splits[split], minibatch_key(seed, split)
        for step in itertools.count(start):
            index = torch.from_numpy(minibatch_rows(key, step, self.batch_size, len(rows.inputs)))
            yield Batch(rows.inputs[index], rows.targets[index])


@dataclass(frozen=True, kw_only=True)
class Quadratic(SyntheticTask):
    """Distance to noisy targets in a random metric ``M``.

    ``loss(x) = mean over rows r of |(x - target_r) M|^2 / (2 dim)``, with gradient
    ``M M^T (x - mean target) / dim`` and its minimum at the mean target.

    Args:
        dim: number of parameters.
        noise: standard deviation of the targets around their centre.
        decades: the columns of ``M`` are scaled by ``10^u``, ``u`` uniform in ``[-decades, 0]``.
    """

    dim: int = 10
    noise: float = 0.1
    decades: float = 1.0

    @property
    def name(self) -> str:
        return f"quadratic-{self.dim}"

    @cached_property
    def metric(self) -> Tensor:
        """``M`` ``[dim, dim]``."""
        random = generator(self.seed, "metric")
        values = random.standard_normal((self.dim, self.dim)) / np.sqrt(self.dim)
        return _float32(values * 10.0 ** random.uniform(-self.decades, 0.0, self.dim))

    def _rows(self) -> Batch:
        random = generator(self.seed, "rows")
        centre = random.standard_normal(self.dim)
        targets = _float32(centre + self.noise * random.standard_normal((self.rows, self.dim)))
        return Batch(torch.zeros(self.rows, 0), targets)

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"x": _float32(generator(seed, "init").standard_normal(self.dim))}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return torch.square((params["x"] - batch.targets) @ self.metric).mean() / 2.0


@dataclass(frozen=True, kw_only=True)
class Perceptron(SyntheticTask):
    """A small multilayer perceptron on generated data.

    Args:
        data: ``mixture`` is Gaussian clouds, one per class; in ``teacher`` a random network says the targets.
        inputs, outputs: numbers of inputs and of classes or values.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        regression: targets are the teacher's values (mean squared error), not classes (cross-entropy).
        noise: share of the labels replaced at random, or standard deviation added to values.
        input_scale: factor of all inputs.
        init_gain: weights start as ``N(0, init_gain^2 / fan_in)``, biases as zero.
    """

    data: Literal["mixture", "teacher"]
    inputs: int = 8
    outputs: int = 4
    hidden: tuple[int, ...] = (16,)
    activation: Literal["relu", "tanh"] = "relu"
    regression: bool = False
    noise: float = 0.0
    input_scale: float = 1.0
    init_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.regression and self.data != "teacher":
            raise ValueError(f"regression: needs data='teacher', got data={self.data!r}")
        if min(self.sizes) < 1:
            raise ValueError(f"sizes: expected positive layer widths, got {self.sizes}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of all layers, inputs and outputs included."""
        return (self.inputs, *self.hidden, self.outputs)

    @property
    def name(self) -> str:
        return f"{self.data}-{'values' if self.regression else 'classes'}-{'x'.join(map(str, self.sizes))}"

    def _rows(self) -> Batch:
        random = generator(self.seed, "rows")
        if self.data == "mixture":
            centres = random.standard_normal((self.outputs, self.inputs))
            labels = random.integers(self.outputs, size=self.rows)
            x = centres[labels] + random.uniform(0.5, 1.5) * random.standard_normal((self.rows, self.inputs))
        else:
            x = random.standard_normal((self.rows, self.inputs))
            first = random.standard_normal((self.inputs, 16)) * 1.5 / np.sqrt(self.inputs)
            values = np.tanh(x @ first) @ random.standard_normal((16, self.outputs)) / 4.0
            values = np.round(values * 4096.0) / 4096.0
            labels = values.argmax(axis=1)
        if self.regression:
            targets = _float32(values + self.noise * random.standard_normal(values.shape))
        else:
            other = random.integers(self.outputs, size=self.rows)
            targets = torch.from_numpy(np.where(random.random(self.rows) < self.noise, other, labels))
        return Batch(_float32(x * self.input_scale), targets)

    def init(self, seed: int) -> dict[str, Tensor]:
        random = generator(seed, "init")
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            weight = random.standard_normal((fan_in, fan_out)) * self.init_gain / np.sqrt(fan_in)
            params[f"w{layer}"], params[f"b{layer}"] = _float32(weight), torch.zeros(fan_out)
        return params

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        x = batch.inputs
        for layer in range(len(self.hidden)):
            x = x @ params[f"w{layer}"] + params[f"b{layer}"]
            x = torch.relu(x) if self.activation == "relu" else torch.tanh(x)
        last = len(self.hidden)
        x = x @ params[f"w{last}"] + params[f"b{last}"]
        loss = functional.mse_loss if self.regression else functional.cross_entropy
        return loss(x, batch.targets)


def sample_task(seed: int, families: Sequence[Family] = FAMILIES) -> Task:
    """The task called ``seed``: a family drawn from ``families`` (one given twice counts twice), then sizes.

    Raises:
        ValueError: an unknown family, or none.

    Example:
        >>> sample_task(3) == sample_task(3)
        True
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(f"families: expected some of {list(FAMILIES)}, got {list(families)}")
    random = generator(seed, "task")
    family = families[int(random.integers(len(families)))]
    data_seed = derive(seed, "data")
    if family == "quadratic":
        return Quadratic(
            seed=data_seed,
            dim=int(random.integers(2, 33)),
            noise=_log_uniform(random, 0.01, 0.3),
            decades=float(random.uniform(0.0, 1.0)),
        )
    regression = family == "teacher" and bool(random.random() < 0.5)
    return Perceptron(
        seed=data_seed,
        batch_size=int(random.choice([16, 32])),
        data=family,
        inputs=int(random.integers(2, 25)),
        outputs=int(random.integers(1, 9)) if regression else int(random.integers(2, 11)),
        hidden=tuple(int(random.integers(8, 25)) for _ in range(int(random.integers(0, 3)))),
        activation="relu" if random.random() < 0.5 else "tanh",
        regression=regression,
        noise=float(random.uniform(0.0, 0.1)),
        input_scale=_log_uniform(random, 0.5, 2.0),
        init_gain=_log_uniform(random, 0.5, 1.7),
    )


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The task whose :attr:`Task.config` this is.

    Raises:
        ValueError: another type of task, or fields that do not belong to it.
    """
    types: dict[str, type[SyntheticTask]] = {"Quadratic": Quadratic, "Perceptron": Perceptron}
    fields = dict(config)
    name = fields.pop("type", None)
    if name not in types:
        raise ValueError(f"config: expected the type to be one of {sorted(types)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(types[name])}
    if not set(fields) <= known:
        unknown = sorted(set(fields) - known)
        raise ValueError(f"config: unknown fields {unknown} of {name}, expected some of {sorted(known)}")
    return types[name](**fields)


def _float32(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
