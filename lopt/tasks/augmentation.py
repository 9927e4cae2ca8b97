"""Random changes of images: crops, mirror images, and of colour images brightness, saturation, hue and contrast.

Source: TaskSet (arXiv:2002.11887), whose choices these are.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.generators import log_uniform
from lopt.tasks.pieces import Random, flip, pick

#: Red, green and blue to luminance and two differences of colour (YIQ), in which a turn changes the hue.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass(frozen=True)
class Augmentation:
    """How much images are changed.

    Args:
        crop: pixels taken off height and width, at random sides.
        flip_left_right, flip_up_down: mirror half of the images.
        colour: change the colours of colour images by what follows.
        brightness: largest amount added; hue: largest part of a full turn.
        saturation, contrast: factors are uniform from 1 minus this to 1 plus this.
    """

    crop: int = 0
    flip_left_right: bool = False
    flip_up_down: bool = False
    colour: bool = False
    brightness: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    contrast: float = 0.0


def sample(random: Random) -> Augmentation:
    """TaskSet's distribution."""
    return Augmentation(
        crop=pick(random, [0, 0, 0, 1, 2]),
        flip_left_right=flip(random),
        flip_up_down=flip(random),
        colour=flip(random),
        brightness=log_uniform(random, 0.001, 64 / 255),
        saturation=log_uniform(random, 0.01, 1.0),
        hue=log_uniform(random, 0.01, 0.5),
        contrast=log_uniform(random, 0.01, 1.0),
    )


def apply(how: Augmentation, random: Random, images: Tensor) -> Tensor:
    """Changed images ``[rows, channels, height - crop, width - crop]``, every row by its own random numbers."""
    rows, channels, height, width = images.shape
    if how.crop:
        down, across = (torch.from_numpy(random.integers(how.crop + 1, size=rows)) for _ in range(2))
        y = down[:, None] + torch.arange(height - how.crop)
        x = across[:, None] + torch.arange(width - how.crop)
        images = images[torch.arange(rows)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    for wanted, dim in ((how.flip_left_right, 3), (how.flip_up_down, 2)):
        if wanted:
            mirrored = torch.from_numpy(random.random(rows) < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(dim), images)
    return _colours(how, random, images) if how.colour and channels == 3 else images


def _colours(how: Augmentation, random: Random, images: Tensor) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        values = random.uniform(low, high, len(images)).astype(np.float32)
        return torch.from_numpy(values)[:, None, None, None]

    images = images + uniform(-how.brightness, how.brightness)
    luminance, *chroma = torch.einsum("ij,rjhw->irhw", _YIQ, images)
    factor, angle = uniform(1 - how.saturation, 1 + how.saturation)[:, 0], uniform(-how.hue, how.hue)[:, 0]
    cos, sin = torch.cos(2 * math.pi * angle) * factor, torch.sin(2 * math.pi * angle) * factor
    turned = torch.stack([luminance, cos * chroma[0] - sin * chroma[1], sin * chroma[0] + cos * chroma[1]])
    images = torch.einsum("ij,jrhw->rihw", torch.linalg.inv(_YIQ), turned)
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (mean + (images - mean) * uniform(1 - how.contrast, 1 + how.contrast)).clamp(0.0, 1.0)
