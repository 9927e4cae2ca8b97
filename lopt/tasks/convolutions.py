"""Convolutional classifiers of images, with global pooling or with dense layers on top.

Source: TaskSet (arXiv:2002.11887), families conv_pooling and conv_fc.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from lopt.tasks.image_tasks import ImageTask, centred, sample_images
from lopt.tasks.pieces import (
    ZEROS,
    Initialiser,
    Layout,
    Params,
    Random,
    Weights,
    activation,
    dense,
    dense_layout,
    flip,
    log_int,
    pick,
    sample_activation,
    sample_initialiser,
)
from lopt.tasks.sampled import cross_entropy
from lopt.tasks.task import Batch


@dataclass(frozen=True, kw_only=True)
class Convolutional(ImageTask):
    """3 x 3 convolutions, each followed by the activation, then what the kind of task does; softmax cross-entropy.

    Args:
        channels, strides, same: one value per layer; ``same`` pads with zeros so that height and width only shrink by
            the stride (one more row or column at the end where both sides cannot have as many), otherwise nothing is
            padded. A layer pads anyway where nothing would be left of a small image.
        bias: of the convolutions, starting at zero.
        center: images from -1 to 1 instead of from 0 to 1.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    same: tuple[bool, ...]
    activation: str
    initialiser: Initialiser
    bias: bool = True
    center: bool = False

    @property
    def name(self) -> str:
        layers = "-".join(map(str, self.channels))
        return f"{self.family}-{self.data.label}-{layers}"

    @cached_property
    def paddings(self) -> tuple[tuple[int, int, int, int], ...]:
        """Zeros left, right, above and below, for every layer."""
        return tuple(padding for padding, _ in self._sizes)

    @cached_property
    def height_and_width(self) -> tuple[int, int]:
        """Of the last convolution."""
        return self._sizes[-1][1]

    @cached_property
    def _sizes(self) -> list[tuple[tuple[int, int, int, int], tuple[int, int]]]:
        (height, width), layers = self.data.shape[1:], []
        for stride, same in zip(self.strides, self.same, strict=True):
            same = same or min(height, width) < 3
            rows, columns = (_same_padding(length, stride) if same else (0, 0) for length in (height, width))
            height, width = (height + sum(rows) - 3) // stride + 1, (width + sum(columns) - 3) // stride + 1
            layers.append(((*columns, *rows), (height, width)))
        return layers

    @cached_property
    def layout(self) -> Layout:
        layout: Layout = {}
        inputs = self.data.shape[0]
        for layer, outputs in enumerate(self.channels):
            layout[f"conv.w{layer}"] = Weights((outputs, inputs, 3, 3), self.initialiser)
            if self.bias:
                layout[f"conv.b{layer}"] = Weights((outputs,), ZEROS)
            inputs = outputs
        return layout | dense_layout("", self.top, self.initialiser)

    @property
    def top(self) -> tuple[int, ...]:
        """Widths of the dense layers, from what the convolutions give to the classes."""
        raise NotImplementedError

    @property
    def loss_floor(self) -> float:
        return 0.0

    def features(self, params: Params, images: Tensor) -> Tensor:
        """What the convolutions make of images: ``[rows, channels, height, width]``."""
        x, function = centred(self.center, images), activation(self.activation)
        for layer, (stride, padding) in enumerate(zip(self.strides, self.paddings, strict=True)):
            weight, bias = params[f"conv.w{layer}"], params.get(f"conv.b{layer}")
            x = function(functional.conv2d(functional.pad(x, padding), weight, bias, stride))
        return x

    def flat(self, x: Tensor) -> Tensor:
        """Features as rows for the dense layers."""
        raise NotImplementedError

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = self.flat(self.features(params, batch.inputs))
        return cross_entropy(dense(params, "", x, activation(self.activation)), batch.targets)


@dataclass(frozen=True, kw_only=True)
class ConvPooling(Convolutional):
    """A classifier of images: convolutions, then mean, largest value or mean square of every channel, a dense layer."""

    family: ClassVar[str] = "conv_pooling"

    pool: Literal["mean", "max", "squared_mean"] = "mean"

    @property
    def top(self) -> tuple[int, ...]:
        return (self.channels[-1], self.data.num_classes)

    def flat(self, x: Tensor) -> Tensor:
        if self.pool == "max":
            return x.amax(dim=(2, 3))
        return (x.square() if self.pool == "squared_mean" else x).mean(dim=(2, 3))


@dataclass(frozen=True, kw_only=True)
class ConvFC(Convolutional):
    """A classifier of images: convolutions, then dense layers of these widths and one for the classes."""

    family: ClassVar[str] = "conv_fc"

    dense: tuple[int, ...] = ()

    @property
    def top(self) -> tuple[int, ...]:
        height, width = self.height_and_width
        return (self.channels[-1] * height * width, *self.dense, self.data.num_classes)

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def sample_conv_pooling(random: Random, names: tuple[str, ...]) -> ConvPooling:
    """TaskSet's distribution."""
    return ConvPooling(**_convolutions(random, names), pool=pick(random, ["mean", "max", "squared_mean"]))


def sample_conv_fc(random: Random, names: tuple[str, ...]) -> ConvFC:
    """Up to three dense layers of 32 to 128."""
    fields = _convolutions(random, names)
    return ConvFC(**fields, dense=tuple(log_int(random, 32, 128) for _ in range(random.integers(0, 4))))


def _convolutions(random: Random, names: tuple[str, ...]) -> dict[str, Any]:
    """One to five layers of 8 to 64 channels; strides all two, or one and two in turns, or two and one."""
    layers = int(random.integers(1, 6))
    pattern = pick(random, [(2, 2), (1, 2), (2, 1)])
    return {
        "channels": tuple(log_int(random, 8, 64) for _ in range(layers)),
        "strides": (pattern * 3)[:layers],
        "same": tuple(flip(random) for _ in range(layers)),
        "activation": sample_activation(random),
        "initialiser": sample_initialiser(random),
        "bias": flip(random),
        "data": sample_images(random, names),
        "center": flip(random),
    }


def _same_padding(length: int, stride: int) -> tuple[int, int]:
    total = max((-(-length // stride) - 1) * stride + 3 - length, 0)
    return total // 2, total - total // 2
