"""Recurrent networks on text: language models of bytes or words, and classifiers.

Cores, with x the embedded symbol and h the state before it::

    vrnn   h' = f(x W + h U + b)
    gru    z, r = sigmoid(x W + h U + b)      n = tanh(x W_n + b_n + r (h U_n))      h' = (1 - z) n + z h
    lstm   i, g, f, o = [x, h] W + b          c' = sigmoid(f + 1) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')

The gru is PyTorch's: r is applied after the product with U_n (in TaskSet before it).

Source: TaskSet (arXiv:2002.11887), families char_rnn_language_model, word_rnn_language_model, rnn_text_classification.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

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
from lopt.tasks.sampled import SampledTask, cross_entropy
from lopt.tasks.task import Batch, SplitName
from lopt.tasks.text_tasks import LanguageModel, TextData, sample_text

EMBEDDING = Initialiser("random_normal", 1.0)

#: Matrices of a core that are initialised separately, as ``W`` (from the inputs) or ``U`` (from the state).
MATRICES = {"vrnn": ("W", "U"), "gru": ("Wz", "Wr", "Wn", "Uz", "Ur", "Un"), "lstm": ("WU",)}


@dataclass(frozen=True)
class Core:
    """A recurrent core: its kind, its units, initial values of every matrix of ``MATRICES``, vrnn's activation."""

    kind: Literal["vrnn", "gru", "lstm"]
    units: int
    initialisers: tuple[Initialiser, ...]
    activation: str = "tanh"
    trainable_start: bool = False

    def layout(self, inputs: int) -> Layout:
        """Weights named ``core.*`` for this number of inputs."""
        layout: Layout = {}
        for name, initialiser in zip(MATRICES[self.kind], self.initialisers, strict=True):
            rows = {"W": inputs, "U": self.units, "WU": inputs + self.units}[name.rstrip("zrn")]
            layout[f"core.{name}"] = Weights((rows, self.units * (4 if self.kind == "lstm" else 1)), initialiser)
        gates = {"vrnn": 1, "gru": 3, "lstm": 4}[self.kind]
        layout["core.b"] = Weights((gates * self.units,), ZEROS)
        if self.trainable_start:
            layout["core.start"] = Weights((self.units * (2 if self.kind == "lstm" else 1),), ZEROS)
        return layout

    def run(self, params: Params, x: Tensor) -> Tensor:
        """States ``[rows, length, units]`` after each of the inputs ``[rows, length, inputs]``."""
        width = self.units * (2 if self.kind == "lstm" else 1)
        start = params["core.start"] if self.trainable_start else x.new_zeros(width)
        state = start.expand(len(x), width)
        # All products with the inputs at once; what is left for the loop is the products with the state.
        if self.kind == "lstm":
            from_inputs, from_state = params["core.WU"].tensor_split([x.shape[2]], dim=0)
        else:
            from_inputs, from_state = (
                torch.cat([params[f"core.{name}"] for name in MATRICES[self.kind] if name.startswith(letter)], dim=1)
                for letter in "WU"
            )
        projected = x @ from_inputs + params["core.b"]
        step = {"vrnn": self._vrnn, "gru": self._gru, "lstm": self._lstm}[self.kind]
        states = []
        for at in range(x.shape[1]):
            state = step(projected[:, at], state, from_state)
            states.append(state[:, : self.units])
        return torch.stack(states, dim=1)

    def _vrnn(self, x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return activation(self.activation)(x + h @ weight)

    def _gru(self, x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        (xz, xr, xn), (hz, hr, hn) = x.chunk(3, dim=1), (h @ weight).chunk(3, dim=1)
        z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * n + z * h

    def _lstm(self, x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        h, c = state.chunk(2, dim=1)
        i, g, f, o = (x + h @ weight).chunk(4, dim=1)
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], dim=1)


def sample_core(random: Random) -> Core:
    """Each kind equally often, 32 to 128 units; four times in five one initialiser for all matrices."""
    kind = pick(random, list(MATRICES))
    linked, first = flip(random, 0.8), sample_initialiser(random)
    others = [first if linked else sample_initialiser(random) for _ in MATRICES[kind][1:]]
    return Core(
        kind=kind,
        units=log_int(random, 32, 128),
        initialisers=(first, *others),
        activation=sample_activation(random) if kind == "vrnn" else "tanh",
        trainable_start=flip(random),
    )


@dataclass(frozen=True, kw_only=True)
class RecurrentLanguageModel(LanguageModel):
    """A recurrent language model: embedding, core, and a dense layer to the next byte or word."""

    embedding: int
    core: Core
    initialiser: Initialiser

    @property
    def name(self) -> str:
        return f"{self.family}-{self.data.label}-{self.core.kind}-{self.core.units}"

    @property
    def family(self) -> str:  # type: ignore[override]
        """Words and characters are two families of one class."""
        return f"{'word' if self.data.words else 'char'}_rnn_language_model"

    @cached_property
    def layout(self) -> Layout:
        sizes = (self.core.units, self.data.vocabulary)
        embedding = Weights((self.data.vocabulary, self.embedding), EMBEDDING)
        return {
            "embedding": embedding,
            **self.core.layout(self.embedding),
            **dense_layout("", sizes, self.initialiser),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        states = self.core.run(params, functional.embedding(batch.inputs, params["embedding"]))
        logits = dense(params, "", states, torch.relu)
        return cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def sample_char_rnn(random: Random, names: tuple[str, ...]) -> RecurrentLanguageModel:
    """Bytes, four times in five all 256 of them; embeddings of 8 to 128, windows of 10 to 160."""
    vocabulary = 256 if flip(random, 0.8) else log_int(random, 100, 256)
    return _language_model(random, names, False, vocabulary, 160)


def sample_word_rnn(random: Random, names: tuple[str, ...]) -> RecurrentLanguageModel:
    """1,000 to 30,000 words, of which the text may have fewer; windows of 10 to 256."""
    words = tuple(name for name in names if name != "names")
    return _language_model(random, words, True, log_int(random, 1000, 30000), 256)


def _language_model(
    random: Random, names: tuple[str, ...], words: bool, vocabulary: int, longest: int
) -> RecurrentLanguageModel:
    return RecurrentLanguageModel(
        embedding=log_int(random, 8, 128),
        core=sample_core(random),
        initialiser=sample_initialiser(random),
        data=sample_text(random, names, words=words, vocabulary=vocabulary, longest=longest),
    )


@dataclass(frozen=True, kw_only=True)
class RecurrentClassifier(SampledTask):
    """A recurrent classifier of text: embedding, core, one vector from all states, a dense layer.

    Args:
        readout: the vector is the last state, the mean of all or the largest value of each unit.
    """

    family: ClassVar[str] = "rnn_text_classification"

    data: TextData
    embedding: int
    core: Core
    initialiser: Initialiser
    readout: Literal["last", "avg", "max"] = "last"

    @property
    def name(self) -> str:
        return f"{self.family}-{self.data.label}-{self.core.kind}-{self.core.units}-{self.readout}"

    @cached_property
    def layout(self) -> Layout:
        sizes = (self.core.units, self.data.num_classes)
        embedding = Weights((self.data.vocabulary, self.embedding), EMBEDDING)
        return {
            "embedding": embedding,
            **self.core.layout(self.embedding),
            **dense_layout("", sizes, self.initialiser),
        }

    @property
    def loss_floor(self) -> float:
        return 0.0

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return self.data.slices(seed, split, start)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        states = self.core.run(params, functional.embedding(batch.inputs, params["embedding"]))
        if self.readout == "last":
            state = states[:, -1]
        else:
            state = states.mean(dim=1) if self.readout == "avg" else states.amax(dim=1)
        return cross_entropy(dense(params, "", state, torch.relu), batch.targets)


def sample_rnn_text_classification(random: Random, names: tuple[str, ...]) -> RecurrentClassifier:
    """100 to 10,000 words, slices of 8 to 128, embeddings of 8 to 128."""
    vocabulary = min(log_int(random, 100, 10000), 8185)
    data = sample_text(random, names, words=True, vocabulary=vocabulary, longest=128, labelled=True)
    return RecurrentClassifier(
        embedding=log_int(random, 8, 128),
        core=sample_core(random),
        initialiser=sample_initialiser(random),
        data=data,
        readout=pick(random, ["last", "avg", "max"]),
    )
