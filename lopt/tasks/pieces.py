"""Small pieces that models of several kinds share: distributions of sizes, activations, initial values, dense layers.

Source: TaskSet (arXiv:2002.11887), whose samplers and weights these are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks.generators import log_uniform

Random = np.random.Generator
Params = Mapping[str, Tensor]

#: Name -> (weight among the sampled ones, function).
ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "relu": (6, torch.relu),
    "tanh": (3, torch.tanh),
    "cos": (1, torch.cos),
    "elu": (1, functional.elu),
    "sigmoid": (1, torch.sigmoid),
    "swish": (1, functional.silu),
    "leaky_relu4": (1, lambda x: functional.leaky_relu(x, 0.4)),
    "leaky_relu2": (1, lambda x: functional.leaky_relu(x, 0.2)),
    "leaky_relu1": (1, lambda x: functional.leaky_relu(x, 0.1)),
    "gelu": (0, functional.gelu),  # for attention only
}

#: Name of initial values -> (weight among the sampled ones, whether a scale from .1 to 10 is drawn with it).
INITIALISERS: dict[str, tuple[int, bool]] = {
    "he_normal": (2, False),
    "he_uniform": (2, False),
    "glorot_normal": (2, False),
    "glorot_uniform": (2, False),
    "orthogonal": (1, True),
    "random_uniform": (1, True),
    "random_normal": (1, True),
    "truncated_normal": (1, True),
    "variance_scaling": (1, True),
    "constant": (0, True),
}


class Initialiser(NamedTuple):
    """How the values of a tensor are drawn; see :func:`initial_values`."""

    name: str
    scale: float = 1.0


class Weights(NamedTuple):
    """A parameter tensor: its shape and how it starts."""

    shape: tuple[int, ...]
    initialiser: Initialiser


Layout = dict[str, Weights]

ZEROS, ONES = Initialiser("constant", 0.0), Initialiser("constant", 1.0)


def pick(random: Random, choices: Sequence[Any]) -> Any:
    """One of ``choices``, each equally often."""
    return choices[int(random.integers(len(choices)))]


def flip(random: Random, probability: float = 0.5) -> bool:
    """True with this probability."""
    return bool(random.random() < probability)


def log_int(random: Random, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, uniform in its logarithm before it is rounded."""
    return round(math.exp(random.uniform(math.log(low), math.log(high))))


def sample_activation(random: Random) -> str:
    """Relu as often as all but tanh together; tanh half as often as relu."""
    return _weighted(random, {name: weight for name, (weight, _) in ACTIVATIONS.items()})


def sample_initialiser(random: Random) -> Initialiser:
    """He and Glorot twice as often as the others, which come with a scale, log-uniform from .1 to 10."""
    name = _weighted(random, {name: weight for name, (weight, _) in INITIALISERS.items()})
    return Initialiser(name, log_uniform(random, 0.1, 10.0)) if INITIALISERS[name][1] else Initialiser(name)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name][1]


def initial_values(initialiser: Initialiser, random: Random, shape: tuple[int, ...]) -> Tensor:
    """Float32 values of a tensor. ``[in, out]`` is a matrix, ``[out, in, h, w]`` a convolution kernel.

    With ``n`` the inputs of a unit, ``m`` its outputs and ``s`` the scale::

        he_normal, glorot_normal, variance_scaling    normal within two deviations, of variance 2/n, 2/(n+m), s/n
        he_uniform, glorot_uniform                    uniform, of the same variances 2/n, 2/(n+m)
        orthogonal                                    s times a matrix [m, n] with orthonormal rows or columns
        random_normal, truncated_normal               normal of deviation s (TaskSet does not truncate it either)
        random_uniform, constant                      uniform in [-s, s]; s

    Example:
        >>> float(initial_values(Initialiser("constant", 2.0), np.random.default_rng(0), (3,)).sum())
        6.0
    """
    name, scale = initialiser
    fan_in, fan_out = _fans(shape)
    variance = {"he": 2.0 / fan_in, "glorot": 2.0 / (fan_in + fan_out), "variance": scale / fan_in}
    kind = name.split("_")[0]
    if name == "constant":
        values: Any = np.full(shape, scale)
    elif name == "orthogonal":
        values = scale * _orthogonal(random, shape)
    elif name == "random_uniform":
        values = random.uniform(-scale, scale, shape)
    elif name in ("random_normal", "truncated_normal"):
        values = scale * random.standard_normal(shape)
    elif name in ("he_uniform", "glorot_uniform"):
        values = random.uniform(-1.0, 1.0, shape) * math.sqrt(3.0 * variance[kind])
    elif kind in variance:
        values = _within_two(random, shape) * math.sqrt(variance[kind])
    else:
        raise ValueError(f"initialiser: expected one of {list(INITIALISERS)}, got {name!r}")
    return torch.from_numpy(np.asarray(values, np.float32))


def dense_layout(prefix: str, sizes: Sequence[int], initialiser: Initialiser, bias: bool = True) -> Layout:
    """Weights ``{prefix}w0, {prefix}b0, ...`` of dense layers of these widths, inputs included; biases are zero."""
    layout: Layout = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layout[f"{prefix}w{layer}"] = Weights((fan_in, fan_out), initialiser)
        if bias:
            layout[f"{prefix}b{layer}"] = Weights((fan_out,), ZEROS)
    return layout


def dense(params: Params, prefix: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """All layers of :func:`dense_layout` one after the other, with ``function`` between them but not after the last."""
    layer = 0
    while f"{prefix}w{layer}" in params:
        x = (function(x) if layer else x) @ params[f"{prefix}w{layer}"]
        if f"{prefix}b{layer}" in params:
            x = x + params[f"{prefix}b{layer}"]
        layer += 1
    return x


def _weighted(random: Random, weights: Mapping[str, int]) -> str:
    names = [name for name, weight in weights.items() for _ in range(weight)]
    return str(pick(random, names))


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a unit."""
    if len(shape) == 2:
        return shape
    if len(shape) == 4:
        window = shape[2] * shape[3]
        return shape[1] * window, shape[0] * window
    return max(math.prod(shape), 1), max(math.prod(shape), 1)


def _within_two(random: Random, shape: tuple[int, ...]) -> Any:
    """Normal values within two deviations, drawn again until they are, scaled to variance 1."""
    values = random.standard_normal(shape)
    while (outside := np.abs(values) > 2.0).any():
        values[outside] = random.standard_normal(int(outside.sum()))
    return values / 0.87962566103423978


def _orthogonal(random: Random, shape: tuple[int, ...]) -> Any:
    """The Q of a normal matrix, with signs such that it is uniform among orthogonal matrices."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    q, r = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))
    return (q if rows >= columns else q.T).reshape(shape)
