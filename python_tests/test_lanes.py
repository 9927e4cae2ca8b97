"""lopt/meta/lanes.py: perturbations, inner runs and windows that follow from seed, iteration and pair."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from lopt import Theta
from lopt.meta import lanes
from lopt.meta.config import MetaTrainConfig
from lopt.tasks import sample_task

SMALL = MetaTrainConfig(pairs=4, horizon=(4, 12), truncation=4, seed=11)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def test_a_pair_is_the_same_whatever_the_number_of_lanes() -> None:
    one, four = (dataclasses.replace(SMALL, tasks_per_iteration=count) for count in (1, 4))
    together = lanes.perturbations(one, 3, 0, 50)
    assert torch.equal(together, torch.cat([lanes.perturbations(four, 3, lane, 50) for lane in range(4)]))
    assert not torch.equal(together, lanes.perturbations(one, 4, 0, 50))
    assert float(together.std()) == pytest.approx(1.0, abs=4 / math.sqrt(2 * 200))


def test_lengths_are_log_uniform_and_told_as_often_as_asked() -> None:
    config = MetaTrainConfig(horizon=(10, 1000), tell_horizon=0.25)
    runs = [lanes.sample_run(config, iteration, 0) for iteration in range(800)]
    logs = torch.tensor([math.log10(run.horizon) for run in runs], dtype=torch.float64)
    assert min(run.horizon for run in runs) >= 10
    assert max(run.horizon for run in runs) <= 1000
    assert float(logs.mean()) == pytest.approx(2.0, abs=4 * 2 / math.sqrt(12 * 800))
    told = [run.total_steps for run in runs if run.total_steps]
    assert told == [run.horizon for run in runs if run.total_steps]
    assert len(told) / 800 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 800))
    windows = dataclasses.replace(config, truncation=30)
    assert {lanes.sample_run(windows, iteration, 0).horizon % 30 for iteration in range(50)} == {0}


def test_a_lane_goes_through_its_run_window_by_window() -> None:
    """Two lanes of a run of 12 in windows of 4: the first run of lane 0 is cut short, then runs last 3 windows."""
    config = dataclasses.replace(SMALL, estimator="pes", horizon=(12, 12))
    theta = Theta.init_adam("compact")
    steps: list[list[int]] = [[], []]
    for index in range(2):
        lane, total = None, torch.zeros(2, theta.num_floats)
        for iteration in range(6):
            fresh = lane is None or lane.state.step >= lane.stop
            lane, result = lanes.estimate(config, theta.spec, theta.flatten(), lane, index, iteration)
            eps = lanes.perturbations(config, iteration, index, theta.num_floats)
            total = eps if fresh else total + eps
            assert torch.equal(lane.xi, total)
            assert result.inner_steps == 4 * 4
            steps[index].append(lane.state.step)
    assert steps == [[4, 8, 4, 8, 12, 4], [4, 8, 12, 4, 8, 12]]


def test_truncated_es_goes_on_from_the_positive_state() -> None:
    theta = Theta.init_adam("compact")
    lane, _ = lanes.estimate(SMALL, theta.spec, theta.flatten(), None, 1, 0)
    plus, minus = lane.state.select(torch.tensor([0, 1])), lane.state.select(torch.tensor([2, 3]))
    assert torch.equal(plus.optimizer.rows.h, minus.optimizer.rows.h)
    name = next(iter(plus.params))
    assert torch.equal(plus.params[name], minus.params[name])
    assert not torch.equal(plus.params[name][0], plus.params[name][1])


def test_divergence_is_counted_and_leaves_the_gradient_finite() -> None:
    theta = Theta.init_adam("compact")
    spec = dataclasses.replace(theta.spec, step_multiplier=1e38)
    _, result = lanes.estimate(SMALL, spec, theta.flatten(), None, 0, 0)
    assert result.divergences == 4
    assert bool(torch.isfinite(result.gradient).all())
    assert result.meta_loss == pytest.approx(SMALL.loss_limit)


def test_validation_tasks_do_not_depend_on_the_seed_and_are_not_trained_on() -> None:
    config = dataclasses.replace(SMALL, validation_runs=4)
    runs = lanes.validation_set(config)
    assert runs == lanes.validation_set(dataclasses.replace(config, seed=99))
    assert {run.horizon for run in runs} == {12}
    assert not {run.task for run in runs} & {
        lanes.sample_run(config, i, lane).task for i in range(50) for lane in (0, 1)
    }


def test_tasks_of_a_run_are_tasks_of_its_families() -> None:
    config = dataclasses.replace(SMALL, tasks=("quadratic",))
    names = {lanes.sample_run(config, iteration, 0).task.name.split("-")[0] for iteration in range(5)}
    assert names == {"quadratic"}
    assert sample_task(0, ["quadratic"]).name.startswith("quadratic")
