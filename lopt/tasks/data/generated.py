"""Images and tables made of random numbers: the same bytes on every machine.

A data set is a name and the number of a variant, which draws sizes, classes, colours and noise. Images are rounded to
bytes, so that a machine's mathematical library does not show.
"""

import math
from typing import Any

import numpy as np
import torch

from lopt.tasks import generators
from lopt.tasks.generators import Array, log_uniform
from lopt.tasks.seeds import generator
from lopt.tasks.task import Batch, SplitName

Random = np.random.Generator
Shape = tuple[int, int, int]

#: Shares of the rows.
SHARES: dict[SplitName, float] = {"train": 0.7, "inner_valid": 0.1, "outer_valid": 0.1, "test": 0.1}
ROWS = 4000


def templates(random: Random, labels: Array, shape: Shape, classes: int) -> Array:
    """Every class is a smooth random picture; its images are moved, of other contrast, and noisy."""
    channels, side, _ = shape
    waves = random.integers(-3, 4, (classes, channels, 6, 2)) * (2 * math.pi / side)
    phases = random.uniform(0, 2 * math.pi, (classes, channels, 6, 1, 1))
    grid = np.arange(side)
    angle = waves[..., 0, None, None] * grid[:, None] + waves[..., 1, None, None] * grid + phases
    pictures = np.cos(angle).mean(axis=2)
    noise, reach = log_uniform(random, 0.03, 0.6), int(random.integers(0, side // 3))
    y, x = (grid + random.integers(-reach, reach + 1, (len(labels), 1)) for _ in range(2))
    channel = np.arange(channels)[:, None, None]
    moved = pictures[labels[:, None, None, None], channel, (y % side)[:, None, :, None], (x % side)[:, None, None, :]]
    contrast = random.uniform(0.5, 1.2, (len(labels), 1, 1, 1))
    return np.asarray(0.5 + 0.5 * contrast * moved + 0.5 * noise * random.standard_normal(moved.shape))


def textures(random: Random, labels: Array, shape: Shape, classes: int) -> Array:
    """Every class is two waves of some frequency and direction; phases differ between its images."""
    channels, side, _ = shape
    frequency = 2 * math.pi / side * random.uniform(1.0, side / 3, (classes, 2))
    direction = random.uniform(0, math.pi, (classes, 2))
    tint = random.uniform(0.3, 1.0, (classes, channels))
    noise = log_uniform(random, 0.05, 1.0)
    grid = np.arange(side)
    phase = random.uniform(0, 2 * math.pi, (len(labels), 2, 1, 1))
    kx, ky = (frequency * np.cos(direction))[labels], (frequency * np.sin(direction))[labels]
    waves = np.cos(kx[..., None, None] * grid + ky[..., None, None] * grid[:, None] + phase).mean(axis=1)
    images = 0.5 + 0.5 * tint[labels][:, :, None, None] * waves[:, None]
    return np.asarray(images + 0.25 * noise * random.standard_normal(images.shape))


def shapes(random: Random, labels: Array, shape: Shape, classes: int) -> Array:
    """A disc, square, ring, cross, triangle, bar, frame, half disc, pair of discs or chequerboard, by class.

    Place, size, angle and two colours differ between images of a class.
    """
    channels, side, _ = shape
    rows, turn = len(labels), random.uniform(0, math.pi)
    noise = log_uniform(random, 0.01, 0.4)
    size = side * random.uniform(0.2, 0.4, (rows, 1, 1))
    centre = side * random.uniform(0.35, 0.65, (2, rows, 1, 1))
    angle = random.uniform(-turn, turn, (rows, 1, 1))
    y, x = (np.arange(side)[:, None] - centre[0]) / size, (np.arange(side) - centre[1]) / size
    u, v = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    radius, largest, smallest = np.hypot(u, v), np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    insides = [
        radius < 1,
        largest < 0.85,
        abs(radius - 0.8) < 0.25,
        (smallest < 0.3) & (largest < 1),
        (v < 0.7) & (abs(u) < 0.5 * (v + 1)),
        (abs(u) < 0.3) & (abs(v) < 1.2),
        abs(largest - 0.8) < 0.2,
        (radius < 1) & (u > 0),
        np.hypot(abs(u) - 0.6, v) < 0.45,
        (largest < 1) & (np.floor(2 * u) + np.floor(2 * v)).astype(int) % 2 == 1,
    ]
    inside = np.stack(insides)[labels, np.arange(rows)][:, None]
    front, back = random.uniform(0.5, 1.0, (rows, channels, 1, 1)), random.uniform(0.0, 0.45, (rows, channels, 1, 1))
    images = np.where(inside, front, back)
    return np.asarray(images + 0.5 * noise * random.standard_normal(images.shape))


IMAGES: dict[str, Any] = {"templates": templates, "textures": textures, "shapes": shapes}
TABLES: dict[str, Any] = {
    "mixture": generators.mixture,
    "teacher": generators.teacher,
    "logistic": generators.logistic,
    "index": generators.index,
}


def describe(name: str, variant: int) -> tuple[Shape, int]:
    """Shape and number of classes of a variant: images of 8 to 20 pixels, tables of 4 to 32 columns."""
    random = generator(variant, "data", name, "sizes")
    classes = int(random.integers(2, 11))
    if name in TABLES:
        return (1, 1, int(random.integers(4, 33))), classes
    side = int(random.choice([8, 12, 16, 20]))
    return (int(random.choice([1, 3])), side, side), classes


def load(name: str, variant: int) -> dict[SplitName, Batch]:
    """The four splits of a variant."""
    shape, classes = describe(name, variant)
    random = generator(variant, "data", name, "rows")
    if name in IMAGES:
        labels = random.integers(classes, size=ROWS)
        values = np.round(255 * np.clip(IMAGES[name](random, labels, shape, classes), 0, 1)).astype(np.uint8)
    else:
        columns, targets = TABLES[name](random, ROWS, shape[2], classes)
        labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
        low, high = columns.min(axis=0), columns.max(axis=0)
        values = ((columns - low) / np.maximum(high - low, 1e-12)).astype(np.float32).reshape(-1, *shape)
    return cut(torch.from_numpy(values), torch.from_numpy(labels.astype(np.int64)))


def cut(inputs: torch.Tensor, targets: torch.Tensor) -> dict[SplitName, Batch]:
    """Rows that are in random order already, cut into splits by ``SHARES``."""
    ends = np.cumsum([round(share * len(targets)) for share in list(SHARES.values())[:-1]]).tolist()
    pairs = zip(torch.tensor_split(inputs, ends), torch.tensor_split(targets, ends), strict=True)
    return {split: Batch(*pair) for split, pair in zip(SHARES, pairs, strict=True)}
