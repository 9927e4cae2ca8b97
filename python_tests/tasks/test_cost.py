"""lopt/tasks/cost.py: counts by hand, coefficients that are known, and no clock."""

from pathlib import Path
from typing import Any

import pytest

from lopt.tasks import SAMPLED_FAMILIES, cost, sample_task
from lopt.tasks.convolutions import ConvPooling
from lopt.tasks.cost import BATCH_OPS, CostModel, Work, work
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.pieces import Initialiser
from lopt.tasks.synthetic import Perceptron

TASK = Perceptron(seed=0, data="teacher", regression=True, inputs=8, hidden=(16,), outputs=4, batch_size=10)


def test_work_of_a_perceptron() -> None:
    """Products, sums and relu of two layers, and the mean squared error."""
    found = work(TASK)
    assert found.multiply_adds == 10 * (8 * 16 + 16 * 4)
    batch, hidden, last = 10 * (8 + 4), 3 * 10 * 16, 2 * 10 * 4
    assert batch + hidden + last + 1 <= found.elements <= batch + hidden + last + 2 * 10 * 4 + 1
    assert BATCH_OPS + 6 <= found.ops <= BATCH_OPS + 8


def test_work_of_a_convolution() -> None:
    data = ImageData(name="shapes", batch_size=4)
    channels, height, width = data.shape
    task = ConvPooling(
        data=data, channels=(6,), strides=(1,), same=(True,), activation="relu", initialiser=Initialiser("he_normal")
    )
    expected = 4 * height * width * 6 * channels * 9 + 4 * 6 * data.num_classes
    assert work(task).multiply_adds == expected


@pytest.mark.parametrize("family", SAMPLED_FAMILIES)
def test_work_of_every_family_repeats(family: Any) -> None:
    first, second = (work(sample_task(5, [family]), lambda part: part.ops > 500) for _ in range(2))
    assert first == second
    assert first.ops > BATCH_OPS


def test_fit_finds_the_coefficients_and_none_is_negative() -> None:
    counted = [Work(10.0 * i, 1e4 * (i % 7 + 1), 1e6 * (i % 5 + 1)) for i in range(1, 30)]
    true = CostModel(per_op=2e4, per_element=3.0, per_multiply_add=0.05)
    found = CostModel.fit(counted, [true.of(one) for one in counted])
    for name in ("per_op", "per_element", "per_multiply_add"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    without = CostModel.fit(
        counted, [1e-9 * (2e4 * w.ops - 0.1 * w.elements + 0.05 * w.multiply_adds) for w in counted]
    )
    assert without.per_element == 0.0


def test_counting_stops_above_the_limit() -> None:
    task = sample_task(4, ["char_rnn_language_model"])
    whole = CostModel().seconds(task)
    part = CostModel().seconds(task, whole / 3)
    assert whole / 3 < part < whole
    assert CostModel().seconds(task, 2 * whole) == whole


def test_a_model_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "cost.json"
    tasks = [sample_task(seed, [family]) for family in ("mlp", "teacher", "mlp_ae") for seed in range(2)]
    first = CostModel.cached(path, tasks)
    monkeypatch.setattr(cost.measure, "seconds_per_step", None)
    assert CostModel.cached(path, tasks) == first
    assert all(first.seconds(task) > 0.0 for task in tasks)
