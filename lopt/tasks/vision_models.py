"""Classifiers of images as people write them, small: a vision transformer and a residual network of convolutions.

Source: A. Dosovitskiy et al., arXiv:2010.11929 (ViT, here with the mean of all places for a class token); K. He et al.,
arXiv:1512.03385 (ResNet, in its form for small images).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks.image_tasks import ImageData, centred
from lopt.tasks.language_models import SMALL, Block
from lopt.tasks.module_tasks import ModuleTask
from lopt.tasks.pieces import Params
from lopt.tasks.task import Batch, SplitName


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(ModuleTask):
    """A module that makes logits ``[rows, classes]`` of images ``[rows, channels, height, width]`` from -1 to 1."""

    data: ImageData

    @property
    def loss_floor(self) -> float:
        return 0.0

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return self.data.batches(seed, split, start)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.run(params, centred(True, batch.inputs)), batch.targets)


@dataclass(frozen=True, kw_only=True)
class ViT(ImageClassifier):
    """A vision transformer: squares of ``patch x patch`` pixels, embedded, with positions; blocks; their mean; a head.

    Matrices start as torch's linear layers do, the head at 0 and positions normal with deviation .02, as the authors
    have it.
    """

    family: ClassVar[str] = "vit"

    patch: int
    layers: int = 3
    width: int = 64
    heads: int = 4

    @property
    def name(self) -> str:
        return f"vit-{self.layers}x{self.width}-{self.data.label}"

    def build(self) -> nn.Module:
        return _ViT(self)


class _ViT(nn.Module):
    def __init__(self, task: ViT) -> None:
        super().__init__()
        channels, height, width = task.data.shape
        places = (height // task.patch) * (width // task.patch)
        self.embedding = nn.Conv2d(channels, task.width, task.patch, stride=task.patch)
        self.positions = nn.Embedding(places, task.width)
        self.blocks = nn.ModuleList(Block(task.width, task.heads, causal=False) for _ in range(task.layers))
        self.norm = nn.LayerNorm(task.width)
        self.head = nn.Linear(task.width, task.data.num_classes)
        nn.init.normal_(self.positions.weight, std=SMALL)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images).flatten(2).transpose(1, 2) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


@dataclass(frozen=True, kw_only=True)
class ResidualNet(ImageClassifier):
    """A ResNet for small images: a 3 x 3 convolution, stages of basic blocks, the mean of all pixels, a head.

    A block is ``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`` with batch normalisation; every stage but the
    first halves height and width. The shortcut is a 1 x 1 convolution with a norm where shapes change. Batch
    normalisation uses the statistics of the minibatch, also where a loss is recorded.

    Args:
        channels: of every stage; the first convolution has those of the first.
        blocks: of every stage.
    """

    family: ClassVar[str] = "resnet"

    channels: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1

    @property
    def name(self) -> str:
        return f"resnet{2 + 2 * self.blocks * len(self.channels)}-{self.channels[-1]}-{self.data.label}"

    def build(self) -> nn.Module:
        return _ResidualNet(self)


class _ResidualNet(nn.Module):
    def __init__(self, task: ResidualNet) -> None:
        super().__init__()
        inputs = task.channels[0]
        self.first = nn.Conv2d(task.data.shape[0], inputs, 3, padding=1, bias=False)
        self.norm = _batch_norm(inputs)
        self.blocks = nn.ModuleList()
        for stage, outputs in enumerate(task.channels):
            for number in range(task.blocks):
                self.blocks.append(_BasicBlock(inputs, outputs, 2 if stage and not number else 1))
                inputs = outputs
        self.head = nn.Linear(inputs, task.data.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(images)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm0, self.norm1 = _batch_norm(outputs), _batch_norm(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), _batch_norm(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(torch.relu(self.norm0(self.conv0(x)))))
        return torch.relu(self.shortcut(x) + y)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Without running statistics: a loss is a function of parameters and minibatch."""
    return nn.BatchNorm2d(channels, track_running_stats=False)
