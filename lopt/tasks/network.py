"""Networks as sequences of layers: what they compute in PyTorch, and the form in which the fused engine reads them.

Values are ``[batch, places, width]``: a place is a position of a sequence, or a pixel of a square image; rows of plain
numbers have one place. csrc/unroll/unroll.h has the same kinds of layers, with forward and backward by hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.pieces import ONES, ZEROS, Initialiser, Layout, Params, Weights
from lopt.tasks.task import Batch

EPSILON = 1e-5  # of norms

Activation = Literal["relu", "tanh", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}


class Dense(NamedTuple):
    """``x W + b`` at every place, ``W [in, out]``."""

    outputs: int
    weight: str
    bias: str | None = None


class Activate(NamedTuple):
    """A function of every number."""

    function: Activation


class Norm(NamedTuple):
    """Of every place: layer normalisation with gain and bias, or without a bias division by the root mean square."""

    gain: str
    bias: str | None = None


class Branch(NamedTuple):
    """Nothing; what is here is added at the join that belongs to it."""


class Join(NamedTuple):
    """``x`` and what was at the last branch without a join."""


class Embedding(NamedTuple):
    """Rows of a table for the symbols of a place, one after the other; the first layer."""

    symbols: int
    width: int
    table: str = "embedding"


class Positions(NamedTuple):
    """``x`` and a row of a table for each place."""

    table: str = "positions"


class Convolution(NamedTuple):
    """A 3 x 3 convolution with bias over a square of places, with zeros around it, ``W [out, in, 3, 3]``."""

    outputs: int
    weight: str
    bias: str


class Pool(NamedTuple):
    """Two by two places become one."""

    kind: Literal["max", "mean"]


class Mean(NamedTuple):
    """Of all places."""


class Flatten(NamedTuple):
    """All places in one row: those of the first channel, then those of the second, ..."""


class Attention(NamedTuple):
    """Causal self-attention of queries, keys and values ``[3 width]`` -> ``[width]``."""

    heads: int


Layer: TypeAlias = (
    Dense | Activate | Norm | Branch | Join | Embedding | Positions | Convolution | Pool | Mean | Flatten | Attention
)


class Place(NamedTuple):
    """A layer and what it is given."""

    layer: Layer
    width: int
    places: int


@dataclass(frozen=True)
class Network:
    """A sequence of layers and a loss.

    Args:
        inputs: numbers of a place, or with ``tokens`` symbols.
        places: of a row of data.
        tokens: rows are windows of ``places * inputs`` symbols, and the last layer predicts the next one, after every
            place that it has.
        loss: softmax cross-entropy, or the mean squared error.

    Raises:
        ValueError: a layer does not fit what it is given.

    Example:
        >>> network = Network((Dense(8, "w0", "b0"), Activate("relu"), Dense(2, "w1", "b1")), inputs=4)
        >>> network.shapes
        {'w0': (4, 8), 'b0': (8,), 'w1': (8, 2), 'b1': (2,)}
    """

    layers: tuple[Layer, ...]
    inputs: int
    places: int = 1
    tokens: bool = False
    loss: Literal["softmax", "squared_error"] = "softmax"

    def __post_init__(self) -> None:
        if not self.layers or min(self.inputs, self.places, *(place.width for place in self._flow)) < 1:
            raise ValueError(f"layers, inputs, places: expected layers and positive numbers, got {self}")
        if self.loss == "squared_error" and self.end.places > 1:
            raise ValueError(f"loss: expected one place at the end for squared_error, got {self.end.places}")

    @property
    def flow(self) -> tuple[Place, ...]:
        """The layers and what each is given."""
        return self._flow[:-1]

    @property
    def end(self) -> Place:
        """The last layer, and what it gives."""
        return self._flow[-1]

    @cached_property
    def _flow(self) -> tuple[Place, ...]:
        width, places, flow = self.inputs, self.places, []
        branches: list[tuple[int, int]] = []
        for number, layer in enumerate(self.layers):
            flow.append(Place(layer, width, places))
            side, expected = math.isqrt(places), ""
            if isinstance(layer, Embedding) != (self.tokens and number == 0):
                expected = "an embedding first where there are symbols, and nowhere else"
            match layer:
                case Dense():
                    width = layer.outputs
                case Embedding():
                    width *= layer.width
                case Branch():
                    branches.append((width, places))
                case Join() if not branches or branches.pop() != (width, places):
                    expected = "width and places of a branch before"
                case Convolution():
                    expected = expected or ("" if side**2 == places else "a square of places")
                    width = layer.outputs
                case Pool():
                    expected = expected or ("" if side**2 == places and side % 2 == 0 else "an even square of places")
                    places //= 4
                case Mean():
                    places = 1
                case Flatten():
                    width, places = width * places, 1
                case Attention():
                    expected = expected or ("" if width % (3 * layer.heads) == 0 else "a width of 3 times all heads")
                    width //= 3
            if expected:
                raise ValueError(f"layers[{number}]: expected {expected}, got {flow[-1]}")
        if branches:
            raise ValueError(f"layers: expected a join for every branch, {len(branches)} have none")
        return (*flow, Place(self.layers[-1], width, places))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, in the order of the layers."""
        return {name: weights.shape for name, weights in self.layout(ZEROS, ZEROS).items()}

    @property
    def transposed(self) -> frozenset[str]:
        """Names of the matrices that are stored ``[in, out]``."""
        return frozenset(layer.weight for layer in self.layers if isinstance(layer, Dense))

    def layout(self, matrices: Initialiser, tables: Initialiser) -> Layout:
        """The parameters: weights and kernels start by one initialiser, tables by another, gains as 1, biases as 0."""
        layout: Layout = {}
        for layer, width, places in self.flow:
            match layer:
                case Dense(outputs, weight, bias):
                    layout[weight] = Weights((width, outputs), matrices)
                    layout |= {} if bias is None else {bias: Weights((outputs,), ZEROS)}
                case Norm(gain, bias):
                    layout[gain] = Weights((width,), ONES)
                    layout |= {} if bias is None else {bias: Weights((width,), ZEROS)}
                case Embedding(symbols, size, table):
                    layout[table] = Weights((symbols, size), tables)
                case Positions(table):
                    layout[table] = Weights((places, width), tables)
                case Convolution(outputs, weight, bias):
                    layout[weight] = Weights((outputs, width, 3, 3), matrices)
                    layout[bias] = Weights((outputs,), ZEROS)
        return layout

    def run(self, params: Params, x: Tensor) -> Tensor:
        """``[batch, places, inputs]`` to ``[batch, places, outputs]``."""
        branches: list[Tensor] = []
        for layer in self.layers:
            match layer:
                case Branch():
                    branches.append(x)
                case Join():
                    x = branches.pop() + x
                case _:
                    x = _apply(layer, params, x)
        return x

    def loss_of(self, params: Params, batch: Batch) -> Tensor:
        """Mean loss of a minibatch."""
        inputs, targets = batch
        y = self.run(params, inputs.reshape(len(inputs), self.places, self.inputs))
        if self.loss == "squared_error":
            return (y.flatten(1) - targets).square().mean()
        return -torch.log_softmax(y.flatten(0, 1), dim=1).gather(1, targets.reshape(-1, 1)).mean()


def perceptron(
    sizes: Sequence[int], activation: Activation, loss: Literal["softmax", "squared_error"] = "softmax"
) -> Network:
    """Dense layers of these widths, inputs and outputs included, with weights ``w0, b0, w1, ...``.

    Raises:
        ValueError: fewer than two widths, or one that is not positive.
    """
    layers: list[Layer] = []
    for number, outputs in enumerate(sizes[1:]):
        layers += [Activate(activation)] if number else []
        layers += [Dense(outputs, f"w{number}", f"b{number}")]
    return Network(tuple(layers), sizes[0], loss=loss)


def _apply(layer: Any, params: Params, x: Tensor) -> Tensor:
    match layer:
        case Dense(_, weight, bias):
            return x @ params[weight] if bias is None else x @ params[weight] + params[bias]
        case Activate(function):
            return ACTIVATIONS[function](x)
        case Norm(gain, bias):
            return norm(x, params[gain], None if bias is None else params[bias])
        case Embedding(_, _, table):
            return functional.embedding(x, params[table]).flatten(2)
        case Positions(table):
            return x + params[table]
        case Convolution(_, weight, bias):
            return _row(functional.conv2d(_square(x), params[weight], params[bias], padding=1))
        case Pool(kind):
            return _row((functional.max_pool2d if kind == "max" else functional.avg_pool2d)(_square(x), 2))
        case Mean():
            return x.mean(dim=1, keepdim=True)
        case Flatten():
            return x.transpose(1, 2).flatten(1)[:, None]
        case _:
            return self_attention(layer.heads, x, causal=True)


def norm(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Layer normalisation of the last dimension, or without a bias division by its root mean square."""
    if bias is None:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON) * gain
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON) * gain + bias


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(width)) v`` of ``[rows, heads, positions, width]``, in operations that vmap can batch."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        places = torch.arange(q.shape[-2], device=q.device)
        scores = torch.where(places[:, None] >= places, scores, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def self_attention(heads: int, x: Tensor, causal: bool) -> Tensor:
    """Queries, keys and values ``[rows, positions, 3 width]`` -> ``[rows, positions, width]``."""
    q, k, v = x.reshape(*x.shape[:2], 3, heads, -1).transpose(1, 3).unbind(2)
    return attention(q, k, v, causal).transpose(1, 2).flatten(2)


def _square(x: Tensor) -> Tensor:
    """``[batch, places, channels]`` -> ``[batch, channels, side, side]``"""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def _row(x: Tensor) -> Tensor:
    """The inverse of :func:`_square`."""
    return x.flatten(2).transpose(1, 2)
