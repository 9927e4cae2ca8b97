"""The paper's residual network for colour images of 32 x 32, and images for it that need no download.

Source: arXiv:2009.11243, section 4.5 and appendix G; K. He et al., arXiv:1603.05027 (the blocks).
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.data import catalogue, generated
from lopt.tasks.image_tasks import ImageData, ImageTask, centred
from lopt.tasks.pieces import ONES, ZEROS, Initialiser, Layout, Params, Weights
from lopt.tasks.sampled import cross_entropy
from lopt.tasks.seeds import generator
from lopt.tasks.task import Batch, SplitName

HE = Initialiser("he_normal")

SHAPE, CLASSES, ROWS = (3, 32, 32), 10, 6000

#: Channels, bottleneck channels and stride of the blocks of the paper's network, and the channels before them.
BLOCKS = ((128, 32, 1), (128, 32, 2), (128, 64, 1), (128, 64, 2))
STEM = 64


@cache
def drawings() -> dict[SplitName, Batch]:
    """Ten kinds of figures of random place, size, angle and colours in 32 x 32 pixels: the same bytes everywhere."""
    random = generator(0, "resnet", "drawings")
    labels = random.integers(CLASSES, size=ROWS)
    pixels = np.round(255 * np.clip(generated.shapes(random, labels, SHAPE, CLASSES), 0, 1)).astype(np.uint8)
    return generated.cut(torch.from_numpy(pixels), torch.from_numpy(labels))


@dataclass(frozen=True)
class Drawings(ImageData):
    """The images of :func:`drawings`."""

    name: str = "drawings"

    @cached_property
    def description(self) -> catalogue.Description:
        return catalogue.Description(SHAPE, CLASSES, 1)

    def rows(self, split: SplitName) -> Batch:
        return drawings()[split]


@dataclass(frozen=True, kw_only=True)
class ResNet(ImageTask):
    """A classifier of images: a 7 x 7 convolution and largest values, both of stride 2, bottleneck blocks, the mean of
    every channel, a dense layer. With four blocks it has 14 layers of weights.

    A block is ``shortcut(y) + conv1(f(conv3(f(conv1(y)))))`` with ``y = f(x)`` and ``f`` batch normalisation and ReLU;
    the shortcut is ``x`` itself where the shapes agree, and otherwise a 1 x 1 convolution of ``y``. Batch normalisation
    uses the statistics of the minibatch, also where a loss is recorded.

    Args:
        blocks: channels, bottleneck channels and stride of each.
        stem: channels of the first convolution.
    """

    family: ClassVar[str] = "resnet"

    blocks: tuple[tuple[int, int, int], ...] = BLOCKS
    stem: int = STEM

    @property
    def name(self) -> str:
        return f"resnet{2 + 3 * len(self.blocks)}-{self.data.label}-{self.blocks[-1][0]}"

    @property
    def loss_floor(self) -> float:
        return 0.0

    @cached_property
    def layout(self) -> Layout:
        layout: Layout = {"stem.w": Weights((self.stem, self.data.shape[0], 7, 7), HE)}
        channels = self.stem
        for number, (outputs, narrow, stride) in enumerate(self.blocks):
            block, sizes = f"block{number}.", (channels, narrow, narrow, outputs)
            for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
                side = 3 if layer == 1 else 1
                layout |= _norm_layout(f"{block}norm{layer}.", fan_in)
                layout[f"{block}w{layer}"] = Weights((fan_out, fan_in, side, side), HE)
            if stride > 1 or channels != outputs:
                layout[f"{block}shortcut"] = Weights((outputs, channels, 1, 1), HE)
            channels = outputs
        top = {"w0": Weights((channels, self.data.num_classes), Initialiser("glorot_normal"))}
        return layout | _norm_layout("norm.", channels) | top | {"b0": Weights((self.data.num_classes,), ZEROS)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = functional.conv2d(centred(True, batch.inputs), params["stem.w"], stride=2, padding=3)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for number, (_, _, stride) in enumerate(self.blocks):
            block = f"block{number}."
            y = norm_relu(params, f"{block}norm0.", x)
            shortcut = params.get(f"{block}shortcut")
            x = x if shortcut is None else functional.conv2d(y, shortcut, stride=stride)
            y = functional.conv2d(y, params[f"{block}w0"])
            y = norm_relu(params, f"{block}norm1.", y)
            y = functional.conv2d(y, params[f"{block}w1"], stride=stride, padding=1)
            y = norm_relu(params, f"{block}norm2.", y)
            x = x + functional.conv2d(y, params[f"{block}w2"])
        x = norm_relu(params, "norm.", x).mean(dim=(2, 3))
        return cross_entropy(x @ params["w0"] + params["b0"], batch.targets)


def norm_relu(params: Params, prefix: str, x: Tensor) -> Tensor:
    """Batch normalisation of ``[rows, channels, height, width]`` over all but the channels, then ReLU."""
    centre = x - x.mean(dim=(0, 2, 3), keepdim=True)
    scale = torch.rsqrt(centre.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5)
    gain, bias = (params[f"{prefix}{name}"].reshape(-1, 1, 1) for name in ("gain", "bias"))
    return torch.relu(centre * scale * gain + bias)


def _norm_layout(prefix: str, channels: int) -> Layout:
    return {f"{prefix}gain": Weights((channels,), ONES), f"{prefix}bias": Weights((channels,), ZEROS)}
