"""Small transformers: language models of bytes, and classifiers of images cut into patches.

A block is ``x + attention(norm(x))`` and then ``x + mlp(norm(x))`` (norm first), or ``norm(x + ...)`` (norm last).
Weights start normal with deviation .02, half of the time, and else as in the other families.

Not among TaskSet's families; today's models are made of it. Source: arXiv:1706.03762, arXiv:2010.11929.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.image_tasks import ImageTask, sample_images
from lopt.tasks.network import norm, self_attention
from lopt.tasks.pieces import (
    ONES,
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
    sample_initialiser,
)
from lopt.tasks.sampled import cross_entropy
from lopt.tasks.task import Batch
from lopt.tasks.text_tasks import LanguageModel, sample_text

SMALL = Initialiser("random_normal", 0.02)


@dataclass(frozen=True)
class Transformer:
    """A stack of blocks of width ``heads * head_width``, with ``ratio`` times that width inside its perceptrons."""

    layers: int
    heads: int
    head_width: int
    ratio: int
    activation: str
    initialiser: Initialiser
    norm_first: bool = True

    @property
    def width(self) -> int:
        """Numbers per position."""
        return self.heads * self.head_width

    def layout(self) -> Layout:
        """Weights named ``block0.*``, ..., and ``norm.*`` for the end."""
        layout: Layout = {}
        for block in (f"block{number}." for number in range(self.layers)):
            layout |= _norm_layout(f"{block}norm0.", self.width) | _norm_layout(f"{block}norm1.", self.width)
            layout |= dense_layout(f"{block}qkv.", (self.width, 3 * self.width), self.initialiser)
            layout |= dense_layout(f"{block}out.", (self.width, self.width), self.initialiser)
            layout |= dense_layout(f"{block}mlp.", (self.width, self.ratio * self.width, self.width), self.initialiser)
        return layout | _norm_layout("norm.", self.width)

    def run(self, params: Params, x: Tensor, causal: bool) -> Tensor:
        """``[rows, positions, width]`` to the same; causal: a position sees only those before it and itself."""
        for block in (f"block{number}." for number in range(self.layers)):
            if self.norm_first:
                x = x + self._attend(params, block, _norm(params, f"{block}norm0.", x), causal)
                x = x + self._think(params, block, _norm(params, f"{block}norm1.", x))
            else:
                x = _norm(params, f"{block}norm0.", x + self._attend(params, block, x, causal))
                x = _norm(params, f"{block}norm1.", x + self._think(params, block, x))
        return _norm(params, "norm.", x)

    def _attend(self, params: Params, block: str, x: Tensor, causal: bool) -> Tensor:
        qkv = dense(params, f"{block}qkv.", x, torch.relu)
        return dense(params, f"{block}out.", self_attention(self.heads, qkv, causal), torch.relu)

    def _think(self, params: Params, block: str, x: Tensor) -> Tensor:
        return dense(params, f"{block}mlp.", x, activation(self.activation))


def _norm(params: Params, prefix: str, x: Tensor) -> Tensor:
    return norm(x, params[f"{prefix}gain"], params[f"{prefix}bias"])


def _norm_layout(prefix: str, width: int) -> Layout:
    return {f"{prefix}gain": Weights((width,), ONES), f"{prefix}bias": Weights((width,), ZEROS)}


@dataclass(frozen=True, kw_only=True)
class TransformerLanguageModel(LanguageModel):
    """A transformer language model: embeddings of bytes and positions, causal blocks, a layer to the next byte."""

    family: ClassVar[str] = "transformer_language_model"

    transformer: Transformer

    @property
    def name(self) -> str:
        return f"{self.family}-{self.data.label}-{self.transformer.layers}x{self.transformer.width}"

    @cached_property
    def layout(self) -> Layout:
        width, vocabulary = self.transformer.width, self.data.vocabulary
        return {
            "embedding": Weights((vocabulary, width), SMALL),
            "positions": Weights((self.data.length - 1, width), SMALL),
            **self.transformer.layout(),
            **dense_layout("", (width, vocabulary), self.transformer.initialiser),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = functional.embedding(batch.inputs, params["embedding"]) + params["positions"]
        logits = dense(params, "", self.transformer.run(params, x, causal=True), torch.relu)
        return cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def sample_transformer_language_model(random: Random, names: tuple[str, ...]) -> TransformerLanguageModel:
    """All bytes, windows of 10 to 128."""
    return TransformerLanguageModel(
        transformer=_transformer(random),
        data=sample_text(random, names, words=False, vocabulary=256, longest=128),
    )


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(ImageTask):
    """A vision transformer: squares of an image as positions, blocks, their mean, a dense layer to the classes.

    Where squares do not cover an image, its middle is used.

    Args:
        grid: squares along each side.
    """

    family: ClassVar[str] = "vit"

    transformer: Transformer
    grid: int

    @property
    def name(self) -> str:
        return f"vit-{self.data.label}-{self.transformer.layers}x{self.transformer.width}-{self.grid}x{self.grid}"

    @property
    def side(self) -> int:
        """Pixels along each side of a square."""
        return min(self.data.shape[1:]) // self.grid

    @cached_property
    def layout(self) -> Layout:
        width = self.transformer.width
        pixels = self.data.shape[0] * self.side**2
        return {
            **dense_layout("patch.", (pixels, width), self.transformer.initialiser),
            "positions": Weights((self.grid**2, width), SMALL),
            **self.transformer.layout(),
            **dense_layout("", (width, self.data.num_classes), self.transformer.initialiser),
        }

    @property
    def loss_floor(self) -> float:
        return 0.0

    def squares(self, images: Tensor) -> Tensor:
        """``[rows, grid^2, channels * side^2]`` pixels from -1 to 1."""
        covered, (height, width) = self.grid * self.side, images.shape[2:]
        top, left = (height - covered) // 2, (width - covered) // 2
        images = images[:, :, top : top + covered, left : left + covered] * 2.0 - 1.0
        squares = images.reshape(*images.shape[:2], self.grid, self.side, self.grid, self.side)
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = dense(params, "patch.", self.squares(batch.inputs), torch.relu) + params["positions"]
        x = self.transformer.run(params, x, causal=False).mean(dim=1)
        return cross_entropy(dense(params, "", x, torch.relu), batch.targets)


def sample_vit(random: Random, names: tuple[str, ...]) -> VisionTransformer:
    """4, 9, 16 or 36 squares."""
    return VisionTransformer(
        transformer=_transformer(random), data=sample_images(random, names), grid=pick(random, [2, 3, 4, 6])
    )


def _transformer(random: Random) -> Transformer:
    """One to four blocks, 1, 2 or 4 heads of 8 to 32."""
    fields: dict[str, Any] = {
        "layers": int(random.integers(1, 5)),
        "heads": pick(random, [1, 2, 4]),
        "head_width": log_int(random, 8, 32),
        "ratio": pick(random, [2, 4]),
        "activation": pick(random, ["gelu", "gelu", "relu", "swish"]),
        "norm_first": flip(random, 0.75),
    }
    return Transformer(**fields, initialiser=SMALL if flip(random) else sample_initialiser(random))
