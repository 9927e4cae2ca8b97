"""Normalising flows on images: real NVP and masked autoregressive flow.

A flow of ``k`` steps turns an image x into z of the same size; its loss is, in nats per image::

    -log p(x) = |z|^2 / 2 + D log(2 pi) / 2 + sum of all log scales
    one step:   z_i = (x_i - shift_i) exp(-log_scale_i),   (shift, log_scale) = network(what step and i may see)

Real NVP: the second half of x sees the first half, which stays. Masked autoregressive: x_i sees x_1 ... x_{i-1}.
Between steps the pixels change places by a fixed permutation. As in TaskSet, images get noise of deviation .01, without
which densities have no bound. Unlike there, shifts and log scales are squashed, ``y = x / (1 + |x| / bound)``, with
bounds 100 and 5: otherwise some wide initial weights give losses or gradients that are infinite.

Source: TaskSet (arXiv:2002.11887), families nvp and maf; arXiv:1605.08803; arXiv:1705.07057; arXiv:1502.03509 (masks).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopt.tasks.image_tasks import ImageTask, sample_images
from lopt.tasks.pieces import (
    Initialiser,
    Layout,
    Params,
    Random,
    activation,
    dense,
    dense_layout,
    log_int,
    sample_activation,
    sample_initialiser,
)
from lopt.tasks.seeds import generator
from lopt.tasks.task import NoisyBatch

NOISE = 0.01
SHIFT, LOG_SCALE = 100.0, 5.0  # bounds


@dataclass(frozen=True, kw_only=True)
class Flow(ImageTask):
    """What both flows share: ``steps`` networks with hidden layers of these widths."""

    hidden: tuple[int, ...]
    steps: int
    activation: str
    initialiser: Initialiser

    @property
    def name(self) -> str:
        return f"{self.family}-{self.data.label}-{self.steps}x{'-'.join(map(str, self.hidden))}"

    @property
    def loss_floor(self) -> float:
        """In the mean over the noise: no density is nearer to noisy images than to the noise itself, whose entropy
        this is."""
        return self.data.size * (math.log(2 * math.pi * math.e) / 2 + math.log(NOISE))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.data.batch_size, self.data.size)

    @cached_property
    def permutations(self) -> list[Tensor]:
        """Where the pixels go between steps."""
        size = self.data.size
        return [torch.from_numpy(generator(step, "permutation").permutation(size)) for step in range(self.steps - 1)]

    def step(self, params: Params, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` [rows, D] and the sum of log scales [rows] of one step."""
        raise NotImplementedError

    def log_density(self, params: Params, x: Tensor) -> Tensor:
        """``log p(x)`` [rows] of ``x`` [rows, D]."""
        total = torch.full_like(x[:, 0], -x.shape[1] * math.log(2 * math.pi) / 2)
        for number in range(self.steps):
            if number:
                x = x[:, self.on(x.device, "permutations")[number - 1]]
            x, log_scale = self.step(params, number, x)
            total = total - log_scale
        return total - x.square().sum(dim=1) / 2

    def loss(self, params: Params, batch: NoisyBatch) -> Tensor:
        return -self.log_density(params, batch.inputs.flatten(1) + NOISE * batch.noise).mean()


@dataclass(frozen=True, kw_only=True)
class RealNVP(Flow):
    """A real NVP flow of images: coupling layers."""

    family: ClassVar[str] = "nvp"

    @cached_property
    def layout(self) -> Layout:
        kept = self.data.size // 2
        sizes = (kept, *self.hidden, 2 * (self.data.size - kept))
        return _networks(self.steps, sizes, self.initialiser)

    def step(self, params: Params, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.tensor_split([x.shape[1] // 2], dim=1)
        output = dense(params, f"step{number}.", kept, activation(self.activation))
        shift, log_scale = shift_and_log_scale(output)
        return torch.cat([kept, (moved - shift) * torch.exp(-log_scale)], dim=1), log_scale.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class MAF(Flow):
    """A masked autoregressive flow of images.

    Its networks are dense layers whose weights are masked so that output i depends on inputs before i only.
    """

    family: ClassVar[str] = "maf"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of a network's layers."""
        return (self.data.size, *self.hidden, 2 * self.data.size)

    @cached_property
    def layout(self) -> Layout:
        return _networks(self.steps, self.sizes, self.initialiser)

    @cached_property
    def masks(self) -> list[Tensor]:
        """Per layer ``[in, out]``: 1 where an output may see an input. Hidden units see the first 1 to D - 1 inputs."""
        inputs = torch.arange(1, self.data.size + 1)
        seen = [inputs, *(1 + torch.arange(width) * (self.data.size - 1) // width for width in self.hidden)]
        masks = [(after >= before[:, None]).float() for before, after in pairwise(seen)]
        return [*masks, (inputs.repeat(2) > seen[-1][:, None]).float()]

    def step(self, params: Params, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        masked: dict[str, Tensor] = {}
        for layer, mask in enumerate(self.on(x.device, "masks")):
            masked[f"w{layer}"] = params[f"step{number}.w{layer}"] * mask
            masked[f"b{layer}"] = params[f"step{number}.b{layer}"]
        shift, log_scale = shift_and_log_scale(dense(masked, "", x, activation(self.activation)))
        return (x - shift) * torch.exp(-log_scale), log_scale.sum(dim=1)


def shift_and_log_scale(output: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a network's output ``[rows, 2 D]``, squashed."""
    shift, log_scale = output.chunk(2, dim=1)
    return shift / (1 + shift.abs() / SHIFT), log_scale / (1 + log_scale.abs() / LOG_SCALE)


def sample_nvp(random: Random, names: tuple[str, ...]) -> RealNVP:
    """One to four steps, networks with one or two hidden layers of 16 to 128."""
    return RealNVP(**_flow(random, names))


def sample_maf(random: Random, names: tuple[str, ...]) -> MAF:
    """As :func:`sample_nvp`."""
    return MAF(**_flow(random, names))


def _flow(random: Random, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "activation": sample_activation(random),
        "initialiser": sample_initialiser(random),
        "data": sample_images(random, names, ("images", "tables")),
        "hidden": tuple(log_int(random, 16, 128) for _ in range(random.integers(1, 3))),
        "steps": int(random.integers(1, 5)),
    }


def _networks(steps: int, sizes: tuple[int, ...], initialiser: Initialiser) -> Layout:
    layout: Layout = {}
    for step in range(steps):
        layout |= dense_layout(f"step{step}.", sizes, initialiser)
    return layout
