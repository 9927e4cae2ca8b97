"""lopt/tasks/distribution.py: the same tasks for the same seeds, weights, bounds, data that may be seen."""

import json
from collections import Counter
from typing import Any

import pytest

from lopt.tasks import SAMPLED_FAMILIES, Task
from lopt.tasks.augmented import AugmentedTask
from lopt.tasks.cost import CostModel
from lopt.tasks.data import catalogue
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.synthetic import Perceptron
from lopt.tasks.synthetic import Quadratic as NoisyQuadratic

CHEAP: dict[Any, float] = {"noisy_quadratic": 1.0, "teacher": 2.0, "losg_tasks": 1.0}


def within(task: Task) -> Any:
    return task.task if isinstance(task, AugmentedTask) else task


def test_a_seed_is_a_task_and_json_is_the_distribution() -> None:
    mixture = TaskDistribution({**CHEAP, "mlp": 1.0}, max_seconds=0.02, reparametrise=0.5, gradient_noise=0.5)
    again = TaskDistribution.from_json(json.loads(json.dumps(mixture.to_json())))
    assert again == mixture
    assert hash(again) == hash(mixture)
    tasks = [mixture.sample(seed) for seed in range(30)]
    assert [again.sample(seed) for seed in range(30)] == tasks
    assert len({task.name for task in tasks}) > 15


def test_the_tasks_of_some_seeds_forever() -> None:
    mixture = TaskDistribution({**CHEAP, "mlp": 1.0}, max_seconds=0.02, max_params=20_000, reparametrise=0.5)
    assert [mixture.sample(seed).name for seed in range(5)] == [
        "teacher-values-22x11x11x3",
        "quadratic-23",
        "losg-Optimization-logsumexp",
        "teacher-classes-2x14x14x19+global-scale",
        "teacher-values-6x11x11x11x11x5",
    ]


def test_families_come_as_often_as_their_weights_say_whatever_fits() -> None:
    mixture = TaskDistribution(CHEAP, max_params=300, max_seconds=None)
    tasks = [mixture.sample(seed) for seed in range(400)]
    assert max(task.num_params for task in tasks) <= 300
    kinds = Counter("teacher" if isinstance(task, Perceptron) else type(task).__name__ for task in tasks)
    assert kinds["teacher"] / 400 == pytest.approx(0.5, abs=0.1)
    assert kinds["Quadratic"] / 400 == pytest.approx(0.25, abs=0.09)


def test_predicted_time_bounds_and_the_clock_does_not() -> None:
    """With a cost of 1 s per operation, bounds are numbers of operations."""
    cost = CostModel(per_op=1e9, per_element=0.0, per_multiply_add=0.0)
    mixture = TaskDistribution({"mlp": 1.0}, max_seconds=25.0, cost=cost)
    tasks = [mixture.sample(seed) for seed in range(10)]
    assert max(cost.seconds(task) for task in tasks) <= 25.0
    free = [TaskDistribution({"mlp": 1.0}, max_seconds=None).sample(seed) for seed in range(10)]
    assert max(cost.seconds(task) for task in free) > 25.0
    for task, other in zip(tasks, free, strict=True):
        assert (task == other) == (cost.seconds(other) <= 25.0)
    with pytest.raises(
        ValueError, match="max_params, max_seconds: 1000 tasks of noisy_quadratic all have more than 1 "
    ):
        TaskDistribution({"noisy_quadratic": 1.0}, max_params=1).sample(0)


def test_augmentations_come_as_often_as_asked() -> None:
    families: Any = {"noisy_quadratic": 1.0, "teacher": 1.0}
    mixture = TaskDistribution(families, max_seconds=None, reparametrise=0.5, reduce_batch=0.3, gradient_noise=0.2)
    plain = TaskDistribution(families, max_seconds=None)
    tasks = [mixture.sample(seed) for seed in range(300)]
    changed = [task for task in tasks if isinstance(task, AugmentedTask)]
    rescaled = Counter(task.reparametrise for task in changed)
    assert (len(changed) - rescaled["none"]) / 300 == pytest.approx(0.5, abs=0.09)
    assert rescaled["parameter"] / (len(changed) - rescaled["none"]) == pytest.approx(0.2, abs=0.1)
    assert sum(task.gradient_noise > 0 for task in changed) / 300 == pytest.approx(0.2, abs=0.08)
    assert {task.decades for task in changed} == {1.0, 2.0, 3.0}
    rows = [(within(task).batch_size, plain.sample(seed).batch_size) for seed, task in enumerate(tasks)]  # type: ignore[attr-defined]
    smaller = [few / many for few, many in rows if few < many]
    assert len(smaller) / 300 == pytest.approx(0.3, abs=0.09)
    assert 0.05 <= min(smaller) < 0.3
    assert any(isinstance(within(task), NoisyQuadratic) for task in changed)


def test_data_sets_are_those_of_meta_training() -> None:
    """No held-out name is accepted, the default ones need no package, and tasks use no others."""
    for name in catalogue.HELD_OUT:
        with pytest.raises(ValueError, match=r"data: \[.*are not for meta-training"):
            TaskDistribution({"mlp": 1.0}, data=(*catalogue.CORE, name))
    assert TaskDistribution({"mlp": 1.0}, data=catalogue.META_TRAIN).data == catalogue.META_TRAIN
    used = set()
    for family in SAMPLED_FAMILIES:
        mixture = TaskDistribution({family: 1.0}, max_seconds=None)
        if hasattr(within(mixture.sample(0)), "data"):
            used |= {within(mixture.sample(seed)).data.name for seed in range(3)}
    assert len(used) > 3
    assert used <= set(catalogue.CORE)


@pytest.mark.parametrize(
    ("families", "fields", "message"),
    [
        ({}, {}, "families: expected some of"),
        ({"nothing": 1.0}, {}, "families: expected some of"),
        ((("mlp", 1.0), ("mlp", 2.0)), {}, "each once"),
        ({"mlp": 0.0}, {}, "families: expected positive weights"),
        ({"mlp": 1.0}, {"max_seconds": 0.0}, "max_seconds: expected a positive number or None"),
        ({"mlp": 1.0}, {"max_params": -1}, "max_params: expected a positive number or None"),
        ({"mlp": 1.0}, {"reparametrise": 1.5}, "reparametrise: expected a share"),
    ],
)
def test_bad_values_are_named(families: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskDistribution(families, **fields)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown fields"):
        TaskDistribution.from_json({**TaskDistribution({"mlp": 1.0}).to_json(), "speed": 1})
