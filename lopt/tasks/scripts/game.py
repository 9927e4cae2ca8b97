"""dcgan, a game of two networks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks.image_tasks import ImageData
from lopt.tasks.language_models import SMALL
from lopt.tasks.pieces import Params
from lopt.tasks.sampled import with_noise
from lopt.tasks.scripts.script import Script
from lopt.tasks.seeds import generator
from lopt.tasks.task import SPLITS, Batch, NoisyBatch, SplitName


@dataclass(frozen=True, kw_only=True)
class Dcgan(Script):
    """dcgan: a generator and a discriminator of convolutions, each with a loss of its own.

    With parameters g and d, real images x and fakes G(z), the gradient with respect to d is that of
    ``-mean log D(x) - mean log(1 - D(G(z)))`` and that with respect to g that of ``-mean log D(G(z))``; minibatches of
    train have the sum of both as their loss. Where losses are recorded, a minibatch is a whole split, and its loss the
    Frechet distance between features of its images and of as many fakes, ``|m - n|^2 + tr(C + E - 2 (C E)^1/2)`` with
    their means m, n and covariances C, E. Features are those of a fixed random network.

    Adam of rate 2e-4 with betas .5 and .999.
    """

    family: ClassVar[str] = "dcgan"
    steps: ClassVar[tuple[int, ...]] = (240,)
    lr: ClassVar[float] = 2e-4
    betas: ClassVar[tuple[float, float]] = (0.5, 0.999)

    data: ImageData

    @property
    def hidden_weights(self) -> frozenset[str]:
        return frozenset({"generator.1.weight", "discriminator.1.weight"})

    @property
    def validated(self) -> bool:
        return False

    def build(self) -> nn.Module:
        return _Game()

    @property
    def splits(self) -> dict[SplitName, Batch]:
        """What is recorded: up to 1,200 images of a split, and noise for as many fakes."""
        return {split: _real_and_noise(self.data, split) for split in SPLITS}

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[NoisyBatch]:
        for step, batch in enumerate(self.data.batches(seed, split, start), start):
            noisy = with_noise(batch, (self.data.batch_size, LATENT), seed, split, step)
            assert isinstance(noisy, NoisyBatch)
            yield noisy._replace(inputs=2 * noisy.inputs - 1)

    def loss(self, params: Params, batch: Batch | NoisyBatch) -> Tensor:
        if not isinstance(batch, NoisyBatch):
            fakes = self.run(params, "fake", batch.targets)
            return frechet(features(batch.inputs), features(fakes))
        still = {name: value.detach() for name, value in params.items()}
        own, other = (
            {name: (params if name.startswith(part) else still)[name] for name in params} for part in ("d", "g")
        )
        fakes = self.run(params, "fake", batch.noise)
        real, fake = (self.run(own, "judge", images) for images in (batch.inputs, fakes.detach()))
        fooled = self.run(other, "judge", fakes)
        return (
            functional.softplus(-real).mean() + functional.softplus(fake).mean() + functional.softplus(-fooled).mean()
        )


LATENT = 32


class _Game(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.ModuleList(
            [
                nn.ConvTranspose2d(LATENT, 64, 7, bias=False),
                nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
                nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False),
            ]
        )
        self.discriminator = nn.ModuleList(
            [
                nn.Conv2d(1, 32, 4, 2, 1, bias=False),
                nn.Conv2d(32, 64, 4, 2, 1, bias=False),
                nn.Conv2d(64, 1, 7, bias=False),
            ]
        )
        self.generator_norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for width in (64, 32))
        self.discriminator_norm = nn.BatchNorm2d(64, track_running_stats=False)
        for param in self.parameters():
            if param.ndim > 1:
                nn.init.normal_(param, std=SMALL)
        for norm in (*self.generator_norms, self.discriminator_norm):
            nn.init.normal_(norm.weight, 1.0, SMALL)

    def forward(self, what: str, x: Tensor) -> Tensor:
        """Images ``[rows, 1, 28, 28]`` from -1 to 1 of noise ``[rows, LATENT]``, or logits ``[rows]`` of images."""
        if what == "fake":
            x = x[:, :, None, None]
            for layer, norm in zip(self.generator, self.generator_norms, strict=False):
                x = torch.relu(norm(layer(x)))
            return torch.tanh(self.generator[2](x))
        first, second, third = self.discriminator
        x = functional.leaky_relu(first(x), 0.2)
        x = functional.leaky_relu(self.discriminator_norm(second(x)), 0.2)
        logits: Tensor = third(x).flatten()
        return logits


@lru_cache(maxsize=8)
def _real_and_noise(data: ImageData, split: SplitName) -> Batch:
    images = data.rows(split).inputs[:1200]
    images = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
    noise = generator(0, "dcgan", split).standard_normal((len(images), LATENT), dtype=np.float32)
    return Batch(2 * images - 1, torch.from_numpy(noise))


@lru_cache(maxsize=1)
def _random_filters() -> tuple[Tensor, Tensor]:
    random = generator(0, "features")
    shapes = (32, 1, 5, 5), (64, 32, 3, 3)
    first, second = (random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:])) for shape in shapes)
    return torch.from_numpy(first).float(), torch.from_numpy(second).float()


def features(images: Tensor) -> Tensor:
    """``[rows, 64]`` of images ``[rows, 1, height, width]``: two convolutions with random filters and ReLU, means."""
    first, second = _random_filters()
    x = torch.relu(functional.conv2d(images, first.to(images), stride=2))
    return torch.relu(functional.conv2d(x, second.to(images), stride=2)).mean(dim=(2, 3))


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Frechet distance of two normal distributions with the means and covariances of rows ``[n, F]`` and ``[m, F]``.

    Source: M. Heusel et al., arXiv:1706.08500.
    """
    a, b = a.double(), b.double()
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ second @ root).clamp(0).sqrt().sum()
    distance: Tensor = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * trace
    return distance
