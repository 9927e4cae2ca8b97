"""Streams of symbols: every generator against what it says of its symbols, and the windows that tasks draw."""

import dataclasses
import pickle
import zlib
from itertools import islice

import numpy as np
import pytest
import torch

from lopt.tasks.data import catalogue
from lopt.tasks.data.texts import corpus_of
from lopt.tasks.generators import Array, log_uniform
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.streams import (
    CHAINS,
    GENERATORS,
    HELD,
    StreamData,
    brackets,
    copy,
    induction,
    markov,
    sample_stream,
    spelling,
    words,
)
from lopt.tasks.task import SPLITS

LENGTH = 64_000


def entropy(counts: Array) -> float:
    """Of the last dimension, in nats, a mean over the others by how often they come."""
    shares = counts / counts.sum()
    given = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return float(-(shares * np.log(np.maximum(given, 1e-12))).sum())


def pairs(symbols: Array, vocabulary: int) -> Array:
    """How often a symbol (column) comes after another (row)."""
    return np.bincount(symbols[:-1] * vocabulary + symbols[1:], minlength=vocabulary**2).reshape(vocabulary, vocabulary)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("vocabulary", [4, 17, 64])
def test_streams_have_their_length_and_their_symbols(name: str, vocabulary: int) -> None:
    for length in (1, 100, 5001):
        symbols = GENERATORS[name](generator(1), length, vocabulary)
        assert symbols.shape == (length,)
        assert symbols.min() >= 0
        assert symbols.max() < vocabulary
    assert len(np.unique(symbols)) > vocabulary / 2


@pytest.mark.parametrize("seed", range(3))
def test_markov_follows_its_probabilities(seed: int) -> None:
    """Order one, as there are more than 32 symbols: counts within five deviations of the softmax."""
    symbols, random = markov(generator(seed), LENGTH, 40), generator(seed)
    logits = log_uniform(random, 1.0, 6.0) * random.standard_normal((40, 40))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = 0.95 * weights / weights.sum(axis=1, keepdims=True) + 0.05 / 40
    counts = pairs(symbols, 40)
    total = counts.sum(axis=1, keepdims=True)
    deviation = np.sqrt(total * expected * (1 - expected)) + 1e-3 * total + 1.0  # ends are rounded; chains are joined
    assert (np.abs(counts - total * expected) / deviation).max() < 5


def test_markov_chains_of_order_two_know_more_than_the_last_symbol() -> None:
    seed = next(seed for seed in range(20) if generator(seed).integers(1, 3) == 2)
    symbols = markov(generator(seed), LENGTH, 8)
    two = np.bincount((symbols[:-2] * 8 + symbols[1:-1]) * 8 + symbols[2:], minlength=512).reshape(8, 8, 8)
    assert entropy(two) < entropy(pairs(symbols, 8)) - 0.1


@pytest.mark.parametrize("seed", range(4))
def test_copies_repeat_what_came_before(seed: int) -> None:
    """Half of the symbols or more are those of one of the eight places before, beyond what chance would have."""
    symbols = copy(generator(seed), LENGTH, 64)
    longest = int(generator(seed).integers(2, 9))
    best = np.mean([max(symbols[at - p] == symbols[at] for p in range(1, longest + 1)) for at in range(8, 4000)])
    assert best > 0.5
    assert entropy(np.bincount(symbols)) > np.log(64) - 0.05


@pytest.mark.parametrize("seed", range(4))
def test_induction_gives_a_key_the_same_value_in_an_episode(seed: int) -> None:
    vocabulary, size = 20, int(generator(seed).integers(8, 33))
    symbols = induction(generator(seed), 200 * 2 * size, vocabulary).reshape(200, size, 2)
    keys, values = symbols[..., 0], symbols[..., 1]
    assert keys.max() < vocabulary // 2 <= values.min()
    known = 0
    for episode_keys, episode_values in zip(keys.tolist(), values.tolist(), strict=True):
        table: dict[int, int] = {}
        for key, value in zip(episode_keys, episode_values, strict=True):
            known += key in table
            assert table.setdefault(key, value) == value
    assert known > 0.5 * keys.size
    shares = [len(np.unique(values[keys == key])) for key in np.unique(keys)]
    assert min(shares) > 1  # but another one in another episode


@pytest.mark.parametrize("seed", range(4))
def test_brackets_close_what_was_opened_last(seed: int) -> None:
    vocabulary, kinds = 21, 5
    chains = brackets(generator(seed), LENGTH, vocabulary).reshape(CHAINS, -1)
    deepest = int(generator(seed).integers(2, 9))
    depths, fillers = [], 0
    for chain in chains.tolist():
        stack: list[int] = []
        for symbol in chain:
            if symbol < kinds:
                stack.append(symbol)
            elif symbol < 2 * kinds:
                assert stack.pop() == symbol - kinds
            else:
                fillers += 1
            depths.append(len(stack))
    assert max(depths) == deepest
    assert 0 <= fillers < 0.45 * LENGTH


@pytest.mark.parametrize("seed", range(3))
def test_words_are_zipfs_and_follow_each_other(seed: int) -> None:
    symbols, exponent = words(generator(seed), LENGTH, 50), float(generator(seed).uniform(0.7, 1.3))
    counts = np.bincount(symbols, minlength=50)
    expected = np.arange(1.0, 51.0) ** -exponent
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(counts), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.35)  # words that follow from others blur it
    assert np.corrcoef(counts, expected)[0, 1] > 0.7
    assert entropy(pairs(symbols, 50)) < entropy(counts) - 0.1


def test_spelling_is_a_lexicon_of_words_and_spaces() -> None:
    symbols = spelling(generator(2), LENGTH, 30)
    said = "".join(chr(97 + symbol) for symbol in symbols).split("a")[:-1]
    assert {len(word) for word in said} <= set(range(1, 7))
    assert 10 < len(set(said)) <= 400
    frequent = max(set(said), key=said.count)
    assert said.count(frequent) > 10 * len(said) / 400


def test_texts_keep_their_frequent_symbols() -> None:
    documents = [b"bbbb aaa cc d" * 5 for _ in range(20)]
    catalogue.provide("stream-letters", corpus_of("stream-letters", "here", documents))
    data = StreamData("stream-letters", vocabulary=4, train_symbols=60)
    order = {ord(letter): min(rank, 3) for rank, letter in enumerate("b acd")}  # as often: by their bytes
    train = torch.tensor([order[byte] for byte in b"".join(documents)])
    assert torch.equal(data.symbols("train"), train[:60])
    assert len(data.symbols("test")) == 2 * 65
    spoken = StreamData("stream-letters", vocabulary=8, words=True)
    assert sorted(spoken.symbols("outer_valid").unique().tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="length: expected at most the 60 symbols of stream-letters, train, got 61"):
        next(data.windows(0, "train", 61))


def test_windows_are_those_of_the_minibatch_rows() -> None:
    data = StreamData("copy", seed=3, vocabulary=9, train_symbols=300, batch_size=5)
    assert {split: len(data.symbols(split)) for split in SPLITS} == {**dict.fromkeys(SPLITS, HELD), "train": 300}
    stream = data.symbols("train")
    begin = minibatch_rows(minibatch_key(7, "train"), 2, 5, 300 - 8 + 1)
    expected = torch.stack([stream[start : start + 8] for start in begin.tolist()])
    assert torch.equal(next(islice(data.windows(7, "train", 8), 2, None)), expected)
    assert torch.equal(next(data.windows(7, "train", 8, start=2)), expected)
    assert pickle.loads(pickle.dumps(data)) == data
    assert len(pickle.dumps(data)) < 1000
    other = dataclasses.replace(data, seed=4)
    assert not torch.equal(other.symbols("test"), data.symbols("test"))


def test_sampled_streams_are_generated_or_of_the_given_texts() -> None:
    sampled = [sample_stream(generator(seed), (*catalogue.CORE, "names")) for seed in range(600)]
    names = {data.name for data in sampled}
    assert names == {*GENERATORS, "babble", "names"}
    for name in names:
        share = sum(data.name == name for data in sampled) / 600
        assert share == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 * 7 / 8 / 600))
    assert {data.words for data in sampled if data.name == "babble"} == {True, False}
    assert not any(data.words for data in sampled if data.name != "babble")
    assert min(data.vocabulary for data in sampled) == 8
    assert max(data.vocabulary for data in sampled) <= 128
    assert min(data.train_symbols for data in sampled) < 1000
    assert max(data.train_symbols for data in sampled) > 50_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "copy", "vocabulary": 3}, "vocabulary: expected at least 4 symbols, got 3"),
        ({"name": "words", "words": True}, "words: expected False"),
    ],
)
def test_bad_streams_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamData(**fields)  # type: ignore[arg-type]


CHECKSUMS = {
    "markov": 0xCE6D2701,
    "copy": 0x78CBC049,
    "induction": 0x64235225,
    "brackets": 0x0CB25668,
    "words": 0x3CDC3DBB,
    "spelling": 0xBBD40785,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_streams_are_the_same_on_every_machine(name: str) -> None:
    symbols = StreamData(name, seed=5, vocabulary=24, train_symbols=1000).symbols("train")
    assert zlib.crc32(symbols.numpy().tobytes()) == CHECKSUMS[name]
