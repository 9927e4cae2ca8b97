"""Images for tasks: which rows of which data set, in minibatches, with TaskSet's choices of batch size and changes."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lopt.tasks import augmentation
from lopt.tasks.augmentation import Augmentation
from lopt.tasks.data import catalogue
from lopt.tasks.pieces import Random, flip, log_int, pick
from lopt.tasks.sampled import SampledTask, with_noise
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.task import Batch, NoisyBatch, SplitName


@dataclass(frozen=True)
class ImageData:
    """Which rows of images (or of tables with columns from 0 to 1) a task sees.

    Args:
        name: of a data set of :mod:`lopt.tasks.data`.
        variant: which of the data sets of that name, for generated ones.
        batch_size: rows of a minibatch.
        train_share: share of the training rows that are used.
        just_train: all four splits are the training rows, so that there is nothing to generalise to.
        augmentation: random changes of every image, None for none.
    """

    name: str
    variant: int = 0
    batch_size: int = 32
    train_share: float = 1.0
    just_train: bool = False
    augmentation: Augmentation | None = None

    @cached_property
    def description(self) -> catalogue.Description:
        """Sizes, without reading anything for data sets that are generated."""
        return catalogue.describe(self.name, self.variant)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.description.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, after cropping."""
        channels, height, width = self.description.shape
        crop = 0 if self.augmentation is None else self.augmentation.crop
        return (channels, height - crop, width - crop) if height > 1 else (channels, height, width)

    @property
    def size(self) -> int:
        """Numbers in an image."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """The name, with the number of the variant where there are several."""
        return f"{self.name}-{self.variant}" if self.description.variants > 1 else self.name

    def rows(self, split: SplitName) -> Batch:
        """Images ``[rows, channels, height, width]``, bytes or from 0 to 1 and not augmented, and their labels.

        Raises:
            FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        """
        split = "train" if self.just_train else split
        rows = catalogue.load(self.name, self.variant)[split]
        if split == "train":
            used = max(1, round(self.train_share * len(rows.targets)))
            return Batch(rows.inputs[:used], rows.targets[:used])
        return rows

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        """Endless minibatches of images ``[batch_size, channels, height, width]`` from 0 to 1."""
        inputs, targets = self.rows(split)
        key = minibatch_key(seed, split)
        for step in itertools.count(start):
            index = torch.from_numpy(minibatch_rows(key, step, self.batch_size, len(targets)))
            images = inputs[index]
            images = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
            if self.augmentation is not None:
                images = augmentation.apply(self.augmentation, generator(seed, "augmentation", split, step), images)
            yield Batch(images, targets[index])


def sample_images(random: Random, names: tuple[str, ...], kinds: tuple[str, ...] = ("images",)) -> ImageData:
    """TaskSet's choices about image data, among the data sets ``names`` of these kinds.

    Batch size log-uniform, 8 to 512 for grey and 8 to 256 for colour images; a share of the training rows of 1/55 to
    all of them; one in ten (colour: one in five) only with training rows; three in ten augmented.

    Raises:
        ValueError: none of the names is of these kinds.
    """
    name = pick(random, catalogue.of_kind(names, kinds))
    variant = int(random.integers(catalogue.variants(name)))
    description = catalogue.describe(name, variant)
    colour = description.shape[0] == 3
    return ImageData(
        name=name,
        variant=variant,
        batch_size=log_int(random, 8, 256 if colour else 512),
        train_share=float(f"{random.uniform(1 / 55, 1.0):.3g}"),
        just_train=flip(random, 0.2 if colour else 0.1),
        augmentation=augmentation.sample(random) if flip(random, 0.3) and description.shape[1] > 1 else None,
    )


@dataclass(frozen=True, kw_only=True)
class ImageTask(SampledTask):
    """A task on images; ``noise_shape`` says which standard normal values its loss needs for a minibatch."""

    data: ImageData

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Shape of the noise of a minibatch, None for a loss without noise."""
        return None

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        for step, batch in enumerate(self.data.batches(seed, split, start), start):
            yield with_noise(batch, self.noise_shape, seed, split, step)


def centred(center: bool, images: Tensor) -> Tensor:
    """Images from [0, 1] to [-1, 1], if ``center``."""
    return images * 2.0 - 1.0 if center else images
