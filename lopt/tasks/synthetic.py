"""Tiny tasks made from a seed alone: quadratics with known minima, and small perceptrons on generated data.

A task is the same on every machine; lopt/tasks/generators.py says how.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.generators import KINDS, Data, log_uniform
from lopt.tasks.network import ACTIVATIONS, Activation, Network, perceptron
from lopt.tasks.seeds import derive, generator, minibatch_key, minibatch_rows
from lopt.tasks.task import SPLITS, Batch, SplitName, Task

Family = Literal["noisy_quadratic"] | Data

#: Families whose tasks are perceptrons, which the unroll engine can run (lopt/meta/engine.py).
ENGINE_FAMILIES: tuple[Family, ...] = tuple(KINDS)
#: These and noisy quadratic functions.
FAMILIES: tuple[Family, ...] = ("noisy_quadratic", *ENGINE_FAMILIES)

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
        metric = self.on(batch.targets.device, "metric")
        return torch.square((params["x"] - batch.targets) @ metric).mean() / 2.0


@dataclass(frozen=True, kw_only=True)
class Perceptron(SyntheticTask):
    """A small multilayer perceptron on generated data.

    Args:
        data: what generates the rows; see lopt/tasks/generators.py.
        inputs, outputs: numbers of inputs and of classes or values.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        regression: targets are values (mean squared error), not classes (cross-entropy).
        noise: share of the labels replaced at random, or standard deviation added to values.
        input_scale: factor of all inputs, and of the targets where these are the inputs.
        init_gain: weights start as ``N(0, init_gain^2 / fan_in)``, biases as zero. None is PyTorch's default: weights
            and biases uniform in ``+-1 / sqrt(fan_in)``.
    """

    data: Data
    inputs: int = 8
    outputs: int = 4
    hidden: tuple[int, ...] = (16,)
    activation: Activation = "relu"
    regression: bool = False
    noise: float = 0.0
    input_scale: float = 1.0
    init_gain: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, value, known in (("data", self.data, KINDS), ("activation", self.activation, ACTIVATIONS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
        if min(self.sizes) < 1:
            raise ValueError(f"sizes: expected positive layer widths, got {self.sizes}")
        kind = KINDS[self.data]
        if not (kind.values if self.regression else kind.classes):
            raise ValueError(f"regression: data={self.data!r} has no targets for regression={self.regression}")
        if kind.autoencoder and self.outputs != self.inputs:
            raise ValueError(f"outputs: expected as many as inputs, {self.inputs}, got {self.outputs}")
        if self.data == "patches" and math.isqrt(self.inputs) ** 2 != self.inputs:
            raise ValueError(f"inputs: expected a square number for data='patches', got {self.inputs}")
        if self.data == "sequence" and self.inputs % self.outputs:
            raise ValueError(f"inputs: expected a multiple of outputs={self.outputs}, got {self.inputs}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of all layers, inputs and outputs included."""
        return (self.inputs, *self.hidden, self.outputs)

    @property
    def name(self) -> str:
        return f"{self.data}-{'values' if self.regression else 'classes'}-{'x'.join(map(str, self.sizes))}"

    def _rows(self) -> Batch:
        random = generator(self.seed, "rows")
        x, targets = KINDS[self.data].rows(random, self.rows, self.inputs, self.outputs)
        if self.regression:
            scale = self.input_scale if KINDS[self.data].autoencoder else 1.0
            noise = self.noise * random.standard_normal(targets.shape)
            return Batch(_float32(x * self.input_scale), _float32(targets * scale + noise))
        labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
        other = random.integers(self.outputs, size=self.rows)
        labels = np.where(random.random(self.rows) < self.noise, other, labels)
        return Batch(_float32(x * self.input_scale), torch.from_numpy(labels))

    def init(self, seed: int) -> dict[str, Tensor]:
        random = generator(seed, "init")
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            shape, scale = (fan_in, fan_out), 1.0 / np.sqrt(fan_in)
            if self.init_gain is None:
                weight, bias = random.uniform(-scale, scale, shape), random.uniform(-scale, scale, fan_out)
            else:
                weight, bias = random.standard_normal(shape) * self.init_gain * scale, np.zeros(fan_out)
            params[f"w{layer}"], params[f"b{layer}"] = _float32(weight), _float32(bias)
        return params

    @cached_property
    def network(self) -> Network:
        return perceptron(self.sizes, self.activation, "squared_error" if self.regression else "softmax")

    def stored(self, split: SplitName) -> Batch:
        return self.splits[split]

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        x = batch.inputs
        for layer in range(len(self.hidden)):
            x = ACTIVATIONS[self.activation](x @ params[f"w{layer}"] + params[f"b{layer}"])
        last = len(self.hidden)
        x = x @ params[f"w{last}"] + params[f"b{last}"]
        loss = functional.mse_loss if self.regression else functional.cross_entropy
        return loss(x, batch.targets)


TYPES: dict[str, type[SyntheticTask]] = {"Quadratic": Quadratic, "Perceptron": Perceptron}


def sample_task(seed: int, families: Sequence[Family] = FAMILIES) -> Task:
    """The task called ``seed``: a family drawn from ``families`` (one given twice counts twice), then sizes.

    Sizes are log-uniform: 2 to 64 inputs (16 to 256 words), up to 20 outputs, mostly one or two hidden layers (at most
    four) of 8 to 64, minibatches of 8 to 64 of 200 to 30,000 rows. The scales of inputs and of initial weights stand
    for reparametrisation.

    Raises:
        ValueError: an unknown family, or none.

    Example:
        >>> sample_task(3) == sample_task(3)
        True
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(f"families: expected some of {list(FAMILIES)}, got {list(families)}")
    family = families[int(generator(seed, "family").integers(len(families)))]
    stream = "quadratic" if family == "noisy_quadratic" else family  # what the family was called when seeds were fixed
    random, data_seed = generator(seed, "task", stream), derive(seed, "data")
    if family == "noisy_quadratic":
        return Quadratic(
            seed=data_seed,
            dim=int(random.integers(2, 33)),
            noise=log_uniform(random, 0.01, 0.3),
            decades=float(random.uniform(0.0, 1.0)),
        )
    kind = KINDS[family]
    regression = kind.values and (not kind.classes or bool(random.random() < 0.5))
    noisy = 0.2 if family == "sheets" else 0.6  # share of the tasks
    inputs, outputs = _size(random, 2, 64), _size(random, 1 if regression else 2, 20)
    if family == "patches":
        inputs = int(random.integers(3, 9)) ** 2
    elif family == "sequence":
        inputs = outputs * int(random.integers(2, min(64 // outputs, 12) + 1))
    elif family == "words":
        inputs = _size(random, 16, 256)
    return Perceptron(
        seed=data_seed,
        rows=_size(random, 200, 30_000),
        batch_size=int(random.choice([8, 16, 32, 64])),
        data=family,
        inputs=inputs,
        outputs=inputs if kind.autoencoder else outputs,
        hidden=_hidden(random, family),
        activation=("relu", "tanh", "gelu")[int(random.integers(3))],
        regression=regression,
        noise=log_uniform(random, 0.01, 0.3) if not kind.autoencoder and random.random() < noisy else 0.0,
        input_scale=log_uniform(random, 0.3, 3.0),
        init_gain=log_uniform(random, 0.5, 1.6) if random.random() < 0.7 else None,
    )


def _size(random: np.random.Generator, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, uniform in its logarithm."""
    return int(log_uniform(random, low, high + 0.999))


def _hidden(random: np.random.Generator, family: Family) -> tuple[int, ...]:
    """Widths of hidden layers: one for all layers half of the time; none for half of the linear models."""
    layers = int(random.choice(5, p=[0.1, 0.4, 0.3, 0.12, 0.08]))
    if family in ("linear", "logistic") and random.random() < 0.5:
        layers = 0
    widths = tuple(_size(random, 8, 64) for _ in range(layers))
    return widths[:1] * layers if random.random() < 0.5 else widths


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The task whose :attr:`Task.config` this is.

    Raises:
        ValueError: another type of task, or fields that do not belong to it.
    """
    fields = dict(config)
    name = fields.pop("type", None)
    if name not in TYPES:
        raise ValueError(f"config: expected the type to be one of {sorted(TYPES)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(TYPES[name])}
    if not set(fields) <= known:
        unknown = sorted(set(fields) - known)
        raise ValueError(f"config: unknown fields {unknown} of {name}, expected some of {sorted(known)}")
    return TYPES[name](**fields)


def _float32(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
