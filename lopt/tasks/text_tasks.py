"""Texts for tasks: windows of a text for language models, slices of labelled documents for classifiers."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lopt.tasks.data import catalogue
from lopt.tasks.data.texts import Documents
from lopt.tasks.pieces import Random, flip, log_int, pick
from lopt.tasks.sampled import SampledTask
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.task import Batch, SplitName


@dataclass(frozen=True)
class TextData:
    """Which text a task sees, and how much of it at once.

    Args:
        name: of a text of :mod:`lopt.tasks.data`.
        variant: which of the texts of that name, for generated ones.
        words: symbols are words by falling frequency, not bytes.
        vocabulary: symbols from this number on count as the last one below it.
        length: symbols in a window or slice.
        batch_size: windows in a minibatch.
        train_share: share of the training text that is used.
        just_train: all four splits are the training text.
    """

    name: str
    variant: int = 0
    words: bool = False
    vocabulary: int = 256
    length: int = 32
    batch_size: int = 32
    train_share: float = 1.0
    just_train: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """The fields, so that a task travels to other processes without its text."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_classes(self) -> int:
        """Number of classes of the documents."""
        return catalogue.describe(self.name, self.variant).num_classes

    @property
    def label(self) -> str:
        """The name, with the number of the variant where there are several."""
        return f"{self.name}-{self.variant}" if catalogue.variants(self.name) > 1 else self.name

    def documents(self, split: SplitName) -> Documents:
        """The documents of a split, their symbols below ``vocabulary``.

        Raises:
            FileNotFoundError, ModuleNotFoundError: the text is not here; the message says how to get it.
        """
        return self._documents["train" if self.just_train else split]

    @cached_property
    def _documents(self) -> dict[SplitName, Documents]:
        corpus = catalogue.corpus(self.name, self.variant)
        splits = dict(corpus.words if self.words else corpus.splits)
        symbols, starts, classes = splits["train"]
        used = max(1, round(self.train_share * len(starts)))
        end = int(starts[used]) if used < len(starts) else len(symbols)
        splits["train"] = Documents(symbols[:end], starts[:used], classes[:used])
        last = self.vocabulary - 1
        return {
            split: part._replace(symbols=part.symbols.to(torch.int64).clamp_max(last)) for split, part in splits.items()
        }

    def windows(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        """Symbols ``[batch_size, length - 1]`` from anywhere in the text, and those that follow each of them."""
        symbols = self.documents(split).symbols
        places = len(symbols) - self.length + 1
        if places < 1:
            raise ValueError(
                f"length: expected at most the {len(symbols)} symbols of {self.name}, {split}, got {self.length}"
            )
        key, offsets = minibatch_key(seed, split), torch.arange(self.length)
        for step in itertools.count(start):
            begin = torch.from_numpy(minibatch_rows(key, step, self.batch_size, places))
            window = symbols[begin[:, None] + offsets]
            yield Batch(window[:, :-1], window[:, 1:])

    def slices(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        """Slices ``[batch_size, length]`` of documents, filled up with symbol 0, and the documents' classes."""
        symbols, starts, classes = self.documents(split)
        ends = torch.cat([starts[1:], torch.tensor([len(symbols)])])
        key, offsets = minibatch_key(seed, split), torch.arange(self.length)
        for step in itertools.count(start):
            row = torch.from_numpy(minibatch_rows(key, step, self.batch_size, len(starts)))
            spare = (ends[row] - starts[row] - self.length).clamp_min(0)
            uniform = torch.from_numpy(generator(seed, "slices", split, step).random(self.batch_size))
            begin = starts[row] + (uniform * (spare + 1)).to(torch.int64)
            index = begin[:, None] + offsets
            inside = index < ends[row, None]
            yield Batch(torch.where(inside, symbols[index.clamp_max(len(symbols) - 1)], 0), classes[row])


def sample_text(
    random: Random, names: tuple[str, ...], *, words: bool, vocabulary: int, longest: int, labelled: bool = False
) -> TextData:
    """TaskSet's choices about text: length log-uniform from 10 (with labels 8), minibatches of 8 to 512 windows.

    One in five uses only a part of the training text, one in five has only training text.
    """
    name = pick(random, catalogue.of_kind(names, ("labelled text",) if labelled else ("text",)))
    return TextData(
        name=name,
        variant=int(random.integers(catalogue.variants(name))),
        words=words and name != "names",  # a name is one word
        vocabulary=vocabulary,
        length=log_int(random, 8 if labelled else 10, longest),
        batch_size=log_int(random, 8, 512),
        train_share=float(f"{random.uniform(0.02, 1.0):.3g}") if flip(random, 0.2) else 1.0,
        just_train=flip(random, 0.2),
    )


@dataclass(frozen=True, kw_only=True)
class LanguageModel(SampledTask):
    """Predicts every symbol from those before it; the loss is cross-entropy in nats per symbol."""

    data: TextData

    @property
    def loss_floor(self) -> float:
        return 0.0

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return self.data.windows(seed, split, start)
