"""Lists of tensor shapes to time optimizers on: evenly cut parameters, and models as their authors build them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A named list of tensor shapes."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def even(parameters: int, tensors: int) -> Layout:
    """``parameters`` elements in ``tensors`` tensors of one dimension and the same size."""
    if not 1 <= tensors <= parameters:
        raise ValueError(f"tensors: expected 1 to {parameters}, one for each parameter at most, got {tensors}")
    return Layout(f"{tensors:,} x {parameters // tensors:,}", ((parameters // tensors,),) * tensors)


def _block(width: int, hidden: int, transposed: bool) -> list[Shape]:
    """A transformer block: norm, attention, norm, perceptron; ``transposed`` weights are [in, out]."""
    linear = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]  # [out, in]
    qkv, out, up, down = [(i, o) if transposed else (o, i) for o, i in linear]
    norm: list[Shape] = [(width,), (width,)]
    return [*norm, qkv, (3 * width,), out, (width,), *norm, up, (hidden,), down, (width,)]


def vit_b16(blocks: int = 12) -> list[Shape]:
    """ViT-B/16 for 224 x 224 pixels and 1000 classes, 86.6 million parameters (arXiv:2010.11929)."""
    width = 768
    embedding: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    head: list[Shape] = [(width,), (width,), (1000, width), (1000,)]
    return embedding + _block(width, 4 * width, transposed=False) * blocks + head


def gpt2_355m(blocks: int = 24) -> list[Shape]:
    """GPT-2 medium with tied embeddings, 354.8 million parameters; its linear layers are [in, out]."""
    width = 1024
    embedding: list[Shape] = [(50257, width), (1024, width)]
    return embedding + _block(width, 4 * width, transposed=True) * blocks + [(width,), (width,)]


#: Name -> (number of blocks, shapes for a number of blocks).
MODELS: dict[str, tuple[int, Callable[[int], list[Shape]]]] = {
    "vit-b16": (12, vit_b16),
    "gpt2-355m": (24, gpt2_355m),
}


def model(name: str, scale: float = 1.0) -> Layout:
    """The tensors of a model; ``scale`` below 1 keeps that share of its blocks, at least one.

    Raises:
        ValueError: no such model, or a scale outside (0, 1].
    """
    if name not in MODELS:
        raise ValueError(f"models: expected some of {', '.join(MODELS)}, got {name!r}")
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale: expected a number above 0, at most 1, got {scale}")
    blocks, shapes = MODELS[name]
    kept = max(1, round(scale * blocks))
    return Layout(name if kept == blocks else f"{name} {kept} of {blocks} blocks", tuple(shapes(kept)))
