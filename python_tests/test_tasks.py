"""lopt/tasks: synthetic tasks against closed forms and numpy, and that a seed means the same task everywhere."""

import json
import math
import zlib
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt.tasks import FAMILIES, Batch, sample_task, task_from_config
from lopt.tasks.seeds import derive, generator, minibatch_rows
from lopt.tasks.synthetic import Perceptron, Quadratic, SyntheticTask
from lopt.tasks.task import SPLITS

PERCEPTRONS = [
    Perceptron(seed=1, data="mixture", hidden=(7, 5), outputs=3, activation="relu"),
    Perceptron(seed=2, data="teacher", hidden=(), outputs=4, input_scale=2.0),
    Perceptron(seed=3, data="teacher", hidden=(6,), outputs=2, activation="tanh", regression=True, noise=0.1),
    Perceptron(seed=4, data="index", hidden=(9, 6), outputs=3, activation="gelu", regression=True, init_gain=None),
]
TASKS: list[SyntheticTask] = [Quadratic(seed=0, dim=5, noise=0.3), *PERCEPTRONS]
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def checksum(*values: Tensor) -> int:
    return zlib.crc32(b"".join(value.numpy().tobytes() for value in values))


def test_the_streams_of_different_names_differ() -> None:
    paths = [(), (0,), (0, 0), (1,), (0, 1), ("a",), ("b",), ("a", 0), ("ab",)]
    assert len({derive(seed, *path) for seed in (0, 1) for path in paths}) == 2 * len(paths)
    assert derive(3, "init", 5) == derive(3, "init", 5)
    with pytest.raises(ValueError, match="seed: expected a non-negative integer, got -1"):
        generator(-1)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 - 1, 2**130])
def test_streams_are_those_of_numpys_spawned_seeds(seed: int) -> None:
    for path in ((), (0,), ("init", 3, 2**32 - 1), ("task", 2**32), (2**63 - 1, "task", 5, 6, 7)):
        key = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in path]
        expected = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        assert generator(seed, *path).bit_generator.state == expected.bit_generator.state
    with pytest.raises(ValueError, match="non-negative"):
        generator(seed, -1)


def test_minibatch_rows_are_uniform_and_counter_based() -> None:
    rows = torch.from_numpy(minibatch_rows(5, 0, 100_000, 10))
    counts = torch.bincount(rows, minlength=10).double()
    chi_square = ((counts - 1e4).square() / 1e4).sum().item()
    assert chi_square < 27.9  # 99.9% point of 9 degrees of freedom
    assert minibatch_rows(5, 3, 7, 10).tolist() == rows[21:28].tolist()


def test_minibatch_rows_by_hand() -> None:
    """The same in Python's integers; keys of 64 bits and far steps included."""

    def row(key: int, counter: int, rows: int) -> int:
        x = (key + counter * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return ((x ^ (x >> 31)) >> 32) * rows >> 32

    for key, step, batch, rows in ((0, 0, 5, 1), (2**64 - 1, 3, 4, 10), (2**63 + 7, 10**9, 3, 8000)):
        expected = [row(key, step * batch + i + 1, rows) for i in range(batch)]
        assert minibatch_rows(key, step, batch, rows).tolist() == expected


def test_quadratic_has_the_gradient_and_the_minimum_it_says() -> None:
    task = Quadratic(seed=4, dim=6, noise=0.5)
    rows = task.splits["train"]
    x = torch.linspace(-1, 1, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(task.loss({"x": x}, rows), x)
    centre = rows.targets.mean(dim=0)
    torch.testing.assert_close(grad, task.metric @ task.metric.T @ (x - centre) / 6, rtol=1e-5, atol=1e-6)
    smallest = torch.square((rows.targets - centre) @ task.metric).mean() / 2
    torch.testing.assert_close(task.loss({"x": centre}, rows), smallest)


@pytest.mark.parametrize("task", PERCEPTRONS, ids=lambda task: task.name)
def test_perceptron_loss_matches_numpy(task: Perceptron) -> None:
    params, (inputs, targets) = task.init(0), task.splits["train"]
    x = inputs.double().numpy()
    for layer in range(len(task.sizes) - 1):
        x = x @ params[f"w{layer}"].double().numpy() + params[f"b{layer}"].double().numpy()
        if layer < len(task.hidden):
            x = ACTIVATIONS[task.activation](x)
    if task.regression:
        expected = np.square(x - targets.double().numpy()).mean()
    else:
        log_sum = np.log(np.exp(x).sum(axis=1))
        expected = (log_sum - x[np.arange(len(x)), targets.numpy()]).mean()
    assert float(task.loss(params, Batch(inputs, targets))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_loss_and_gradient_can_be_vmapped(task: SyntheticTask) -> None:
    batch = next(task.batches(0, "train"))
    singles = [task.init(seed) for seed in range(3)]
    stacked = {name: torch.stack([params[name] for params in singles]) for name in singles[0]}
    grads, losses = torch.vmap(torch.func.grad_and_value(task.loss), in_dims=(0, None))(stacked, batch)
    for row, params in enumerate(singles):
        grad, loss = torch.func.grad_and_value(task.loss)(params, batch)
        torch.testing.assert_close(losses[row], loss)
        for name in params:
            torch.testing.assert_close(grads[name][row], grad[name])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_minibatches_are_rows_of_their_split_and_repeatable(task: SyntheticTask) -> None:
    assert [len(task.splits[split].targets) for split in SPLITS] == [256, 64, 128, 64]
    for split in SPLITS:
        rows = {row.numpy().tobytes() for row in task.splits[split].targets}
        stream = list(islice(task.batches(7, split), 12))
        assert {row.numpy().tobytes() for batch in stream for row in batch.targets} <= rows
        for again, start in ((task.batches(7, split), 0), (task.batches(7, split, start=9), 9)):
            for expected, actual in zip(stream[start:], again, strict=False):
                assert torch.equal(expected.inputs, actual.inputs)
                assert torch.equal(expected.targets, actual.targets)
        assert not torch.equal(stream[0].targets, next(task.batches(8, split)).targets)


def test_minibatches_are_uniform_over_the_rows() -> None:
    task = Quadratic(seed=0, dim=1)
    rows = task.splits["test"].targets[:, 0]
    drawn = torch.cat([batch.targets[:, 0] for batch in islice(task.batches(0, "test"), 1000)])
    counts = (drawn[:, None] == rows).sum(dim=0).double()
    expected = len(drawn) / len(rows)
    assert float(((counts - expected) / math.sqrt(expected)).abs().max()) < 4.5


def test_splits_share_no_row() -> None:
    task = Quadratic(seed=0, dim=2)
    assert len({row.numpy().tobytes() for split in SPLITS for row in task.splits[split].targets}) == 512


def test_initial_loss_is_the_mean_over_outer_valid_minibatches() -> None:
    task = TASKS[1]
    losses = [float(task.loss(task.init(5), batch)) for batch in islice(task.batches(5, "outer_valid"), 8)]
    assert task.initial_loss(5) == pytest.approx(sum(losses) / 8, rel=1e-6)


def test_weights_have_the_gain_and_labels_the_noise_that_were_asked_for() -> None:
    task = Perceptron(seed=0, data="mixture", inputs=200, hidden=(200,), init_gain=0.5)
    weights = task.init(0)["w0"] * math.sqrt(200)
    assert float(weights.std()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * 200 * 200))
    clean, noisy = (
        Perceptron(seed=0, data="teacher", outputs=4, rows=8000, noise=noise).splits["train"].targets
        for noise in (0.0, 0.4)
    )
    share = float((clean != noisy).double().mean())  # a random label is the same one time in four
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_a_task_and_its_config_rebuilds_it(seed: int) -> None:
    task = sample_task(seed)
    again = task_from_config(json.loads(json.dumps(task.config)))
    assert isinstance(task, SyntheticTask)
    assert isinstance(again, SyntheticTask)
    assert task == again
    assert task.name == again.name
    for split in SPLITS:
        assert checksum(*task.splits[split]) == checksum(*again.splits[split])
    assert checksum(*task.init(3).values()) == checksum(*again.init(3).values())


def test_families_are_drawn_evenly_and_twice_as_often_when_named_twice() -> None:
    def kind(task: object) -> str:
        return "noisy_quadratic" if isinstance(task, Quadratic) else getattr(task, "data", "")

    every = Counter(kind(sample_task(seed)) for seed in range(900))
    assert set(every) == set(FAMILIES)
    for count in every.values():
        assert count == pytest.approx(100, abs=4.5 * math.sqrt(900 / 9 * 8 / 9))
    for families, expected in (
        (("noisy_quadratic", "mixture", "teacher"), (1 / 3, 1 / 3, 1 / 3)),
        (("mixture", "mixture", "teacher"), (0, 2 / 3, 1 / 3)),
    ):
        counts = Counter(kind(sample_task(seed, families)) for seed in range(600))
        for family, share in zip(("noisy_quadratic", "mixture", "teacher"), expected, strict=True):
            assert counts[family] == pytest.approx(600 * share, abs=4 * math.sqrt(600 * share * (1 - share)))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"families: expected some of .* got \['image'\]"):
        sample_task(0, ["image"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"expected the type to be one of .* got 'Conv'"):
        task_from_config({"type": "Conv"})
    with pytest.raises(ValueError, match=r"unknown fields \['size'\] of Quadratic"):
        task_from_config({"type": "Quadratic", "seed": 0, "size": 3})
    with pytest.raises(ValueError, match="rows: expected at least 20"):
        Quadratic(seed=0, rows=5)
    with pytest.raises(ValueError, match="batch_size: expected a positive number, got 0"):
        Quadratic(seed=0, batch_size=0)
    with pytest.raises(ValueError, match="sizes: expected positive layer widths"):
        Perceptron(seed=0, data="mixture", hidden=(0,))
