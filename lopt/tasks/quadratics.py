"""Random quadratic forms with many kinds of spectra.

Source: TaskSet (arXiv:2002.11887), family quadratic.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.generators import log_uniform
from lopt.tasks.pieces import ZEROS, Layout, Params, Random, Weights, flip, log_int, pick
from lopt.tasks.sampled import SampledTask
from lopt.tasks.seeds import generator
from lopt.tasks.task import Batch, NoisyBatch, SplitName


class Distribution(NamedTuple):
    """How numbers are drawn: normal (mean a, deviation b) or uniform (a to b), each by itself; or, for matrices only,
    with eigenvalues from a to b, evenly spaced (linspace_eigen) or in the logarithm (logspace_eigen), and a random
    orthogonal basis."""

    kind: Literal["normal", "uniform", "linspace_eigen", "logspace_eigen"]
    a: float
    b: float

    def draw(self, random: Random, shape: tuple[int, ...]) -> Any:
        """Numbers of this shape."""
        if self.kind == "normal":
            return self.a + self.b * random.standard_normal(shape)
        if self.kind == "uniform":
            return random.uniform(self.a, self.b, shape)
        log = self.kind == "logspace_eigen"
        values = np.geomspace(self.a, self.b, shape[0]) if log else np.linspace(self.a, self.b, shape[0])
        q, r = np.linalg.qr(random.uniform(-1.0, 1.0, shape))
        q = q * np.sign(np.diag(r))
        return (q * values) @ q.T


@dataclass(frozen=True, kw_only=True)
class QuadraticForm(SampledTask):
    """A quadratic form: ``scale |A x|^2`` or ``scale log(|A x|^2 + 1e-8)``, with another A + E in every step.

    Args:
        seed: of A.
        dim: length of x.
        matrix, noise: distributions of A and of E; None for E = 0.
        start: distribution of the initial x.
    """

    family: ClassVar[str] = "quadratic"

    seed: int
    dim: int
    matrix: Distribution
    start: Distribution
    noise: Distribution | None = None
    log: bool = False
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"quadratic-{self.dim}-{self.matrix.kind}{'-log' if self.log else ''}{'-noise' if self.noise else ''}"

    @cached_property
    def layout(self) -> Layout:
        return {"x": Weights((self.dim,), ZEROS)}

    @cached_property
    def a(self) -> Tensor:
        """``A`` [dim, dim]."""
        return _float32(self.matrix.draw(generator(self.seed, "matrix"), (self.dim, self.dim)))

    @property
    def loss_floor(self) -> float:
        return self.scale * math.log(1e-8) if self.log else 0.0

    @property
    def batch_work(self) -> float:
        """Noise with given eigenvalues takes an orthogonal basis and two products in float64."""
        noise = self.noise
        return 5.0 * self.dim**3 if noise is not None and noise.kind.endswith("eigen") else 0.0

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"x": _float32(self.start.draw(generator(seed, "init"), (self.dim,)))}

    def loss(self, params: Params, batch: Any) -> Tensor:
        matrix = self.on(params["x"].device, "a")
        matrix = matrix if self.noise is None else matrix + batch.noise
        value = torch.square(matrix @ params["x"]).sum()
        return self.scale * (torch.log(value + 1e-8) if self.log else value)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        nothing = torch.zeros(1, 0)
        for step in itertools.count(start):
            if self.noise is None:
                yield Batch(nothing, nothing)
            else:
                random = generator(seed, "noise", split, step)
                yield NoisyBatch(nothing, nothing, _float32(self.noise.draw(random, (self.dim, self.dim))))


def sample_quadratic(random: Random, names: tuple[str, ...]) -> QuadraticForm:
    """2 to 3,000 dimensions; half of them with noise; losses scaled by 1e-5 to 1e3."""
    return QuadraticForm(
        matrix=_sample_matrix(random),
        start=_sample_vector(random),
        log=flip(random),
        dim=log_int(random, 2, 3000),
        seed=int(random.integers(2**31)),
        scale=log_uniform(random, 1e-5, 1e3),
        noise=_sample_noise(random) if flip(random) else None,
    )


KINDS = ("normal", "uniform", "linspace_eigen", "logspace_eigen")


def _sample_matrix(random: Random) -> Distribution:
    kind = pick(random, KINDS)
    if kind == "normal":
        return Distribution(kind, random.standard_normal(), random.uniform(0, 2))
    low = {"uniform": random.uniform(-3, 1), "linspace_eigen": random.uniform(0.01, 50), "logspace_eigen": 1e-5}[kind]
    if kind == "logspace_eigen":
        return Distribution(kind, low, random.uniform(1, 1000))
    return Distribution(kind, low, low + random.uniform(0, 5 if kind == "uniform" else 100))


def _sample_noise(random: Random) -> Distribution:
    kind = pick(random, KINDS)
    if kind == "normal":
        return Distribution(kind, 0.05 * random.standard_normal(), random.uniform(0, 0.05))
    low = {"uniform": random.uniform(-0.15, 0.05), "linspace_eigen": random.uniform(0.01, 2), "logspace_eigen": 1e-5}[
        kind
    ]
    if kind == "logspace_eigen":
        return Distribution(kind, low, random.uniform(1, 10))
    return Distribution(kind, low, low + random.uniform(0, 0.25 if kind == "uniform" else 10))


def _sample_vector(random: Random) -> Distribution:
    if flip(random):
        return Distribution("normal", random.standard_normal(), random.uniform(0, 2))
    low = random.uniform(-5, 2.5)
    return Distribution("uniform", low, low + random.uniform(0, 5))


def _float32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
