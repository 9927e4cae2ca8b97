"""The problems of "Learned Optimizers that Scale and Generalize" with TaskSet's settings, plain or changed.

:class:`LosgTask` adds what is common to the problems of :mod:`lopt.tasks.losg_problems`: noise on gradients, gradients
that are mostly zero (sparse), parameters in other units (rescale), the logarithm of the objective (log).

Source: TaskSet (arXiv:2002.11887), family losg_tasks.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.generators import log_uniform
from lopt.tasks.losg_problems import (
    EPSILON,
    FUNCTIONS,
    PROBLEMS,
    Bowl,
    DependencyChain,
    FullyConnected,
    MinMaxWell,
    Norm,
    Optimization,
    OutwardSnake,
    Problem,
    ProjectionQuadratic,
    Quadratic,
    SparseSoftmaxRegression,
    SumOfQuadratics,
)
from lopt.tasks.pieces import Params, Random, flip, log_int, pick, sample_activation
from lopt.tasks.sampled import SampledTask, from_config
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.task import Batch, NoisyBatch, SplitName


@dataclass(frozen=True, kw_only=True)
class LosgTask(SampledTask):
    """A function of few parameters, perhaps with noisy or sparse gradients, rescaled or logged.

    Args:
        seed: of constants and rows.
        batch_size, samples: rows of a minibatch and of each split, for problems with data.
        gradient_noise: deviation of what is added to every gradient entry; the loss itself has no noise.
        zero_probability: share of gradient entries that are zero in a step (drawn anew every step).
        scale: the parameters are this times those of the problem.
        log: the loss is ``log(max(objective, 0) + eps) - log(eps)`` with ``eps = 1e-6`` (in TaskSet without the max).
    """

    family: ClassVar[str] = "losg_tasks"

    problem: Problem
    seed: int
    batch_size: int = 1
    samples: int = 1
    gradient_noise: float = 0.0
    zero_probability: float = 0.0
    scale: float = 1.0
    log: bool = False
    wrapper: Literal["none", "sparse", "rescale", "log"] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.problem, Mapping):  # from a config
            fields = dict(self.problem)
            name = fields.pop("type", None)
            if name not in PROBLEMS:
                raise ValueError(f"problem: expected one of {list(PROBLEMS)}, got {name!r}")
            object.__setattr__(self, "problem", from_config(PROBLEMS[name], fields))

    @property
    def config(self) -> dict[str, Any]:
        config = super().config
        return {**config, "problem": {"type": type(self.problem).__name__, **config["problem"]}}

    @property
    def name(self) -> str:
        settings = "-".join(str(value) for value in dataclasses.astuple(self.problem)[:1])  # type: ignore[call-overload]
        wrapper = "" if self.wrapper == "none" else f"{self.wrapper}-"
        return f"losg-{wrapper}{type(self.problem).__name__}-{settings}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.problem.shapes

    @property
    def loss_floor(self) -> float | None:
        floor = self.problem.floor
        return math.log(max(floor or 0.0, 0.0) + EPSILON) - math.log(EPSILON) if self.log else floor

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """What the problem draws once."""
        return {
            name: _float32(value) for name, value in self.problem.constants(generator(self.seed, "constants")).items()
        }

    def rows(self, split: SplitName) -> Batch:
        """Rows of a split, drawn like those of every other."""
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, Batch]:
        return {
            split: Batch(
                *map(_float32, self.problem.rows(generator(self.seed, "rows", split), self.constants, self.samples))
            )
            for split in ("train", "inner_valid", "outer_valid", "test")
        }

    def init(self, seed: int) -> dict[str, Tensor]:
        values = self.problem.init(generator(seed, "init"))
        return {name: _float32(value) * self.scale for name, value in values.items()}

    def loss(self, params: Params, batch: Any) -> Tensor:
        tilt: Tensor | float = 0.0
        if isinstance(batch, NoisyBatch):  # zero in value; in the gradient the noise
            kept, noise = (dict(self._split(row)) for row in batch.noise)
            tilt = sum(((params[name] - params[name].detach()) * noise[name]).sum() for name in params)
            params = {name: x.detach() + (x - x.detach()) * kept[name] for name, x in params.items()}
        inner = {name: value / self.scale for name, value in params.items()}
        constants = self.on(batch.inputs.device, "constants")
        value = self.problem.objective(inner, constants, batch.inputs, batch.targets)
        if self.log:
            value = torch.log(value.clamp_min(0.0) + EPSILON) - math.log(EPSILON)
        return value + tilt

    def _split(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A number for every parameter, as tensors of their shapes."""
        begin = 0
        for name, shape in self.problem.shapes.items():
            end = begin + math.prod(shape)
            yield name, flat[begin:end].reshape(shape)
            begin = end

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        rows, key = self.rows(split), minibatch_key(seed, split)
        for step in itertools.count(start):
            index = torch.from_numpy(minibatch_rows(key, step, self.batch_size, len(rows.inputs)))
            batch = Batch(rows.inputs[index], rows.targets[index])
            if not self.gradient_noise and not self.zero_probability:
                yield batch
                continue
            random = generator(seed, "noise", split, step)
            kept = random.random(self.num_params) >= self.zero_probability
            noise = kept * self.gradient_noise * random.standard_normal(self.num_params)
            yield NoisyBatch(*batch, _float32(np.stack([kept, noise])))


def sample_losg(random: Random, names: tuple[str, ...]) -> LosgTask:
    """One of 14 equally often: a problem with TaskSet's settings, or one of ten of them sparse, rescaled or logged."""
    kind = pick(random, [*SAMPLERS, "sparse_problems", "rescale_problems", "log_objective"])
    seed = int(random.integers(2**31))
    if kind in SAMPLERS:
        problem, fields = SAMPLERS[kind](random)
        return LosgTask(problem=problem, seed=seed, **fields)
    noise = _noise(random) if kind == "sparse_problems" else 0.0
    problem, fields = SAMPLERS[pick(random, [name for name in SAMPLERS if name != "sparse_softmax_regression"])](random)
    fields["gradient_noise"] = noise  # a wrapper replaces the problem's own noise
    if kind == "sparse_problems":
        fields |= {"wrapper": "sparse", "zero_probability": float(random.uniform(0.9, 0.99))}
    elif kind == "rescale_problems":
        fields |= {"wrapper": "rescale", "scale": log_uniform(random, 1e-3, 1e3)}
    else:
        fields |= {"wrapper": "log", "log": True}
    return LosgTask(problem=problem, seed=seed, **fields)


Sampled = tuple[Problem, dict[str, Any]]


def _noise(random: Random) -> float:
    return log_uniform(random, 0.01, 10.0) if flip(random) else 0.0


def _free(random: Random, problem: Problem) -> Sampled:
    """A problem without rows, half of the time with noise on its gradients."""
    return problem, {"gradient_noise": _noise(random)}


def _with_rows(random: Random, problem: Problem) -> Sampled:
    return problem, {"batch_size": log_int(random, 1, 200), "samples": log_int(random, 100, 20000)}


def _sparse_softmax(random: Random) -> Sampled:
    problem, fields = _free(random, SparseSoftmaxRegression(log_int(random, 2, 100)))
    return problem, {**fields, "batch_size": log_int(random, 1, 50), "samples": log_int(random, 1, 30)}


def _fully_connected(random: Random) -> Sampled:
    layers, same = int(random.integers(2, 6)), flip(random)
    widths = tuple(log_int(random, 4, 32) for _ in range(layers))
    problem = FullyConnected(log_int(random, 1, 16), widths[:1] * layers if same else widths, sample_activation(random))
    return problem, {"batch_size": log_int(random, 1, 200), "samples": log_int(random, 1, 30)}


def _bowl(random: Random) -> Sampled:
    return _free(random, Bowl(log_uniform(random, 0.01, 100), pick(random, [0.0, 0.0, math.pi / 4, math.pi / 3])))


def _norm(random: Random) -> Sampled:
    return Norm(log_int(random, 3, 1000), float(random.uniform(0.1, 5.0))), {}


SAMPLERS: dict[str, Callable[[Random], Sampled]] = {
    "quadratic": lambda random: _free(random, Quadratic(log_int(random, 10, 1000))),
    "bowl": _bowl,
    "sparse_softmax_regression": _sparse_softmax,
    "optimization_test_problems": lambda random: _free(random, Optimization(pick(random, list(FUNCTIONS)))),
    "fully_connected": _fully_connected,
    "norm": _norm,
    "dependency_chain": lambda random: _with_rows(random, DependencyChain(log_int(random, 3, 100))),
    "outward_snake": lambda random: _with_rows(random, OutwardSnake(log_int(random, 3, 100))),
    "min_max_well": lambda random: _free(random, MinMaxWell(log_int(random, 10, 1000))),
    "sum_of_quadratics": lambda random: _with_rows(random, SumOfQuadratics(log_int(random, 3, 100))),
    "projection_quadratic": lambda random: _with_rows(random, ProjectionQuadratic(log_int(random, 3, 100))),
}


def _float32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
