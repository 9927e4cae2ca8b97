"""Rows of synthetic data sets.

A generator draws first what a data set is, then its rows, from one stream of random numbers. It gives inputs
``[rows, inputs]``, of a size of about one, and labels ``[rows]`` or values ``[rows, outputs]``. Rows are independent,
so that any of them can be held out.

The data is the same on every machine: it is drawn with NumPy's PCG64 and computed in float64, and what comes out of
matrix products and functions is rounded to multiples of 2^-12, so that neither the order of a sum nor a machine's
mathematical library shows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

Data = Literal[
    "mixture",
    "teacher",
    "low_rank",
    "patches",
    "linear",
    "logistic",
    "index",
    "sequence",
    "sheets",
    "words",
    "spectrum",
]
Random = np.random.Generator
Array = np.ndarray[Any, np.dtype[Any]]


def mixture(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Gaussian clouds, one to three per class, whose centres are 1.5 to 6 standard deviations apart."""
    clouds = outputs * int(random.integers(1, 4))
    centres = random.standard_normal((clouds, inputs)) * log_uniform(random, 1.5, 6.0) / math.sqrt(2 * inputs)
    spread = random.uniform(0.7, 1.4, clouds)
    cloud = random.integers(clouds, size=rows)
    return centres[cloud] + spread[cloud, None] * random.standard_normal((rows, inputs)), cloud % outputs


def teacher(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Values of a random tanh network with one or two hidden layers of 4 to 32."""
    x = random.standard_normal((rows, inputs))
    return x, _network(random, x, outputs)


def low_rank(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Points near a subspace of at most half the dimensions, half of the time bent by tanh; values are the inputs."""
    rank = int(random.integers(1, max(inputs // 2, 1) + 1))
    scales = log_uniform(random, 0.5, 1.0) ** np.arange(rank)
    basis = random.standard_normal((rank, inputs)) / math.sqrt(np.square(scales).sum())
    x = _product(random.standard_normal((rows, rank)) * scales, basis)
    if random.random() < 0.5:
        x = np.tanh(1.5 * x)
    x = _round(x + log_uniform(random, 0.01, 0.3) * random.standard_normal((rows, inputs)))
    return x, x


def patches(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Square images in [0, 1] of one to three blurred strokes, upright or lying; values are the inputs."""
    side, strokes = math.isqrt(inputs), int(random.integers(1, 4))
    centre = random.uniform(0.0, side - 1.0, (2, rows, strokes, 1))
    width = side * random.uniform(0.08, 0.4, (2, rows, strokes, 1))
    down, across = np.exp(-np.square((np.arange(side) - centre) / width))
    x = sum(down[:, k, :, None] * across[:, k, None, :] for k in range(strokes))
    x = _round(np.minimum(x, 1.0).reshape(rows, inputs))
    return x, x


def linear(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Linear functions of inputs whose standard deviations along the principal axes differ by up to 10^1.5.

    A fifth of the inputs or more take part; the axes are turned by a reflection.
    """
    scales = 10.0 ** -random.uniform(0.0, random.uniform(0.0, 1.5), inputs)
    x = _stretched(random, random.standard_normal((rows, inputs)), scales)
    used = random.random(inputs) < random.uniform(0.2, 1.0)
    used[random.integers(inputs)] = True
    coefficients = random.standard_normal((inputs, outputs)) * used[:, None] / math.sqrt(used.sum())
    return x, _round(_product(x, coefficients))


def logistic(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Labels drawn with probabilities ``softmax(gain * values)`` of linear values, ``gain`` from 1 to 10."""
    x, values = linear(random, rows, inputs, outputs)
    gain = log_uniform(random, 1.0, 10.0)
    return x, _round(gain * values + random.gumbel(size=values.shape)).argmax(axis=1)


def index(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Values that depend on one to three directions of the inputs only: each bent in its way, and their product."""
    x = random.standard_normal((rows, inputs))
    directions = random.standard_normal((inputs, int(random.integers(1, 4))))
    z = _product(x, directions / np.sqrt(np.square(directions).sum(axis=0))).T
    bends: tuple[Callable[[Array], Array], ...] = (
        np.abs,
        np.square,
        lambda v: np.tanh(2.0 * v),
        lambda v: np.sin(2.0 * v),
    )
    terms = [bends[int(random.integers(len(bends)))](row) for row in z] + [z.prod(axis=0)]
    values = np.stack([term - term.mean() for term in terms], axis=1)
    return x, _round(_product(values, random.standard_normal((len(terms), outputs))) / math.sqrt(len(terms)))


def sequence(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Windows of one-hot symbols, and the next symbol, of a Markov chain of order one to three.

    There are ``outputs`` symbols and ``inputs / outputs`` of them in a window. One symbol in ten is drawn evenly (so
    that no chain gets stuck), the others by a softmax of normal values times 1 to 10: from noise to a grammar.
    """
    window = inputs // outputs
    order = min(int(random.integers(1, 4)), window, 2 if outputs > 8 else 3)
    logits = log_uniform(random, 1.0, 10.0) * random.standard_normal((outputs**order, outputs))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = 0.9 * weights / weights.sum(axis=1, keepdims=True) + 0.1 / outputs
    ends = _round(np.cumsum(probabilities, axis=1))[:, :-1]
    symbols = random.integers(outputs, size=(rows, order + window + 1))
    place = outputs ** np.arange(order)
    for at in range(order, symbols.shape[1]):
        state = symbols[:, at - order : at] @ place
        symbols[:, at] = (random.random((rows, 1)) > ends[state]).sum(axis=1)
    return np.eye(outputs)[symbols[:, order:-1]].reshape(rows, inputs), symbols[:, -1]


def sheets(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Classes that hardly overlap: every class is a smooth curved sheet of one to eight dimensions, with little noise.

    Coordinates ``z`` on the sheet of class ``c`` are normal, and ``x = W sin(A_c z + b_c)``, with one ``W`` for all.
    """
    dims = int(random.integers(1, min(8, max(1, inputs // 2)) + 1))
    bends = log_uniform(random, 0.2, 2.0) / math.sqrt(dims) * random.standard_normal((outputs, dims, 32))
    phases = random.uniform(0.0, 2.0 * math.pi, (outputs, 32))
    labels = random.integers(outputs, size=rows)
    z = random.standard_normal((rows, dims))
    waves = np.sin(np.einsum("ij,ijk->ik", z, bends[labels]) + phases[labels])
    x = _product(waves, random.standard_normal((32, inputs)) / 4.0)
    return _round(x + log_uniform(random, 0.02, 0.3) * random.standard_normal((rows, inputs))), labels


def words(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Counts of the words of short texts: rare words, most of them, have a gradient in few minibatches.

    A text has one to sixteen of ``inputs`` words, the k-th most frequent in proportion to ``k^-a``, ``a`` from .7 to
    1.5. Labels are drawn with probabilities ``softmax(gain * values)`` of sums of a normal value for each word and
    class, ``gain`` from 1 to 10.
    """
    length = int(log_uniform(random, 1.0, 16.999))
    frequencies = np.arange(1.0, inputs + 1.0) ** -random.uniform(0.7, 1.5)
    ends = _round(np.cumsum(frequencies) / frequencies.sum())[:-1]
    drawn = np.searchsorted(ends, random.random((rows, length)), side="right")
    counts = np.zeros((rows, inputs))
    np.add.at(counts, (np.arange(rows)[:, None], drawn), 1.0)
    gain = log_uniform(random, 1.0, 10.0) / math.sqrt(length)
    values = gain * _product(counts, random.standard_normal((inputs, outputs)))
    return _round(counts / math.sqrt(length)), _round(values + random.gumbel(size=values.shape)).argmax(axis=1)


def spectrum(random: Random, rows: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Inputs of standard deviation ``k^-a`` along the k-th principal axis, ``a`` from .5 to 1.5, as in natural images.

    Values are those of a :func:`teacher` that sees all axes alike, so that the loss goes on falling for long.
    """
    z = random.standard_normal((rows, inputs))
    scales = np.arange(1.0, inputs + 1.0) ** -random.uniform(0.5, 1.5)
    return _stretched(random, z, scales), _network(random, z, outputs)


class Kind(NamedTuple):
    """A generator, and what it can be used for."""

    rows: Callable[[Random, int, int, int], tuple[Array, Array]]
    classes: bool  # labels, or values of which the largest is the label
    values: bool
    autoencoder: bool = False  # values are the inputs


KINDS: dict[Data, Kind] = {
    "mixture": Kind(mixture, classes=True, values=False),
    "teacher": Kind(teacher, classes=True, values=True),
    "low_rank": Kind(low_rank, classes=False, values=True, autoencoder=True),
    "patches": Kind(patches, classes=False, values=True, autoencoder=True),
    "linear": Kind(linear, classes=False, values=True),
    "logistic": Kind(logistic, classes=True, values=False),
    "index": Kind(index, classes=True, values=True),
    "sequence": Kind(sequence, classes=True, values=False),
    "sheets": Kind(sheets, classes=True, values=False),
    "words": Kind(words, classes=True, values=False),
    "spectrum": Kind(spectrum, classes=True, values=True),
}


def log_uniform(random: Random, low: float, high: float) -> float:
    """A number between ``low`` and ``high``, uniform in its logarithm, to four digits."""
    return float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.4g}")


def _network(random: Random, x: Array, outputs: int) -> Array:
    """Values ``[rows, outputs]`` of a random tanh network with one or two hidden layers of 4 to 32."""
    width = int(random.integers(4, 33))
    for _ in range(int(random.integers(1, 3))):
        fan_in = x.shape[1]
        x = np.tanh(_product(x, random.standard_normal((fan_in, width))) * 1.5 / math.sqrt(fan_in))
    return _round(_product(x, random.standard_normal((width, outputs))) * 1.5 / math.sqrt(width))


def _stretched(random: Random, z: Array, scales: Array) -> Array:
    """Normal rows with these standard deviations along the axes, of 1 on average, turned by a random reflection."""
    x = z * scales / math.sqrt(np.square(scales).mean())
    axis = random.standard_normal(z.shape[1])
    return _round(x - _product(x, axis[:, None]) * axis * 2.0 / np.square(axis).sum())


def _product(a: Array, b: Array) -> Array:
    """``a @ b`` without BLAS, whose threads cost more than products of this size."""
    return np.asarray(np.einsum("ij,kj->ik", a, np.ascontiguousarray(b.T)))


def _round(values: Array) -> Array:
    return np.round(values * 4096.0) / 4096.0
