"""mnist, vae and super_resolution."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lopt.tasks.image_tasks import ImageData
from lopt.tasks.pieces import Params
from lopt.tasks.sampled import with_noise
from lopt.tasks.scripts.script import Script, dropped, noise_of, scheduled
from lopt.tasks.task import Batch, NoisyBatch, SplitName


@dataclass(frozen=True, kw_only=True)
class Mnist(Script):
    """mnist's network with half its channels: two 3 x 3 convolutions, largest of 2 x 2, two dense layers, dropout.

    Adadelta of rate 1, times .7 after every epoch.
    """

    family: ClassVar[str] = "mnist"
    steps: ClassVar[tuple[int, ...]] = (468,)

    data: ImageData

    def build(self) -> nn.Module:
        return _Convolutions(self.data.num_classes)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        shape = (self.data.batch_size, FLAT + 128) if split == "train" else None
        for step, batch in enumerate(self.data.batches(seed, split, start), start):
            yield with_noise(batch, shape, seed, split, step)

    def loss(self, params: Params, batch: Batch | NoisyBatch) -> Tensor:
        images = (batch.inputs - 0.25) / 0.25  # about mean 0 and deviation 1
        return functional.cross_entropy(self.run(params, images, noise_of(batch)), batch.targets)

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        optimizer = torch.optim.Adadelta(params.values(), lr=1.0)
        epoch = len(self.data.rows("train").targets) // self.data.batch_size
        return scheduled(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, epoch, 0.7))


FLAT = 32 * 12 * 12  # numbers after the convolutions of images of 28 x 28 pixels


class _Convolutions(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.dense0, self.dense1 = nn.Linear(FLAT, 128), nn.Linear(128, classes)

    def forward(self, images: Tensor, noise: Tensor | None) -> Tensor:
        first, second = (None, None) if noise is None else torch.split(noise, [FLAT, 128], dim=1)
        x = functional.max_pool2d(torch.relu(self.conv1(torch.relu(self.conv0(images)))), 2)
        x = dropped(torch.relu(self.dense0(dropped(x.flatten(1), first, 0.25))), second, 0.5)
        logits: Tensor = self.dense1(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class VariationalAutoencoder(Script):
    """vae: 784 - 400 - 20 - 400 - 784; cross-entropy of pixels and divergence of the code, each the sum of an image.

    Pixels are 0 up to one half and 1 above.
    """

    family: ClassVar[str] = "vae"
    steps: ClassVar[tuple[int, ...]] = (500,)

    data: ImageData

    def build(self) -> nn.Module:
        return _VariationalAutoencoder(self.data.size)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        for step, batch in enumerate(self.data.batches(seed, split, start), start):
            yield with_noise(batch, (self.data.batch_size, 20), seed, split, step)

    def loss(self, params: Params, batch: NoisyBatch) -> Tensor:
        images = (batch.inputs.flatten(1) > 0.5).to(batch.inputs.dtype)
        logits, mean, log_variance = self.run(params, images, batch.noise)
        pixels = functional.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(dim=1)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        loss: Tensor = (pixels + divergence).mean()
        return loss


class _VariationalAutoencoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(size, 400)
        self.mean, self.log_variance = nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoder0, self.decoder1 = nn.Linear(20, 400), nn.Linear(400, size)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.encoder(images))
        mean, log_variance = self.mean(x), self.log_variance(x)
        code = mean + noise * (log_variance / 2).exp()
        return self.decoder1(torch.relu(self.decoder0(code))), mean, log_variance


@dataclass(frozen=True, kw_only=True)
class SuperResolution(Script):
    """super_resolution: four convolutions make an image of twice the height and width from the means of 2 x 2 pixels;
    mean squared error times 1,000."""

    family: ClassVar[str] = "super_resolution"
    steps: ClassVar[tuple[int, ...]] = (400,)

    data: ImageData

    def build(self) -> nn.Module:
        return _SuperResolution()

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        for images, _ in self.data.batches(seed, split, start):
            grey = images.mean(dim=1, keepdim=True)
            yield Batch(functional.avg_pool2d(grey, 2), grey)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 1e3 * functional.mse_loss(self.run(params, batch.inputs), batch.targets)


class _SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 32, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        for conv in (self.conv0, self.conv1, self.conv2, self.conv3):
            if conv.weight.device.type != "meta":  # which has no QR decomposition
                nn.init.orthogonal_(conv.weight, 1.0 if conv is self.conv3 else math.sqrt(2))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for conv in (self.conv0, self.conv1, self.conv2):
            x = torch.relu(conv(x))
        return functional.pixel_shuffle(self.conv3(x), 2)
