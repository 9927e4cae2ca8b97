"""lopt/meta/pairs.py and inner.py: units of work from seed, iteration and pair; two engines, one meaning."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt import Theta
from lopt.meta import es, inner, objective, outer, pairs
from lopt.meta.checkpoint import TrainState
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.es import EstimatorName
from lopt.meta.learner import Learner
from lopt.meta.pairs import Carry, Shared
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.families import NETWORK_FAMILIES
from lopt.tasks.synthetic import ENGINE_FAMILIES, FAMILIES, Family

CONFIG = MetaTrainConfig(
    10_000, (Phase(1.0, (10, 40)),), pairs=4, seed=11, weighting="mean", tasks=("mixture", "teacher")
)
THETA = Theta.init_adam("compact")


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def shared(config: MetaTrainConfig = CONFIG, iteration: int = 0, begun: int = -1) -> Shared:
    scale = outer.scales(THETA.spec, config.scaling, config.phases[0].groups)
    return Shared(config, THETA.spec, THETA.flatten(), scale, 0, begun, iteration)


def windows(estimator: EstimatorName, window: int, horizon: int, **changes: Any) -> MetaTrainConfig:
    phase = Phase(1.0, (horizon, horizon), "all", estimator, window)
    return dataclasses.replace(CONFIG, phases=(phase,), **changes)


def test_a_pair_is_the_mean_log_loss_difference_of_two_runs_by_hand() -> None:
    """Every part from its definition: eps, theta +- sigma scale eps, two unrolls, clip(L / L_init), log, mean."""
    item = shared(iteration=3)
    result = pairs.unroll_group(item, (2, None))
    eps = pairs.perturbation(CONFIG, 3, 2, THETA.num_floats)
    run = pairs.sample_run(CONFIG, 0, 3, 2)
    thetas = torch.stack([item.theta + sign * CONFIG.sigma * item.scale * eps for sign in (1.0, -1.0)])
    _, losses = inner.unroll(THETA.spec, thetas, run, inner.start(THETA.spec, thetas, run), 0, run.horizon)
    means = torch.log(torch.clamp(losses.outer / run.unit.above, max=3.0) + 0.01).double().mean(dim=1)
    assert result.deltas[0] == pytest.approx(float(means[0] - means[1]), abs=1e-6)
    assert result.meta_loss == pytest.approx(float(means.mean()), abs=1e-6)
    assert (result.inner_steps, result.divergences, result.carry) == (2 * run.horizon, 0, None)
    assert abs(result.deltas[0]) > 1e-4


def test_runs_are_log_uniform_and_told_as_often_as_asked() -> None:
    config = dataclasses.replace(CONFIG, phases=(Phase(1.0, (10, 1000)),), tell_horizon=0.25)
    runs = [pairs.sample_run(config, 0, iteration, 0) for iteration in range(800)]
    logs = torch.tensor([math.log10(run.horizon) for run in runs], dtype=torch.float64)
    assert float(logs.mean()) == pytest.approx(2.0, abs=4 * 2 / math.sqrt(12 * 800))
    told = [run.total_steps for run in runs if run.total_steps]
    assert told == [run.horizon for run in runs if run.total_steps]
    assert len(told) / 800 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 800))
    assert all(100 <= run.horizon // run.loss_every <= 112 for run in runs if run.horizon > 900)
    assert all(run.horizon % run.loss_every == 0 for run in runs)
    in_windows = windows("nres", 30, 100)
    assert {pairs.sample_run(in_windows, 0, iteration, 0).horizon for iteration in range(9)} == {90}
    assert len({run.seed for run in runs} | {run.task.config["seed"] for run in runs}) == 1600


def test_perturbations_are_unit_normal_and_all_different() -> None:
    rows = torch.stack([pairs.perturbation(CONFIG, i, pair, 500) for i in range(4) for pair in range(4)])
    assert float(rows.std()) == pytest.approx(1.0, abs=4 / math.sqrt(2 * 8000))
    gram = rows @ rows.T / 500 - torch.eye(16)
    assert float(gram.abs().max()) < 0.3


def drive(config: MetaTrainConfig, count: int, pair: int = 3) -> list[tuple[Shared, Carry | None, pairs.Result]]:
    carry: Carry | None = None
    found = []
    for iteration in range(count):
        common = shared(config, iteration, begun=0)
        result = pairs.unroll_group(common, (pair, carry))
        found.append((common, carry, result))
        carry = result.carry
    return found


def test_the_learner_draws_the_perturbation_of_a_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs of three windows in turn, two windows an iteration; sums of runs that end, or are lost, are not kept."""
    config = windows("pes", 4, 12, pairs=2, staleness=5)
    learner = Learner(config, THETA.spec, TrainState.begin(config, THETA.flatten()))
    drawn: list[pairs.Key] = []

    def one(config: MetaTrainConfig, key: pairs.Key, num_floats: int) -> Tensor:
        drawn.append(key)
        return torch.ones(1, num_floats)

    monkeypatch.setattr(pairs, "perturbations", one)
    runs: dict[int, tuple[pairs.Key, ...]] = dict.fromkeys(range(10), ())
    for number in range(40):
        learner.state.iteration, group = divmod(number, 2)
        if group == 0:
            learner.begin()
        runs[number % 10] = keys = (*runs[number % 10], (learner.state.iteration, group))
        ended = len(keys) == 3
        result = pairs.Result(*keys[-1], keys, "none", (0.0,), 0.0, 0, 1, 0.0, None, "worker", ended=ended)
        assert torch.equal(learner.direction(result), torch.full((1, THETA.num_floats), float(len(keys))))
        runs[number % 10] = () if ended else keys
    assert drawn == [divmod(number, 2) for number in range(40)]
    assert len(learner._sums) == 10
    learner.state.iteration += 20
    learner.begin()
    assert not learner._sums


@pytest.mark.parametrize("estimator", ["truncated_es", "pes", "nres"])
def test_windows_of_a_pair(estimator: EstimatorName) -> None:
    """Runs of three windows; the last pair is not cut short at first. Directions and states as the table says."""
    config = windows(estimator, 4, 12)
    learner = Learner(config, THETA.spec, TrainState.begin(config, THETA.flatten()))
    total = torch.zeros(THETA.num_floats)
    for iteration, (common, carry, result) in enumerate(drive(config, 5)):
        begun = iteration - iteration % 3
        of = begun if estimator == "nres" else iteration
        eps = pairs.perturbation(config, of, 3, THETA.num_floats)[None]
        total = eps if iteration == begun else total + eps
        assert result.keys == tuple((i, 3) for i in (range(begun, iteration + 1) if estimator == "pes" else (of,)))
        anew = Learner(config, THETA.spec, TrainState.begin(config, THETA.flatten()))  # after --resume
        for one in (learner, anew):
            assert torch.equal(one.direction(result), total if estimator == "pes" else eps)
        run = pairs.sample_run(config, 0, begun, 3)
        thetas = es.antithetic(common.theta, eps, config.sigma * common.scale)
        before = inner.start(THETA.spec, thetas, run) if carry is None else carry.state
        _, losses = inner.unroll(THETA.spec, thetas, run, before, 4 * (iteration % 3), 4)
        points = objective.per_point(losses, "held_out", run.unit, config.loss_limit).double()
        means = (points * objective.weights(config.weighting, 12)[4 * (iteration % 3) :][:4]).mean(dim=1)
        assert result.deltas[0] == pytest.approx(float(means[0] - means[1]), abs=1e-6)
        assert result.inner_steps == 8
        if iteration % 3 == 2:
            assert result.carry is None
        else:
            assert result.carry is not None
            assert (result.carry.keys[0], result.carry.step) == ((begun, 3), 4 * (iteration % 3 + 1))
            plus, minus = result.carry.state
            assert torch.equal(plus, minus) == (estimator == "truncated_es")


def test_first_runs_of_a_phase_are_spread_over_their_windows() -> None:
    config = windows("nres", 4, 12)
    lengths = [[r.carry is None for *_, r in drive(config, 3, pair)].index(True) + 1 for pair in range(4)]
    assert lengths == [1, 2, 3, 3]


@pytest.mark.parametrize("weighting", ["mean", "linear", "last"])
@pytest.mark.parametrize("which", ["held_out", "train"])
def test_windows_of_nres_add_up_to_the_whole_run(weighting: Any, which: Any) -> None:
    """With one eps for the run, the mean over windows of delta is the delta of the whole run."""
    changes = {"weighting": weighting, "objective": which, "tell_horizon": 1.0, "delta_clip": 10.0}
    parts = [result.deltas[0] for *_, result in drive(windows("nres", 10, 40, **changes), 4)]
    whole = pairs.unroll_group(shared(windows("nres", 40, 40, **changes), 0, begun=0), (3, None)).deltas[0]
    assert sum(parts) / 4 == pytest.approx(whole, abs=1e-6)
    assert abs(whole) > 1e-5


def forbid(*_: Any) -> None:
    return None


@pytest.mark.parametrize("objective_name", ["held_out", "train"])
def test_the_fused_engine_and_torch_mean_the_same(objective_name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same units in both: losses within 1e-5, delta too; 24 steps in two windows."""
    config = windows("nres", 12, 24, objective=objective_name)
    fused = drive(config, 2)
    task = pairs.sample_run(config, 0, 0, 3).task
    assert inner.uses_engine(task)
    monkeypatch.setattr(inner, "_problem", forbid)
    assert not inner.uses_engine(task)
    for (*_, ours), (*_, torchs) in zip(fused, drive(config, 2), strict=True):
        assert ours.deltas == pytest.approx(torchs.deltas, abs=1e-5)
        assert ours.meta_loss == pytest.approx(torchs.meta_loss, abs=1e-5)
        assert (ours.divergences, ours.inner_steps) == (torchs.divergences, torchs.inner_steps)
    thetas, run = shared().theta[None], pairs.sample_run(config, 0, 5, 1)
    of_torch, of_engine = (losses_of(thetas, run, monkeypatch, torch_only) for torch_only in (True, False))
    for a, b in zip(of_torch, of_engine, strict=True):
        assert float((a - b).abs().max()) < 1e-5


def losses_of(thetas: Tensor, run: Any, monkeypatch: pytest.MonkeyPatch, torch_only: bool) -> objective.Losses:
    with monkeypatch.context() as patch:
        patch.setattr(inner, "_problem", forbid if torch_only else inner.engine.problem_of)
        _, losses = inner.unroll(THETA.spec, thetas, run, inner.start(THETA.spec, thetas, run), 0, 12)
    return losses


@pytest.mark.parametrize("estimator", ["truncated_es", "pes", "nres"])
@pytest.mark.parametrize("family", ["mixture", "noisy_quadratic"])
def test_pairs_that_share_a_task_are_those_pairs_by_themselves(estimator: EstimatorName, family: Family) -> None:
    """Group 1 of two pairs: the deltas of pairs 2 and 3 on its run, in two windows, in the engine and in torch."""
    config = windows(estimator, 5, 10, tasks=(family,), pairs_per_task=2)
    carry: Carry | None = None
    alone: list[Any] = [None, None]
    for iteration in range(2):
        common = shared(config, iteration, begun=0)
        result = pairs.unroll_group(common, (1, carry))
        assert result.inner_steps == 2 * 2 * 5
        run = pairs.sample_run(config, 0, 0, 1)
        for place in range(2):
            of = 0 if estimator == "nres" else iteration
            eps = pairs.perturbation(config, of, 2 + place, THETA.num_floats)[None]
            assert torch.equal(pairs.perturbations(config, (of, 1), THETA.num_floats)[place], eps[0])
            thetas = es.antithetic(common.theta, eps, config.sigma * common.scale)
            before = inner.start(THETA.spec, thetas, run) if iteration == 0 else alone[place]
            after, losses = inner.unroll(THETA.spec, thetas, run, before, 5 * iteration, 5)
            points = objective.per_point(losses, "held_out", run.unit, config.loss_limit)
            means = points.double().mean(dim=1)
            expected = float((means[0] - means[1]).clamp(-config.delta_clip, config.delta_clip))
            assert result.deltas[place] == pytest.approx(expected, abs=1e-6)
            alone[place] = inner.select(after, [0, 0]) if estimator == "truncated_es" else after
        carry = result.carry
        assert (carry is None) == (iteration == 1)


def test_groups_have_tasks_of_their_own() -> None:
    config = dataclasses.replace(CONFIG, pairs=6, pairs_per_task=3)
    assert config.groups == 2
    assert pairs.sample_run(config, 0, 0, 0).task != pairs.sample_run(config, 0, 0, 1).task
    with pytest.raises(ValueError, match="pairs: expected a multiple of pairs_per_task=4, got 6"):
        dataclasses.replace(config, pairs_per_task=4)


@pytest.mark.parametrize("family", ["mixture", "noisy_quadratic"])
def test_divergence_is_the_worst_loss_and_counted(family: Family) -> None:
    config = dataclasses.replace(CONFIG, tasks=(family,))
    spec = dataclasses.replace(THETA.spec, step_multiplier=1e20)
    base = shared(config)
    longest = base.theta.clone()
    longest[-1] = 9.0  # the bias of the logarithm of the step, as the first ten steps are shorter
    result = pairs.unroll_group(base._replace(spec=spec, theta=longest), (1, None))
    assert result.divergences == 2
    assert result.deltas[0] == 0.0
    assert result.meta_loss == pytest.approx(math.log(3.01), abs=1e-6)


def test_delta_is_clipped() -> None:
    clipped = dataclasses.replace(CONFIG, delta_clip=1e-5, sigma=0.2)
    assert abs(pairs.unroll_group(shared(clipped), (1, None)).deltas[0]) == 1e-5


def test_validation_does_not_depend_on_the_seed_and_repeats() -> None:
    config = dataclasses.replace(CONFIG, validation_horizons=(100,), validation_tasks=2)
    scores, _ = pairs.validate_task(shared(config), 1)
    again, _ = pairs.validate_task(shared(dataclasses.replace(config, seed=99)), 1)
    assert scores == again
    assert pairs.settings(config) == [(100, True), (100, False)]
    other, _ = pairs.validate_task(shared(config), 0)
    assert scores != other
    assert all(score.final < score.mean for score in scores)


def test_tasks_are_no_larger_than_the_phase_allows() -> None:
    """And the others are the same as without a bound."""
    free = dataclasses.replace(CONFIG, tasks=ENGINE_FAMILIES)
    small = dataclasses.replace(free, phases=(Phase(1.0, (10, 40), max_params=500),))
    tasks = [[pairs.sample_run(config, 0, i, 0).task for i in range(60)] for config in (free, small)]
    assert max(task.num_params for task in tasks[1]) <= 500
    assert sum(task.num_params > 500 for task in tasks[0]) > 20
    for before, after in zip(*tasks, strict=True):
        assert (before == after) == (before.num_params <= 500)
    none = dataclasses.replace(free, phases=(Phase(1.0, (10, 40), max_params=1),))
    with pytest.raises(ValueError, match=r"max_params: 1000 tasks of .* all have more than 1 parameters"):
        pairs.sample_run(none, 0, 0, 0)


MIXTURE = TaskDistribution(
    {"quadratic": 1.0, "teacher": 2.0, "losg_tasks": 1.0},
    max_seconds=0.005,
    reparametrise=0.5,
    gradient_noise=0.5,
)


def test_a_mixture_is_trained_and_validated_on() -> None:
    """Tasks of the mixture, those that the engine can run in the engine; JSON keeps it."""
    config = dataclasses.replace(CONFIG, tasks=MIXTURE, pairs_per_task=2, phases=(Phase(1.0, (4, 12)),))
    assert MetaTrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    tasks = [pairs.sample_run(config, 0, iteration, 0).task for iteration in range(8)]
    assert len({inner.uses_engine(task) for task in tasks}) == 2
    results = [pairs.unroll_group(shared(config, iteration), (0, None)) for iteration in range(8)]
    assert all(math.isfinite(delta) for result in results for delta in result.deltas)
    assert sum(any(result.deltas) for result in results) > 4
    config = dataclasses.replace(config, validation_horizons=(10,), validation_tasks=3)
    scores = [pairs.validate_task(shared(config), index)[0] for index in range(3)]
    assert scores == [pairs.validate_task(shared(config), index)[0] for index in range(3)]


def test_configurations_of_before_still_load() -> None:
    before = CONFIG.to_json()
    for name in ("outer", "pairs_per_task", "valid_rows"):
        del before[name]
    assert MetaTrainConfig.from_json(before) == dataclasses.replace(CONFIG, valid_rows=1)
    with pytest.raises(ValueError, match=r"missing fields \['sigma'\]"):
        MetaTrainConfig.from_json({name: value for name, value in before.items() if name != "sigma"})


def test_every_family_can_be_trained_on() -> None:
    for family in (*FAMILIES, *NETWORK_FAMILIES):
        config = dataclasses.replace(CONFIG, tasks=(family,), phases=(Phase(1.0, (4, 4)),))
        assert math.isfinite(pairs.unroll_group(shared(config), (0, None)).deltas[0])
