"""Streams of symbols for small language models: generated ones, and texts of which the frequent symbols are kept.

A generator draws first what the stream is, then its symbols, from one stream of random numbers, as those of
lopt/tasks/generators.py do, and for the same reason rounds what comes out of a mathematical library.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.data import catalogue
from lopt.tasks.generators import Array, log_uniform
from lopt.tasks.pieces import Random, flip, log_int, pick
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.task import SPLITS, SplitName

CHAINS = 64  # parts of a stream that are made side by side
HELD = 4096  # symbols of each split but train, of generated streams


def markov(random: Random, length: int, vocabulary: int) -> Array:
    """A Markov chain of order one or two, from noise to a grammar; one symbol in twenty is drawn evenly."""
    order = int(random.integers(1, 3)) if vocabulary <= 32 else 1
    logits = log_uniform(random, 1.0, 6.0) * random.standard_normal((vocabulary**order, vocabulary))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    ends = _ends(0.95 * weights / weights.sum(axis=1, keepdims=True) + 0.05 / vocabulary)
    steps = order + -(-length // CHAINS)
    symbols, uniform = random.integers(vocabulary, size=(steps, CHAINS)), random.random((steps, CHAINS))
    place = vocabulary ** np.arange(order)
    for at in range(order, steps):
        symbols[at] = (uniform[at, :, None] > ends[place @ symbols[at - order : at]]).sum(axis=1)
    return symbols[order:].T.reshape(-1)[:length]


def copy(random: Random, length: int, vocabulary: int) -> Array:
    """Random words of one to eight symbols, each said two to four times, in noise: what comes is what came before."""
    longest, episodes = int(random.integers(2, 9)), length // 2 + 1
    periods = random.integers(1, longest + 1, size=episodes)
    spans = periods * random.integers(2, 5, size=episodes)
    spans = spans[: int(np.searchsorted(np.cumsum(spans), length)) + 1]
    episode = np.repeat(np.arange(len(spans)), spans)
    place = np.arange(len(episode)) - np.repeat(np.cumsum(spans) - spans, spans)
    words = random.integers(vocabulary, size=(len(spans), longest))
    return _noisy(random, words[episode, place % periods[episode]], vocabulary)[:length]


def induction(random: Random, length: int, vocabulary: int) -> Array:
    """Pairs of a key and its value, in episodes of 8 to 32 pairs, each with values of its own: the value of a key that
    came before can be looked up, that of another cannot be known."""
    keys, size = vocabulary // 2, int(random.integers(8, 33))
    used = int(random.integers(2, min(keys, 8) + 1))
    episodes = -(-length // (2 * size))
    values = random.integers(keys, vocabulary, size=(episodes, keys))
    some = np.argsort(random.random((episodes, keys)), axis=1)[:, :used]
    chosen = np.take_along_axis(some, random.integers(used, size=(episodes, size)), axis=1)
    pairs = np.stack([chosen, np.take_along_axis(values, chosen, axis=1)], axis=2)
    return pairs.reshape(-1)[:length]


def brackets(random: Random, length: int, vocabulary: int) -> Array:
    """Nested brackets of several kinds, between them other symbols: what may be closed is what was opened last."""
    kinds, deepest = vocabulary // 4, int(random.integers(2, 9))
    filled, opens = float(random.uniform(0.0, 0.4)), float(random.uniform(0.35, 0.6))
    steps = -(-length // CHAINS)
    kind, uniform = random.integers(kinds, size=(steps, CHAINS)), random.random((2, steps, CHAINS))
    filler = random.integers(2 * kinds, vocabulary, size=(steps, CHAINS))
    stack, depth = np.zeros((deepest, CHAINS), dtype=np.int64), np.zeros(CHAINS, dtype=np.int64)
    chain, symbols = np.arange(CHAINS), np.empty((steps, CHAINS), dtype=np.int64)
    for at in range(steps):
        fill = uniform[0, at] < filled
        opened = ~fill & (depth < deepest) & ((depth == 0) | (uniform[1, at] < opens))
        closed = ~fill & ~opened
        top = stack[np.maximum(depth - 1, 0), chain]
        symbols[at] = np.where(fill, filler[at], np.where(opened, kind[at], kinds + top))
        stack[depth[opened], chain[opened]] = kind[at, opened]
        depth += opened.astype(np.int64) - closed
    return symbols.T.reshape(-1)[:length]


def words(random: Random, length: int, vocabulary: int) -> Array:
    """Every symbol is a word: the k-th is as frequent as ``k^-a``, ``a`` from .7 to 1.3, and a share of them follow
    from the one before."""
    return _words(random, length, vocabulary)


def spelling(random: Random, length: int, vocabulary: int) -> Array:
    """The letters of :func:`words` out of 20 to 400 of one to six letters, with a space after each."""
    size = int(log_uniform(random, 20.0, 400.999))
    letters = random.integers(1, vocabulary, size=(size, 7))
    ends = np.minimum(1 + random.integers(6, size=size), 1 + np.arange(size) // 4)  # frequent words are short
    letters[np.arange(size), ends] = 0
    said = _words(random, -(-length // 2), size)
    return letters[said][np.arange(7) <= ends[said, None]][:length]


GENERATORS: dict[str, Callable[[Random, int, int], Array]] = {
    "markov": markov,
    "copy": copy,
    "induction": induction,
    "brackets": brackets,
    "words": words,
    "spelling": spelling,
}


def _words(random: Random, length: int, size: int) -> Array:
    frequencies = np.arange(1.0, size + 1.0) ** -random.uniform(0.7, 1.3)
    ends, linked = _ends(frequencies / frequencies.sum()), float(random.uniform(0.2, 0.8))
    steps = -(-length // CHAINS)
    drawn = np.searchsorted(ends, random.random((steps, CHAINS)), side="right")
    following = np.searchsorted(ends, random.random((size, 2)), side="right")
    follows, which = random.random((steps, CHAINS)) < linked, random.integers(2, size=(steps, CHAINS))
    for at in range(1, steps):
        drawn[at] = np.where(follows[at], following[drawn[at - 1], which[at]], drawn[at])
    return drawn.T.reshape(-1)[:length]


def _noisy(random: Random, symbols: Array, vocabulary: int) -> Array:
    """One to ten in a hundred symbols are drawn anew."""
    wrong = random.random(len(symbols)) < log_uniform(random, 0.01, 0.1)
    return np.where(wrong, random.integers(vocabulary, size=len(symbols)), symbols)


def _ends(probabilities: Array) -> Array:
    """Where the interval of each symbol but the last ends, in [0, 1]."""
    return np.asarray(np.round(np.cumsum(probabilities, axis=-1) * 4096.0) / 4096.0)[..., :-1]


@dataclass(frozen=True)
class StreamData:
    """Which stream of symbols a task sees, and how many windows of it at once.

    Args:
        name: of ``GENERATORS``, or of a text of :mod:`lopt.tasks.data`.
        seed: of a generated stream; of a text which of the texts of that name.
        vocabulary: number of symbols; of texts the most frequent ones, of which the last counts for all others.
        train_symbols: how many symbols are trained on.
        words: symbols of a text are its words, not its bytes.
        batch_size: windows in a minibatch.
    """

    name: str
    seed: int = 0
    vocabulary: int = 32
    train_symbols: int = 10_000
    words: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.vocabulary < 4:
            raise ValueError(f"vocabulary: expected at least 4 symbols, got {self.vocabulary}")
        if self.name in GENERATORS and self.words:
            raise ValueError(f"words: expected False, as the symbols of {self.name!r} are what they are")

    def __getstate__(self) -> dict[str, Any]:
        """The fields, so that a task travels to other processes without its symbols."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """The name, with what of it."""
        return f"{self.name}{'-words' if self.words else ''}-{self.vocabulary}"

    def symbols(self, split: SplitName) -> Tensor:
        """The stream of a split, ``[n]`` int64.

        Raises:
            FileNotFoundError, ModuleNotFoundError: the text is not here; the message says how to get it.
        """
        return self._symbols[split]

    @cached_property
    def _symbols(self) -> dict[SplitName, Tensor]:
        if self.name in GENERATORS:
            lengths = [self.train_symbols if split == "train" else HELD for split in SPLITS]
            stream = GENERATORS[self.name](generator(self.seed, "stream"), sum(lengths), self.vocabulary)
            parts = np.split(stream.astype(np.int64), np.cumsum(lengths)[:-1])
            return {split: torch.from_numpy(part) for split, part in zip(SPLITS, parts, strict=True)}
        corpus = catalogue.corpus(self.name, self.seed)
        documents = corpus.words if self.words else corpus.splits
        streams = {split: documents[split].symbols.to(torch.int64) for split in SPLITS}
        known = 1 + max(int(stream.max()) for stream in streams.values())
        counts = torch.bincount(streams["train"], minlength=known)
        rank = torch.empty_like(counts)
        rank[torch.argsort(counts, descending=True, stable=True)] = torch.arange(known)
        ranked = {split: rank[stream].clamp_max(self.vocabulary - 1) for split, stream in streams.items()}
        return {**ranked, "train": ranked["train"][: self.train_symbols]}

    def windows(self, seed: int, split: SplitName, length: int, start: int = 0) -> Iterator[Tensor]:
        """Windows ``[batch_size, length]`` from anywhere in the stream.

        Raises:
            ValueError: the stream is shorter than a window.
        """
        symbols = self.symbols(split)
        places, key = len(symbols) - length + 1, minibatch_key(seed, split)
        if places < 1:
            raise ValueError(
                f"length: expected at most the {len(symbols)} symbols of {self.name}, {split}, got {length}"
            )
        for step in itertools.count(start):
            begin = torch.from_numpy(minibatch_rows(key, step, self.batch_size, places))
            yield symbols[begin[:, None] + torch.arange(length)]


def sample_stream(random: Random, names: tuple[str, ...]) -> StreamData:
    """A generator, or one of the texts among ``names``, each equally often; 8 to 64 symbols, of words 16 to 128; 500 to
    100,000 symbols to train on; minibatches of 8 to 64 windows."""
    texts = [name for name in names if catalogue.is_text(name) and name not in GENERATORS]
    name = pick(random, [*GENERATORS, *texts])
    generated = name in GENERATORS
    whole = name == "words" or (not generated and name != "names" and flip(random))
    return StreamData(
        name=name,
        seed=int(random.integers(2**31 if generated else catalogue.variants(name))),
        vocabulary=log_int(random, 16, 128) if whole else log_int(random, 8, 64),
        train_symbols=int(log_uniform(random, 500.0, 100_000.0)),
        words=whole and not generated,
        batch_size=int(random.choice([8, 16, 32, 64])),
    )
