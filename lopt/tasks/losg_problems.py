"""The problems of "Learned Optimizers that Scale and Generalize": functions of few parameters, some with rows of data.

Source: arXiv:1703.04813, with TaskSet's data (arXiv:2002.11887); the test functions are those of S. Surjanovic and D.
Bingham, Virtual Library of Simulation Experiments, https://www.sfu.ca/~ssurjano/optimization.html.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.pieces import Params, Random, activation, dense

EPSILON = 1e-6
Rows = tuple[Any, Any]


class TestFunction(NamedTuple):
    """A function of two variables, where its variables start (uniformly; None: normal), and its smallest value."""

    value: Callable[[Tensor, Tensor], Tensor]
    low: tuple[float, float] | None
    high: tuple[float, float] | None
    floor: float


def _square(low: float, high: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (low, low), (high, high)


def _ackley(x: Tensor, y: Tensor) -> Tensor:
    waves = torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)
    return -20 * torch.exp(-0.2 * torch.sqrt((x**2 + y**2) / 2)) - torch.exp(waves / 2) + math.e + 20


def _branin(x: Tensor, y: Tensor) -> Tensor:
    a, b = 5.1 / (4 * math.pi**2), 5 / math.pi
    return (y - a * x**2 + b * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(x) + 10


def _beale(x: Tensor, y: Tensor) -> Tensor:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _logsumexp(x: Tensor, y: Tensor) -> Tensor:
    terms = [x + 3 * y - 0.1, x - 3 * y - 0.1, -x - 0.1, torch.zeros_like(x)]
    return torch.logsumexp(torch.stack(terms), dim=0)


def _michalewicz(x: Tensor, y: Tensor) -> Tensor:
    return 2 - torch.sin(x) * torch.sin(x**2 / math.pi) ** 10 - torch.sin(y) * torch.sin(2 * y**2 / math.pi) ** 10


def _styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    return (x**4 - 16 * x**2 + 5 * x + y**4 - 16 * y**2 + 5 * y) / 2 + 80


FUNCTIONS: dict[str, TestFunction] = {
    "ackley": TestFunction(_ackley, *_square(-32.768, 32.768), 0.0),
    "beale": TestFunction(_beale, *_square(-4.5, 4.5), 0.0),
    "branin": TestFunction(_branin, (-5.0, 0.0), (10.0, 15.0), 5 / (4 * math.pi)),
    "logsumexp": TestFunction(_logsumexp, None, None, math.log(1 + 2 * math.sqrt(2) * math.exp(-0.1))),
    "matyas": TestFunction(lambda x, y: 0.26 * (x**2 + y**2) - 0.48 * x * y, *_square(-10.0, 10.0), 0.0),
    "michalewicz": TestFunction(_michalewicz, *_square(0.0, math.pi), 0.1933771146528),
    "rosenbrock": TestFunction(lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2, *_square(-5.0, 10.0), 0.0),
    "styblinski_tang": TestFunction(_styblinski_tang, *_square(-5.0, 5.0), 80 - 2 * 39.16616570377142),
}


class Problem(ABC):
    """A function to minimise; a frozen dataclass, whose fields are its settings."""

    #: Smallest value, None when it is not known; of any rows.
    floor: float | None = 0.0

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""

    def init(self, random: Random) -> dict[str, Any]:
        """Initial parameters; standard normal unless a problem says otherwise."""
        return {name: random.standard_normal(shape) for name, shape in self.shapes.items()}

    def constants(self, random: Random) -> dict[str, Any]:
        """Fixed matrices and vectors that the objective uses."""
        return {}

    def rows(self, random: Random, constants: Mapping[str, Tensor], rows: int) -> Rows:
        """Inputs and targets of this many rows, for problems with data."""
        return np.zeros((rows, 0)), np.zeros((rows, 0))

    @abstractmethod
    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """The value."""


@dataclass(frozen=True)
class Quadratic(Problem):
    """``|W x - y|^2 / 2`` with normal W and y."""

    dim: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.dim,)}

    def constants(self, random: Random) -> dict[str, Any]:
        return {"W": random.standard_normal((self.dim, self.dim)), "y": random.standard_normal(self.dim)}

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.square(constants["W"] @ params["x"] - constants["y"]).sum() / 2


@dataclass(frozen=True)
class Norm(Quadratic):
    """``(sum (|W x - y| + eps)^p)^(1/p)`` with normal W and y."""

    power: float = 2.0

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        difference = torch.abs(constants["W"] @ params["x"] - constants["y"]) + EPSILON
        return torch.pow(difference, self.power).sum().pow(1 / self.power)


@dataclass(frozen=True)
class Bowl(Problem):
    """``|sqrt(H) R x|^2 / 2`` in two dimensions, with H of this condition number and R a turn by this angle."""

    condition: float
    angle: float

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (2,)}

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        (x, y), cos, sin = params["x"], math.cos(self.angle), math.sin(self.angle)
        return (self.condition * torch.square(cos * x - sin * y) + torch.square(sin * x + cos * y)) / 2


@dataclass(frozen=True)
class Optimization(Problem):
    """One of ``FUNCTIONS``."""

    function: str

    @property
    def floor(self) -> float:  # type: ignore[override]
        return FUNCTIONS[self.function].floor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (2,)}

    def init(self, random: Random) -> dict[str, Any]:
        function = FUNCTIONS[self.function]
        if function.low is None or function.high is None:
            return super().init(random)
        return {"x": random.uniform(function.low, function.high)}

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return FUNCTIONS[self.function].value(*params["x"])


@dataclass(frozen=True)
class MinMaxWell(Problem):
    """``max x^2 + 1 / min x^2 - 2``: all but two of the gradient's entries are zero."""

    dim: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.dim,)}

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        squares = torch.square(params["x"])
        return squares.amax() + 1 / squares.amin() - 2 + 1e-12


@dataclass(frozen=True)
class DependencyChain(Problem):
    """``dim x_0^2 + sum_i x_i^2 / (x_{i-1}^2 + eps)``: each can be brought to zero only after the one before."""

    dim: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.dim + 1,)}

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        squares = torch.square(params["x"])
        return (squares[0] + squares[1:] / (squares[:-1] + EPSILON)).sum()


@dataclass(frozen=True)
class OutwardSnake(Problem):
    """``sum_r d_r0 / (|x| + eps) + sum_ri ((x_i - pi cos x_{i-1}) d_ri)^2``: a winding way out; rows d are normal."""

    dim: int
    floor = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.dim,)}

    def rows(self, random: Random, constants: Mapping[str, Tensor], rows: int) -> Rows:
        return random.standard_normal((rows, self.dim)), np.zeros((rows, 0))

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        x = params["x"]
        wave = x[1:] - torch.cos(x[:-1]) * math.pi
        return (inputs[:, 0] / (torch.sqrt(torch.square(x).sum()) + 1e-6)).sum() + (wave * inputs[:, 1:]).square().sum()


@dataclass(frozen=True)
class _Symmetric(Problem):
    """Half of the rows are normal, the other half their negatives."""

    dim: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.dim,)}

    def rows(self, random: Random, constants: Mapping[str, Tensor], rows: int) -> Rows:
        half = random.standard_normal((max(rows // 2, 1), self.dim))
        return np.concatenate([half, -half]), np.zeros((2 * len(half), 0))


@dataclass(frozen=True)
class SumOfQuadratics(_Symmetric):
    """``sum_r |x - d_r|^2 - |d_r|^2``; of all rows smallest at zero, of a minibatch elsewhere."""

    floor = None

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return (params["x"] - inputs).square().sum() - inputs.square().sum() + 1e-12


@dataclass(frozen=True)
class ProjectionQuadratic(_Symmetric):
    """``sum_ri (x_i d_ri)^2``."""

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return (params["x"] * inputs).square().sum()


@dataclass(frozen=True)
class _Classifier(Problem):
    """Two classes: logistic loss of the first logit, plus 1e-3 times the mean over tensors of their squared norms."""

    def init(self, random: Random) -> dict[str, Any]:
        return {name: random.standard_normal(shape) * 1.2 / math.sqrt(shape[0]) for name, shape in self.shapes.items()}

    @abstractmethod
    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """``[rows, 2]``."""

    def objective(self, params: Params, constants: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        loss = functional.binary_cross_entropy_with_logits(self.logits(params, inputs)[:, 0], targets)
        return loss + 1e-3 * torch.stack([torch.square(value).sum() for value in params.values()]).mean()


@dataclass(frozen=True)
class SparseSoftmaxRegression(_Classifier):
    """Sum of the embeddings of five bits, then a linear layer; the label is their parity, wrong one time in four."""

    features: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embedding": (2, self.features), "w0": (self.features, 2), "b0": (2,)}

    def rows(self, random: Random, constants: Mapping[str, Tensor], rows: int) -> Rows:
        bits = random.integers(2, size=(rows, 5))
        return bits, (bits.sum(axis=1) + (random.random(rows) < 0.25)) % 2

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        embedded = functional.embedding(inputs.to(torch.int64), params["embedding"]).sum(dim=1)
        return dense(params, "", embedded, torch.relu)


@dataclass(frozen=True)
class FullyConnected(_Classifier):
    """A perceptron; the labels say where the first output of a random relu network of six layers of 20 is positive."""

    features: int
    hidden: tuple[int, ...]
    activation: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise((self.features, *self.hidden, 2))):
            shapes |= {f"w{layer}": (fan_in, fan_out), f"b{layer}": (fan_out,)}
        return shapes

    def constants(self, random: Random) -> dict[str, Any]:
        scale, sizes = math.sqrt(2 / self.features), (self.features, *[20] * 6)
        return {
            f"teacher{n}": random.standard_normal((a, b)) * scale for n, (a, b) in enumerate(itertools.pairwise(sizes))
        }

    def rows(self, random: Random, constants: Mapping[str, Tensor], rows: int) -> Rows:
        x = random.standard_normal((rows, self.features))
        y = x
        for weight in constants.values():
            y = np.maximum(y @ weight.double().numpy(), 0)
        return x, y[:, 0] > 0

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        return dense(params, "", inputs, activation(self.activation))


PROBLEMS: dict[str, type[Problem]] = {
    kind.__name__: kind
    for kind in (
        Quadratic,
        Bowl,
        SparseSoftmaxRegression,
        Optimization,
        FullyConnected,
        Norm,
        DependencyChain,
        OutwardSnake,
        MinMaxWell,
        SumOfQuadratics,
        ProjectionQuadratic,
    )
}
