"""Generated data: every generator against what it says of its rows, and the tasks that are sampled from them."""

import json
import math
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt.tasks import ENGINE_FAMILIES, FAMILIES, sample_task
from lopt.tasks.generators import (
    Array,
    index,
    linear,
    log_uniform,
    logistic,
    low_rank,
    mixture,
    patches,
    sequence,
    sheets,
    spectrum,
    teacher,
    words,
)
from lopt.tasks.seeds import generator
from lopt.tasks.synthetic import Family, Perceptron, SyntheticTask
from lopt.tasks.task import SPLITS

ROWS = 8000


def residual(features: Array, values: Array) -> float:
    """Largest error of the best linear prediction of ``values`` from ``features`` and a constant."""
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution = np.linalg.lstsq(features, values, rcond=None)[0]
    return float(np.abs(features @ solution - values).max())


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def surplus(labels: Array, probabilities: Array) -> float:
    """How often labels come beyond their probabilities, alone and with these as weights: most standard deviations."""
    most = 0.0
    for label, p in enumerate(probabilities.T):
        weights = np.stack([np.ones(len(p)), p])
        deviation = np.sqrt((p * (1 - p) * weights**2).sum(axis=1))
        most = max(most, *np.abs((((labels == label) - p) * weights).sum(axis=1)) / deviation)
    return float(most)


@pytest.mark.parametrize("seed", range(3))
def test_mixture_classes_are_even_and_as_wide_as_they_say(seed: int) -> None:
    x, labels = mixture(generator(seed), ROWS, 10, 4)
    clouds = 4 * int(generator(seed).integers(1, 4))
    shares = np.bincount(labels, minlength=4) / ROWS
    assert np.abs(shares - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / ROWS)
    for label in range(4):
        values = np.linalg.svd(np.cov(x[labels == label].T), compute_uv=False)
        narrow = values[clouds // 4 :]  # directions in which the clouds of the class lie side by side
        assert narrow.min() > 0.7**2 * 0.8
        assert narrow.max() < 1.4**2 * 1.2


@pytest.mark.parametrize("seed", range(3))
def test_teacher_values_come_from_few_hidden_units(seed: int) -> None:
    """More outputs than the last hidden layer has units: their rank is its width, up to rounding."""
    _, values = teacher(generator(seed), ROWS, 10, 40)
    random = generator(seed)
    random.standard_normal((ROWS, 10))
    width = int(random.integers(4, 33))
    singular = np.linalg.svd(values, compute_uv=False)
    assert singular[width - 1] > 10 * singular[width]
    assert 0.4 < values.std() < 2.0


@pytest.mark.parametrize("seed", range(4))
def test_low_rank_rows_lie_near_a_subspace(seed: int) -> None:
    x, values = low_rank(generator(seed), ROWS, 20, 20)
    assert values is x
    rank = int(generator(seed).integers(1, 11))
    if np.abs(x).max() > 2.0:  # not bent
        variances = np.linalg.svd(np.cov(x.T), compute_uv=False)
        noise = variances[rank:]
        assert noise.max() < 1.5 * noise.min()
        assert noise.max() < 0.3**2 * 1.3
        assert variances[0] > 2 * noise.max()
    assert 0.3 < x.std() < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_patches_are_smooth_images(seed: int) -> None:
    x, values = patches(generator(seed), ROWS, 64, 64)
    assert values is x
    assert x.min() >= 0.0
    assert x.max() <= 1.0
    assert x.mean() > 0.05
    images = x.reshape(-1, 8, 8)
    near = np.corrcoef(images[:, :-1].ravel(), images[:, 1:].ravel())[0, 1]
    far = np.corrcoef(images[:, :4].ravel(), images[:, 4:].ravel())[0, 1]
    assert near > far + 0.3


@pytest.mark.parametrize("seed", range(3))
def test_linear_values_are_linear_in_some_inputs_of_uneven_spread(seed: int) -> None:
    x, values = linear(generator(seed), ROWS, 12, 3)
    assert residual(x, values) < 2e-3  # inputs and values are rounded to 2^-12
    coefficients = np.linalg.lstsq(x, values, rcond=None)[0]
    used = np.abs(coefficients).max(axis=1) > 1e-2
    assert (used == (np.abs(coefficients).min(axis=1) > 1e-3)).all()  # an input is used for all values or for none
    deviations = np.sqrt(np.linalg.svd(np.cov(x.T), compute_uv=False))
    assert np.sqrt(np.square(deviations).mean()) == pytest.approx(1.0, abs=0.05)
    assert 1.0 < deviations[0] / deviations[-1] < 10**1.5 * 1.1


def test_linear_data_sets_are_sparse_and_ill_conditioned_in_many_degrees() -> None:
    shares, conditions = [], []
    for seed in range(60):
        x, values = linear(generator(seed), 500, 20, 1)
        shares.append(float((np.abs(np.linalg.lstsq(x, values, rcond=None)[0]) > 0.01).mean()))
        conditions.append(float(np.linalg.cond(x)))
    assert min(shares) < 0.3
    assert max(shares) > 0.9
    assert min(conditions) < 3
    assert max(conditions) > 20


@pytest.mark.parametrize("seed", range(3))
def test_logistic_labels_have_the_probabilities_of_a_softmax(seed: int) -> None:
    x, labels = logistic(generator(seed), ROWS, 6, 4)
    random = generator(seed)
    same, values = linear(random, ROWS, 6, 4)
    assert np.array_equal(x, same)
    probabilities = softmax(log_uniform(random, 1.0, 10.0) * values)
    assert surplus(labels, probabilities) < 4.5


@pytest.mark.parametrize("seed", range(6))
def test_index_values_are_bent_projections(seed: int) -> None:
    x, values = index(generator(seed), ROWS, 9, 3)
    random = generator(seed)
    assert np.array_equal(random.standard_normal((ROWS, 9)), x)
    directions = random.standard_normal((9, int(random.integers(1, 4))))
    z = x @ (directions / np.linalg.norm(directions, axis=0))
    bent = [np.abs(z), np.square(z), np.tanh(2 * z), np.sin(2 * z), z.prod(axis=1, keepdims=True)]
    assert residual(np.concatenate(bent, axis=1), values) < 1e-3
    assert residual(x, values) > 0.1


@pytest.mark.parametrize("seed", range(6))
def test_sequence_windows_are_one_hot_and_the_next_symbol_is_the_chains(seed: int) -> None:
    x, labels = sequence(generator(seed), ROWS, 15, 3)
    windows = x.reshape(ROWS, 5, 3)
    assert np.array_equal(windows.sum(axis=2), np.ones((ROWS, 5)))
    assert set(np.unique(x)) == {0.0, 1.0}
    random = generator(seed)
    order = int(random.integers(1, 4))
    chain = softmax(log_uniform(random, 1.0, 10.0) * random.standard_normal((3**order, 3)))
    probabilities = 0.9 * chain + 0.1 / 3
    state = windows.argmax(axis=2)[:, 5 - order :] @ 3 ** np.arange(order)
    seen = np.zeros((3**order, 3))
    np.add.at(seen, (state, labels), 1)
    expected = seen.sum(axis=1, keepdims=True) * probabilities
    deviation = np.sqrt(expected * (1 - probabilities)) + 3.0  # small counts are not normal
    assert (np.abs(seen - expected) < 4.5 * deviation).all()


def test_pytorchs_default_initialisation() -> None:
    params = Perceptron(seed=0, data="mixture", inputs=100, hidden=(300,), init_gain=None).init(5)
    layer = torch.nn.Linear(100, 300)
    for ours, torchs in ((params["w0"], layer.weight), (params["b0"], layer.bias)):
        for values in (ours, torchs.detach()):
            assert float(values.abs().max()) <= 0.1
            assert float(values.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.15)


def test_autoencoders_targets_are_their_inputs_whatever_the_scale() -> None:
    for data in ("low_rank", "patches"):
        task = Perceptron(seed=1, data=data, inputs=9, outputs=9, regression=True, input_scale=2.5, rows=100)
        assert torch.equal(task.splits["train"].inputs, task.splits["train"].targets)


def sampled(seeds: range, families: tuple[Family, ...]) -> list[Perceptron]:
    tasks = [sample_task(seed, families) for seed in seeds]
    return [task for task in tasks if isinstance(task, Perceptron)]


def test_two_thousand_seeds_are_two_thousand_tasks() -> None:
    """Even without the seed of the data."""
    configs = [sample_task(seed).config for seed in range(2000)]
    assert len({json.dumps({**config, "seed": None}, sort_keys=True) for config in configs}) == 2000
    assert len({config["seed"] for config in configs}) == 2000


def test_sizes_reach_from_end_to_end() -> None:
    tasks = sampled(range(1500), ENGINE_FAMILIES)
    assert len(tasks) == 1500
    for values, low, high in (
        ([task.inputs for task in tasks if task.data != "words"], 2, 64),
        ([task.outputs for task in tasks if task.regression and task.inputs != task.outputs], 1, 20),
        ([task.outputs for task in tasks if not task.regression], 2, 20),
        ([width for task in tasks for width in task.hidden], 8, 64),
        ([len(task.hidden) for task in tasks], 0, 4),
        ([task.batch_size for task in tasks], 8, 64),
    ):
        assert (min(values), max(values)) == (low, high)
    vocabularies = [task.inputs for task in tasks if task.data == "words"]
    assert 16 <= min(vocabularies) < 20
    assert 220 < max(vocabularies) <= 256
    rows = torch.tensor([math.log(task.rows) for task in tasks], dtype=torch.float64)
    assert rows.min() > math.log(199)
    assert rows.max() < math.log(30_001)
    spread = math.log(150) / math.sqrt(12 * 1500)
    assert float(rows.mean()) == pytest.approx(math.log(200 * 30_000) / 2, abs=4.5 * spread)
    assert {task.activation for task in tasks} == {"relu", "tanh", "gelu"}
    share = sum(task.init_gain is None for task in tasks) / 1500
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 1500))


def test_three_hundred_tasks_are_sound_at_their_start() -> None:
    ratios = []
    for task in sampled(range(300), ENGINE_FAMILIES):
        inputs, targets = (torch.cat([task.splits[split][part] for split in SPLITS]) for part in (0, 1))
        assert inputs.shape == (task.rows, task.inputs)
        assert torch.isfinite(inputs).all()
        lengths = [len(task.splits[split].inputs) for split in SPLITS]
        for length, share in zip(lengths, (1 / 2, 1 / 8, 1 / 4, 1 / 8), strict=True):
            assert abs(length - share * task.rows) <= 1  # every row is in one split
        if task.regression:
            assert targets.shape == (task.rows, task.outputs)
            assert torch.isfinite(targets).all()
            assert 0.01 < float(targets.std()) < 10.0
        else:
            assert targets.shape == (task.rows,)
            assert 0 <= int(targets.min()) <= int(targets.max()) < task.outputs
            assert len(torch.unique(targets)) > 1
        params = {name: value.requires_grad_() for name, value in task.init(0).items()}
        loss = task.loss(params, next(task.batches(0, "train")))
        loss.backward()
        grads: list[Tensor] = [value.grad for value in params.values() if value.grad is not None]
        assert len(grads) == len(params)
        assert math.isfinite(float(loss.detach()))
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert any(grad.abs().max() > 0 for grad in grads)
        if not task.regression:
            ratios.append(float(loss.detach()) / math.log(task.outputs))
    assert 0.95 < float(np.median(ratios)) < 1.3
    assert min(ratios) > 0.3
    assert max(ratios) < 10.0


def progress(task: SyntheticTask, steps: int) -> float:
    """Smallest train loss after ``steps`` of Adam at learning rates .003 and .03, over the initial one."""
    rows = task.splits["train"]
    best = start = float(task.loss(task.init(0), rows))
    for lr in (3e-3, 3e-2):
        params = {name: value.requires_grad_() for name, value in task.init(0).items()}
        adam = torch.optim.Adam(params.values(), lr=lr)
        for batch in islice(task.batches(0, "train"), steps):
            adam.zero_grad()
            task.loss(params, batch).backward()
            adam.step()
        best = min(best, float(task.loss(params, rows).detach()))
    return best / start


@pytest.mark.parametrize("seed", range(6))
def test_sheets_hardly_overlap_and_have_few_dimensions(seed: int) -> None:
    """The nearest other row is of the same class, and not much farther than noise in 40 dimensions would put it."""
    x, labels = sheets(generator(seed), ROWS, 40, 5)
    shares = np.bincount(labels, minlength=5) / ROWS
    assert np.abs(shares - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / ROWS)
    distance = np.linalg.norm(x[:300, None] - x[None, 300:], axis=2)
    assert (labels[300:][distance.argmin(axis=1)] == labels[:300]).mean() > 0.95
    assert np.median(distance.min(axis=1)) < 0.5 * np.median(distance)


@pytest.mark.parametrize("seed", range(6))
def test_words_have_the_frequencies_of_zipfs_law(seed: int) -> None:
    """The logarithm of a frequency is linear in that of its rank; labels have the probabilities of a softmax."""
    x, labels = words(generator(seed), ROWS, 40, 5)
    counts = np.round(x / x[x > 0].min())
    length = counts[0].sum()
    assert (counts.sum(axis=1) == length).all()
    assert 1 <= length <= 16
    assert np.allclose(x, counts / math.sqrt(length), atol=2**-12)
    frequencies = counts.mean(axis=0)
    slope, at_one = np.polyfit(np.log(np.arange(1, 41)), np.log(frequencies), 1)
    assert -1.5 < slope < -0.7
    deviation = 5 / np.sqrt(ROWS * frequencies)
    assert (np.abs(np.log(frequencies) - at_one - slope * np.log(np.arange(1, 41))) < deviation + 0.05).all()
    random = generator(seed)
    log_uniform(random, 1.0, 16.999)
    random.uniform(0.7, 1.5)
    random.random((ROWS, int(length)))
    gain = log_uniform(random, 1.0, 10.0) / math.sqrt(length)
    assert surplus(labels, softmax(gain * counts @ random.standard_normal((40, 5)))) < 4.5


@pytest.mark.parametrize("seed", range(6))
def test_spectrum_falls_by_a_power_of_the_axis_and_values_see_all_axes(seed: int) -> None:
    """The values are those of a teacher of the same draws, in coordinates that a linear map of the inputs gives."""
    x, values = spectrum(generator(seed), ROWS, 30, 3)
    deviations = np.sqrt(np.linalg.eigvalsh(np.cov(x.T))[::-1])
    slope, at_one = np.polyfit(np.log(np.arange(1, 31)), np.log(deviations), 1)
    assert -1.5 < slope < -0.5
    assert np.abs(np.log(deviations) - at_one - slope * np.log(np.arange(1, 31))).max() < 0.1
    assert np.square(x).mean() == pytest.approx(1.0, rel=0.1)
    random = generator(seed)
    z = random.standard_normal((ROWS, 30))
    assert residual(x, z) < 1e-2
    random.uniform(0.5, 1.5)
    random.standard_normal(30)  # the reflection
    width, layers = int(random.integers(4, 33)), int(random.integers(1, 3))
    for _ in range(layers):
        fan_in = z.shape[1]
        z = np.tanh(z @ random.standard_normal((fan_in, width)) * 1.5 / math.sqrt(fan_in))
    assert np.allclose(values, z @ random.standard_normal((width, 3)) * 1.5 / math.sqrt(width), atol=2**-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_adam_makes_progress(family: Family) -> None:
    tasks = [sample_task(seed, [family]) for seed in range(6)]
    reached = [progress(task, 100) for task in tasks if isinstance(task, SyntheticTask)]
    assert len(reached) == 6
    assert sorted(reached)[4] < 0.95  # all but one


# Name, and CRC-32 of the train split and of the initial parameters.
CHECKSUMS: dict[Family, tuple[str, int, int]] = {
    "noisy_quadratic": ("quadratic-29", 0xA3993B5F, 0x85B5630C),
    "mixture": ("mixture-classes-4x63x63x63x6", 0x77DDD737, 0xECE9B60E),
    "teacher": ("teacher-classes-34x11x16", 0x57D3A9B5, 0x9AC29B3C),
    "low_rank": ("low_rank-values-11x29x11", 0x947F24A7, 0x4DD3923C),
    "patches": ("patches-values-64x12x12x64", 0x14E052B3, 0xA8080D77),
    "linear": ("linear-values-7x1", 0x0C1B756E, 0xAEE43DA4),
    "logistic": ("logistic-classes-33x24x21x18", 0xE4DBD86D, 0xA61923F6),
    "index": ("index-classes-32x15x4", 0xE318DF25, 0xCD368C30),
    "sequence": ("sequence-classes-26x21x13", 0x3B64B578, 0xF9D214C3),
    "sheets": ("sheets-classes-53x30x30x30x30x18", 0x21B6C750, 0x33FABD59),
    "words": ("words-classes-245x12x14", 0xCC3E667C, 0xFEECF7CD),
    "spectrum": ("spectrum-classes-3x60x3", 0x4D78DCDD, 0xF259D445),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_the_same_on_every_machine(family: Family) -> None:
    task = sample_task(5, [family])
    assert isinstance(task, SyntheticTask)
    parts = (task.splits["train"], task.init(0).values())
    data, init = (zlib.crc32(b"".join(value.numpy().tobytes() for value in part)) for part in parts)
    assert (task.name, data, init) == CHECKSUMS[family]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "image"}, "data: expected one of .* got 'image'"),
        ({"data": "mixture", "activation": "elu"}, "activation: expected one of .* got 'elu'"),
        ({"data": "mixture", "regression": True}, "data='mixture' has no targets for regression=True"),
        ({"data": "linear"}, "data='linear' has no targets for regression=False"),
        ({"data": "low_rank", "regression": True}, "outputs: expected as many as inputs, 8, got 4"),
        ({"data": "patches", "regression": True, "outputs": 8}, "inputs: expected a square number"),
        ({"data": "sequence", "outputs": 3}, "inputs: expected a multiple of outputs=3, got 8"),
    ],
)
def test_a_task_that_cannot_be_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perceptron(seed=0, **fields)  # type: ignore[arg-type]
