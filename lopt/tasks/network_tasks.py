"""Families whose tasks are networks of layers, which the fused engine of meta-training runs and PyTorch too.

::

    token_perceptron     the last symbols, embedded, side by side -> dense -> blocks x + mlp(norm(x)) -> norm -> head
    token_transformer    embeddings + positions -> blocks x + attention(norm(x)), x + mlp(norm(x)) -> norm -> head
    text_transformer     the same, on the frequent symbols of a text, of sizes nearer to what people train
    small_convolution    one or two 3 x 3 convolutions with pools -> mean or all places -> dense layers

Norms are layer norms, with biases everywhere, or root mean squares, without biases. Half of the networks start with
deviation .02 everywhere, the other half with 1 / sqrt(fan-in), and tables then with 1, as PyTorch's. A quarter of
the language models give the optimizer nothing but their parameters.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lopt.rule.matrices import Role
from lopt.tasks.data import catalogue
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.network import (
    Activate,
    Activation,
    Attention,
    Branch,
    Convolution,
    Dense,
    Embedding,
    Flatten,
    Join,
    Layer,
    Mean,
    Network,
    Norm,
    Pool,
    Positions,
)
from lopt.tasks.pieces import Initialiser, Layout, Params, Random, flip, log_int, pick
from lopt.tasks.sampled import SampledTask
from lopt.tasks.seeds import minibatch_key, minibatch_rows
from lopt.tasks.streams import GENERATORS, StreamData, sample_stream
from lopt.tasks.task import Batch, SplitName

SMALL = Initialiser("random_normal", 0.02)
BY_FAN_IN = Initialiser("variance_scaling", 1.0)
ONE = Initialiser("random_normal", 1.0)
BARE = 0.25  # share of the language models whose optimizer is told nothing of their layers


@dataclass(frozen=True, kw_only=True)
class NetworkTask(SampledTask):
    """A task whose model is a network of layers.

    Args:
        small: weights and tables start with deviation .02.
        bare: the optimizer gets the parameters without the roles of tables, head and hidden matrices.
    """

    small: bool = False
    bare: bool = False

    @cached_property
    def network(self) -> Network:
        raise NotImplementedError

    @cached_property
    def layout(self) -> Layout:
        return self.network.layout(SMALL, SMALL) if self.small else self.network.layout(BY_FAN_IN, ONE)

    @property
    def roles(self) -> Mapping[str, Role | None]:
        return {} if self.bare else super().roles

    @property
    def loss_floor(self) -> float:
        return 0.0

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.network.loss_of(params, batch)


@dataclass(frozen=True)
class Blocks:
    """Residual blocks of this width, with perceptrons of ``ratio`` times that width.

    Args:
        layer_norm: norms are layer norms, and layers have biases; otherwise root mean squares without biases.
    """

    count: int = 1
    width: int = 16
    ratio: int = 4
    activation: Activation = "gelu"
    layer_norm: bool = True

    def bias(self, name: str) -> str | None:
        """The name of a bias, where there are any."""
        return name if self.layer_norm else None

    def norm(self, prefix: str) -> Norm:
        """A norm with weights of this prefix."""
        return Norm(f"{prefix}gain", self.bias(f"{prefix}bias"))

    def dense(self, prefix: str, number: int, outputs: int) -> Dense:
        """A dense layer with weights of this prefix and number."""
        return Dense(outputs, f"{prefix}w{number}", self.bias(f"{prefix}b{number}"))

    def perceptron(self, prefix: str) -> tuple[Layer, ...]:
        """``x + mlp(norm(x))``"""
        up, down = self.dense(prefix, 0, self.ratio * self.width), self.dense(prefix, 1, self.width)
        return (Branch(), self.norm(prefix), up, Activate(self.activation), down, Join())

    def attention(self, prefix: str, heads: int) -> tuple[Layer, ...]:
        """``x + attention(norm(x))``"""
        qkv, out = self.dense(prefix, 0, 3 * self.width), self.dense(prefix, 1, self.width)
        return (Branch(), self.norm(prefix), qkv, Attention(heads), out, Join())


@dataclass(frozen=True, kw_only=True)
class TokenTask(NetworkTask):
    """A language model of a stream of symbols; the loss is cross-entropy in nats per symbol.

    Args:
        context: symbols that it sees at most.
    """

    data: StreamData
    context: int = 8
    blocks: Blocks = Blocks()

    @property
    def name(self) -> str:
        start = ("small" if self.small else "fan-in") + ("-bare" if self.bare else "")
        return f"{self.family}-{self.data.label}-{self.context}-{self.blocks.count}x{self.blocks.width}-{start}"

    def stored(self, split: SplitName) -> Batch:
        return Batch(self.data.symbols(split), torch.empty(0))

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        every = self.network.end.places > 1
        for windows in self.data.windows(seed, split, self.context + 1, start):
            yield Batch(windows[:, :-1], windows[:, 1:] if every else windows[:, -1])


@dataclass(frozen=True, kw_only=True)
class TokenPerceptron(TokenTask):
    """A residual perceptron over the embeddings of the last symbols, which predicts the next one.

    Args:
        embedding: width of the embedding of a symbol.
    """

    family: ClassVar[str] = "token_perceptron"

    embedding: int = 8

    @cached_property
    def network(self) -> Network:
        blocks, vocabulary = self.blocks, self.data.vocabulary
        inside = [layer for number in range(blocks.count) for layer in blocks.perceptron(f"block{number}.")]
        first = Embedding(vocabulary, self.embedding), blocks.dense("in.", 0, blocks.width)
        last = blocks.norm("norm."), blocks.dense("", 0, vocabulary)
        return Network((*first, *inside, *last), inputs=self.context, tokens=True)


@dataclass(frozen=True, kw_only=True)
class TokenTransformer(TokenTask):
    """A transformer language model with learned positions.

    Args:
        heads: of which ``blocks.width`` is a multiple.
    """

    family: ClassVar[str] = "token_transformer"

    heads: int = 2

    @cached_property
    def network(self) -> Network:
        blocks, vocabulary = self.blocks, self.data.vocabulary
        inside: list[Layer] = []
        for block in (f"block{number}." for number in range(blocks.count)):
            inside += blocks.attention(f"{block}attention.", self.heads) + blocks.perceptron(f"{block}mlp.")
        first = Embedding(vocabulary, blocks.width), Positions()
        last = blocks.norm("norm."), blocks.dense("", 0, vocabulary)
        return Network((*first, *inside, *last), inputs=1, places=self.context, tokens=True)


@dataclass(frozen=True, kw_only=True)
class TextTransformer(TokenTransformer):
    """A token transformer whose stream is a text."""

    family: ClassVar[str] = "text_transformer"


@dataclass(frozen=True, kw_only=True)
class SmallConvolution(NetworkTask):
    """A convolutional classifier of images of at most 16 x 16 pixels; larger ones are made smaller by means of squares.

    Args:
        data: which images; without augmentation.
        channels: of each 3 x 3 convolution.
        norm: whether the channels of every place are normalised before the activation.
        pool: what a convolution ends with, where the side is even; "none" for nothing.
        dense: widths of hidden dense layers.
        flat: the dense layers see all places, not their mean.
    """

    family: ClassVar[str] = "small_convolution"

    data: ImageData
    channels: tuple[int, ...] = (8,)
    activation: Activation = "relu"
    norm: bool = False
    pool: Literal["max", "mean", "none"] = "max"
    dense: tuple[int, ...] = ()
    flat: bool = False

    @property
    def name(self) -> str:
        layers = "-".join(map(str, (*self.channels, *self.dense)))
        return f"{self.family}-{self.data.label}-{layers}-{'small' if self.small else 'fan-in'}"

    @property
    def side(self) -> int:
        """Pixels along each side of the images, made smaller."""
        side = self.data.shape[1]
        return side // -(-side // 16)

    @cached_property
    def network(self) -> Network:
        layers: list[Layer] = []
        side = self.side
        for number, channels in enumerate(self.channels):
            layers += [Convolution(channels, f"conv.w{number}", f"conv.b{number}")]
            layers += [Norm(f"norm{number}.gain", f"norm{number}.bias")] if self.norm else []
            layers += [Activate(self.activation)]
            if self.pool != "none" and side % 2 == 0:
                layers, side = [*layers, Pool(self.pool)], side // 2
        layers += [Flatten() if self.flat else Mean()]
        for number, width in enumerate((*self.dense, self.data.num_classes)):
            layers += [Activate(self.activation)] if number else []
            layers += [Dense(width, f"w{number}", f"b{number}")]
        return Network(tuple(layers), inputs=self.data.shape[0], places=self.side**2)

    def stored(self, split: SplitName) -> Batch:
        """Rows ``[rows, places, channels]`` from -1 to 1."""
        data = self.data
        rows = len(data.rows(split).targets)
        inputs, targets = _smaller(data.name, data.variant, self.side, "train" if data.just_train else split)
        return Batch(inputs[:rows], targets[:rows])

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        inputs, targets = self.stored(split)
        key = minibatch_key(seed, split)
        for step in itertools.count(start):
            index = torch.from_numpy(minibatch_rows(key, step, self.data.batch_size, len(targets)))
            yield Batch(inputs[index], targets[index])


@lru_cache(maxsize=256)
def _smaller(name: str, variant: int, side: int, split: SplitName) -> Batch:
    """All rows of a split, in the memory of which tasks have theirs."""
    images, targets = catalogue.load(name, variant)[split]
    images = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
    images = functional.avg_pool2d(images, images.shape[2] // side)[:, :, :side, :side]
    return Batch((images * 2.0 - 1.0).flatten(2).transpose(1, 2).contiguous(), targets)


def sample_token_perceptron(random: Random, names: tuple[str, ...]) -> TokenPerceptron:
    """The last 2 to 12 symbols, embeddings of 4 to 16, one to three blocks of width 8 to 32."""
    return TokenPerceptron(
        data=sample_stream(random, names),
        context=log_int(random, 2, 12),
        blocks=_blocks(random, log_int(random, 8, 32)),
        embedding=log_int(random, 4, 16),
        small=flip(random),
        bare=flip(random, BARE),
    )


def sample_token_transformer(random: Random, names: tuple[str, ...]) -> TokenTransformer:
    """8 to 32 symbols at once, one to three blocks with one, two or four heads of 4 to 16."""
    heads = pick(random, [1, 2, 4])
    return TokenTransformer(
        data=sample_stream(random, names),
        context=log_int(random, 8, 32),
        blocks=_blocks(random, heads * log_int(random, 4, 16)),
        heads=heads,
        small=flip(random),
        bare=flip(random, BARE),
    )


def sample_text_transformer(random: Random, names: tuple[str, ...]) -> TextTransformer:
    """48 or 64 symbols of a text, 16 or 32 at once, one or two blocks with two or four heads of 8 or 12; minibatches of
    8 or 16 windows of 100,000 symbols."""
    texts = catalogue.of_kind(names, ("text",))
    name = pick(random, [name for name in texts if name not in GENERATORS] or list(texts))
    heads = pick(random, [2, 4])
    return TextTransformer(
        data=StreamData(
            name=name,
            seed=int(random.integers(catalogue.variants(name))),
            vocabulary=pick(random, [48, 64]),
            train_symbols=100_000,
            batch_size=pick(random, [8, 16]),
        ),
        context=pick(random, [16, 32]),
        blocks=Blocks(count=pick(random, [1, 2]), width=heads * pick(random, [8, 12]), layer_norm=flip(random)),
        heads=heads,
        small=flip(random),
        bare=flip(random, BARE),
    )


def sample_small_convolution(random: Random, names: tuple[str, ...]) -> SmallConvolution:
    """One or two convolutions of 4 to 16 channels, no or one hidden dense layer of 8 to 32; minibatches of 8 to 64 of a
    tenth to all of the training rows. Those that start with deviation .02 have norms, without which they would not
    leave the start for long, and so have half of the others."""
    name = pick(random, catalogue.of_kind(names, ("images",)))
    data = ImageData(
        name=name,
        variant=int(random.integers(catalogue.variants(name))),
        batch_size=int(random.choice([8, 16, 32, 64])),
        train_share=float(f"{math.exp(random.uniform(math.log(0.1), 0.0)):.3g}"),
    )
    small = flip(random)
    return SmallConvolution(
        data=data,
        channels=tuple(log_int(random, 4, 16) for _ in range(random.integers(1, 3))),
        activation=pick(random, ["relu", "relu", "gelu", "tanh"]),
        norm=small or flip(random),
        pool=pick(random, ["max", "max", "mean", "none"]),
        dense=tuple(log_int(random, 8, 32) for _ in range(random.integers(0, 2))),
        flat=flip(random),
        small=small,
    )


def _blocks(random: Random, width: int) -> Blocks:
    fields: dict[str, Any] = {
        "count": int(random.integers(1, 4)),
        "width": width,
        "ratio": pick(random, [1, 2, 4]),
        "activation": pick(random, ["gelu", "gelu", "relu", "tanh"]),
        "layer_norm": flip(random),
    }
    return Blocks(**fields)
