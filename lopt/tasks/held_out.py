"""Perceptrons on real data (two of the data sets are formulas), for evaluation alone.

A data set has four fixed splits, as in :mod:`lopt.tasks.datasets`: 60% train, 10% inner_valid, 10% outer_valid, 20%
test. Inputs are standardised with mean and deviation of the training rows: table columns and regression targets each by
their own, images by one of all pixels. Data that is not here makes a task unavailable; nothing is downloaded.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopt.tasks import datasets
from lopt.tasks.seeds import generator
from lopt.tasks.task import SPLITS, Batch, SplitName, Task

#: Part of every fingerprint: raise it when the meaning of a task or of a reference run changes.
VERSION = 1

DataName = Literal[
    "digits",
    "breast-cancer",
    "wine",
    "diabetes",
    "spirals",
    "friedman1",
    "characters",
    "fashion-mnist",
    "fashion-mnist-7x7",
]


SHARES: dict[SplitName, float] = {"train": 0.6, "inner_valid": 0.1, "outer_valid": 0.1, "test": 0.2}

#: Contexts of ``characters`` are this many characters long; the alphabet is a to z, space, and one for the rest.
CONTEXT = 3
ALPHABET = 28
WINDOWS = 40_000

Splits = dict[SplitName, Batch]


@dataclass(frozen=True, kw_only=True)
class HeldOutTask(Task):
    """A perceptron on one data set: cross-entropy for classes, mean squared error for values.

    Minibatches are those of training by epochs: every epoch is a new permutation without its incomplete rest.

    Args:
        data: where rows come from.
        sizes: widths of all layers, inputs and outputs included.
        activation: of the hidden layers.
        autoencoder: the targets are the inputs.
        batch_size: rows of a minibatch (all rows of a split that has fewer).
        folder: with the four IDX files, for Fashion-MNIST only.

    Example:
        >>> task = HeldOutTask(data="wine", sizes=(13, 16, 3))
        >>> [(split, len(rows.targets)) for split, rows in task.splits.items()]
        [('train', 107), ('inner_valid', 18), ('outer_valid', 17), ('test', 36)]
    """

    data: DataName
    sizes: tuple[int, ...]
    activation: Literal["relu", "tanh"] = "relu"
    autoencoder: bool = False
    batch_size: int = 32
    folder: Path | None = None

    @property
    def name(self) -> str:
        kind = ("-tanh" if self.activation == "tanh" else "") + ("-ae" if self.autoencoder else "")
        return f"{self.data}-{'-'.join(map(str, self.sizes[1:]))}{kind}"

    @property
    def config(self) -> dict[str, Any]:
        return {
            "type": "HeldOutTask",
            "data": self.data,
            "sizes": list(self.sizes),
            "activation": self.activation,
            "autoencoder": self.autoencoder,
            "batch_size": self.batch_size,
        }

    @property
    def splits(self) -> Splits:
        """The rows of every split.

        Raises:
            FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        """
        splits = load(self.data, self.folder)
        if self.autoencoder:
            return {name: Batch(rows.inputs, rows.inputs) for name, rows in splits.items()}
        return splits

    @property
    def unavailable(self) -> str | None:
        """Why the data cannot be had here; None if it can."""
        try:
            self.splits  # noqa: B018
        except (ModuleNotFoundError, FileNotFoundError) as error:
            return str(error)
        return None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a result depends on: version, sizes, every row, initial parameters, minibatches."""
        digest = hashlib.sha256(json.dumps([VERSION, self.config]).encode())
        first = next(self.batches(0, "train"))
        for tensor in (*itertools.chain(*(self.splits[name] for name in SPLITS)), *self.init(0).values(), *first):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def data_sha256(self) -> str:
        """SHA-256 of all rows: which text, which edition of a data set."""
        tensors = itertools.chain(*(self.splits[name] for name in SPLITS))
        return hashlib.sha256(
            b"".join(hashlib.sha256(rows.contiguous().numpy().data).digest() for rows in tensors)
        ).hexdigest()

    def init(self, seed: int) -> dict[str, Tensor]:
        random = generator(seed, "init")
        params = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(self.sizes)):
            for name, shape in ((f"w{layer}", (fan_in, fan_out)), (f"b{layer}", (fan_out,))):
                params[name] = _float32(random.uniform(-1.0, 1.0, shape) / math.sqrt(fan_in))
        return params

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        activation = torch.relu if self.activation == "relu" else torch.tanh
        last = len(self.sizes) - 2
        x = batch.inputs
        for layer in range(last):
            x = activation(x @ params[f"w{layer}"] + params[f"b{layer}"])
        x = x @ params[f"w{last}"] + params[f"b{last}"]
        loss = functional.mse_loss if batch.targets.is_floating_point() else functional.cross_entropy
        return loss(x, batch.targets)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        inputs, targets = self.splits[split]
        size = min(self.batch_size, len(inputs))
        per_epoch = len(inputs) // size
        for epoch in itertools.count(start // per_epoch):
            order = torch.from_numpy(generator(seed, "minibatches", split, epoch).permutation(len(inputs)))
            for index in order[: per_epoch * size].view(-1, size)[max(start - epoch * per_epoch, 0) :]:
                yield Batch(inputs[index], targets[index])


@cache
def load(data: DataName, folder: Path | None = None) -> Splits:
    """The four standardised splits of a data set; kept in memory.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        ValueError: broken files.
    """
    if data == "digits":
        return _images(datasets.digits())
    if data in ("fashion-mnist", "fashion-mnist-7x7"):
        images = datasets.idx_folder(folder or datasets.FASHION_MNIST_FOLDER, "fashion-mnist")
        return _images(images, pool=4 if data == "fashion-mnist-7x7" else 1)
    if data == "characters":
        return _windows(_text())
    inputs, targets = _spirals() if data == "spirals" else _friedman1() if data == "friedman1" else _sklearn(data)
    order = np.random.RandomState(0).permutation(len(inputs))  # a stream that NumPy has frozen
    rows = _split(torch.from_numpy(inputs[order]), torch.from_numpy(targets[order]))
    inputs_of, targets_of = ({name: batch[i] for name, batch in rows.items()} for i in range(2))
    inputs_of = _standardise(inputs_of)
    if targets.dtype.kind == "f":
        targets_of = _standardise({name: values.view(-1, 1) for name, values in targets_of.items()})
    return {name: Batch(inputs_of[name], targets_of[name]) for name in SPLITS}


def _standardise(values: dict[SplitName, Tensor]) -> dict[SplitName, Tensor]:
    """Columns with the mean of the training rows taken away, in units of their deviation."""
    mean, std = values["train"].mean(0), values["train"].std(0).clamp_min(1e-12)
    return {name: ((value - mean) / std).to(torch.float32) for name, value in values.items()}


def _split(inputs: Tensor, targets: Tensor) -> Splits:
    """Rows that are in random order already, cut by ``SHARES``."""
    ends = [round(end * len(inputs)) for end in itertools.accumulate(SHARES.values())]
    cuts = zip(SHARES, [0, *ends[:-1]], ends, strict=True)
    return {name: Batch(inputs[begin:end], targets[begin:end]) for name, begin, end in cuts}


def _images(data: datasets.Dataset, pool: int = 1) -> Splits:
    """Flat pixels, averaged over squares of ``pool`` pixels, then with the mean and deviation of all taken away."""
    splits: dict[SplitName, datasets.Split] = {name: getattr(data, name) for name in SPLITS}
    flat = {name: functional.avg_pool2d(rows.inputs[:, None], pool).flatten(1) for name, rows in splits.items()}
    mean, std = flat["train"].mean(), flat["train"].std()
    return {name: Batch((flat[name] - mean) / std, rows.targets) for name, rows in splits.items()}


def _sklearn(data: DataName) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
    except ModuleNotFoundError as error:
        remedy = datasets.REMEDY["digits"]
        raise ModuleNotFoundError(f"data set {data}: scikit-learn is missing; {remedy}") from error
    bunch = {"breast-cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}[data]()
    targets = bunch.target
    return bunch.data, targets if targets.dtype.kind == "f" else targets.astype(np.int64)


def _spirals(rows: int = 1500, arms: int = 3) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Points on interleaved spiral arms of one turn each, with noise: inputs [rows, 2], arm [rows]."""
    random = generator(0, "spirals")
    arm = random.integers(arms, size=rows)
    radius = np.sqrt(random.uniform(0.01, 1.0, rows))
    angle = 2 * np.pi * (radius + arm / arms)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.03 * random.standard_normal((rows, 2)), arm


def _friedman1(rows: int = 2000) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + N(0, 1)`` of ten uniform inputs, five of them idle.

    Source: J. Friedman, Multivariate adaptive regression splines, Annals of Statistics 19 (1991).
    """
    random = generator(0, "friedman1")
    x = random.uniform(size=(rows, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, y + random.standard_normal(rows)


def _text() -> str:
    """The topics of Python's help(), English prose; they change with the version of Python."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        remedy = "install the whole standard library of this Python"
        raise ModuleNotFoundError(f"data set characters: pydoc_data is missing; {remedy}") from error
    return "\n".join(topics[name] for name in sorted(topics))


def _windows(text: str) -> Splits:
    """Three characters, one-hot [windows, 84], and the next one; the splits are consecutive parts of the text."""
    plain = " ".join(text.lower().split())[: WINDOWS + CONTEXT]
    symbols = torch.tensor([26 if c == " " else ord(c) - 97 if "a" <= c <= "z" else 27 for c in plain])
    windows = symbols.unfold(0, CONTEXT + 1, 1)
    one_hot = functional.one_hot(windows[:, :CONTEXT], ALPHABET).flatten(1)
    return _split(one_hot.to(torch.float32), windows[:, CONTEXT].clone())


def _float32(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
