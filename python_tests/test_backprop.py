"""Backpropagation through inner runs: the same runs as the unroll's, and the gradient of what comes of them."""

import dataclasses
import io
import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from meta_cases import SMALL, Double
from rich.console import Console

from lopt import Theta
from lopt.meta import backprop, pairs, trainer, unroll
from lopt.meta.backprop import mean_direction
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import LocalProcesses
from lopt.meta.metrics import read_metrics
from lopt.meta.unroll import Run
from lopt.rule import reference, unflatten
from lopt.rule.flat import Flat
from lopt.rule.inputs import Shapes
from lopt.rule.reference import State
from lopt.tasks import sample_task

QUIET = Console(file=io.StringIO())
SHAPES = [(4, 3), (4,), (3, 4), (4, 3), (), (2, 3, 3)]


def config_of(**changes):
    phase = Phase(1.0, (8, 12), estimator="backprop")
    return MetaTrainConfig(**{"inner_steps": 1, "phases": (phase,), "pairs": 4, "tasks": ("mixture",), **changes})


@pytest.mark.parametrize(
    "theta",
    [
        pytest.param(lambda: Theta.load("default"), id="default"),
        pytest.param(lambda: Theta.load("default").with_spec(stats="lagged"), id="lagged"),
        pytest.param(lambda: Theta.init("compact", seed=3), id="compact"),
        pytest.param(lambda: Theta.init("paper", seed=3), id="paper"),
    ],
)
def test_laid_end_to_end_it_is_the_reference(theta):
    theta = theta()
    spec, weights = theta.spec, {name: value.double().requires_grad_() for name, value in theta.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    facts = Shapes.of(spec, SHAPES, params[0])
    flat = Flat(spec, SHAPES, facts)
    state, other = reference.init_state(spec, weights, params), flat.init_state(weights)
    joined, before = flat.join(params), other.before
    for step in range(4):
        grads = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
        grads[1][0] = torch.nan if step == 2 else 0.0
        loss, told = torch.tensor(2.0 - 0.1 * step, dtype=torch.float64), 9.0
        params, state, trace = reference.update(
            spec, weights, state, params, grads, loss, total_steps=told, before=before, shapes=facts
        )
        before = trace["kept"]
        joined, other = flat.update(weights, other, joined, flat.join(grads), loss, told)
        for mine, theirs in zip(flat.split(joined), params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        as_lists = State(other.globals, other.rows, flat_rows(flat, other.mom), flat_rows(flat, other.rms))
        torch.testing.assert_close(as_lists, State(*state), rtol=1e-10, atol=1e-12)
    names = [name for name, value in weights.items() if not name.startswith("gate.") or spec.newton_schulz]
    leaves = [weights[name] for name in names]
    mine = torch.autograd.grad(joined.square().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(sum(param.square().sum() for param in params), leaves, allow_unused=True)
    for name, one, two in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def flat_rows(flat, values):
    return [rows.clone() for rows in values.split(flat.sizes, dim=1)]


def run_of(family, **changes):
    task = sample_task(5, (family,))
    return Run(task, 3, **{"horizon": 8, "total_steps": 8, "loss_every": 2, "valid_batches": 2, **changes})


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_of("mixture"), id="perceptron"),
        pytest.param(run_of("token_transformer", averaged=True, total_steps=0), id="transformer-averaged"),
        pytest.param(run_of("small_convolution", valid_every=0), id="convolution"),
    ],
)
@pytest.mark.parametrize("objective", ["held_out", "train"])
def test_gradient_of_the_run_that_the_unroll_makes(run, objective, monkeypatch):
    monkeypatch.setattr(backprop, "SEGMENT", 4)
    run = dataclasses.replace(run, task=Double(run.task))
    theta, config = Theta.load("default"), config_of(objective=objective)
    flat = theta.flatten().double()
    found = backprop.estimate(theta.spec, flat, run, config)

    weights = unflatten(theta.spec, flat[None])
    begun = unroll.start(theta.spec, weights, run)
    _, losses = unroll.unroll(theta.spec, weights, run, begun, run.horizon, impl="reference")
    torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-12)

    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(len(flat), dtype=torch.float64, generator=generator) * 1e-7
    ends = [backprop.estimate(theta.spec, flat + sign * direction, run, config).meta_loss for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2, float(found.gradient @ direction), rtol=1e-4, atol=1e-13)


def test_memory_is_that_of_segments_and_changes_nothing(monkeypatch):
    theta, run, config = Theta.load("default"), run_of("mixture"), config_of()
    found = []
    for segment in (2, 8):
        monkeypatch.setattr(backprop, "SEGMENT", segment)
        found.append(backprop.estimate(theta.spec, theta.flatten(), run, config))
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-4, atol=1e-7)
    assert found[0].meta_loss == pytest.approx(found[1].meta_loss, rel=1e-6)


def test_a_run_that_diverges_has_no_gradient(monkeypatch):
    theta, run = Theta.load("default"), run_of("mixture")
    assert math.isfinite(run.unit.above)
    kind = type(run.task)
    loss = kind.loss
    monkeypatch.setattr(kind, "loss", lambda self, params, batch: loss(self, params, batch) * torch.inf)
    found = backprop.estimate(theta.spec, theta.flatten(), run, config_of())
    assert torch.equal(found.gradient, torch.zeros_like(found.gradient))
    assert found.meta_loss == pytest.approx(math.log(config_of().loss_limit + 0.01))


def test_runs_have_the_same_say():
    gradients = torch.tensor([[1e6, 0.0], [0.0, -1e3], [torch.inf, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(mean_direction(gradients), torch.tensor([0.25, -0.25]), rtol=1e-4, atol=0.0)


def test_pairs_that_share_a_task_are_refused():
    with pytest.raises(ValueError, match="pairs_per_task: expected 1 for backprop, got 2"):
        config_of(pairs_per_task=2)


def test_a_step_against_the_gradient_lowers_the_meta_loss():
    theta, run, config = Theta.init_adam("compact"), run_of("mixture", horizon=20, total_steps=20), config_of()
    flat, losses = theta.flatten(), []
    for _ in range(4):
        found = backprop.estimate(theta.spec, flat, run, config)
        losses.append(found.meta_loss)
        flat = flat - 0.02 * mean_direction(found.gradient[None])
    assert losses == sorted(losses, reverse=True)


def test_processes_give_the_same_bits_as_one(tmp_path: Path):
    phases = (Phase(1.0, (8, 12), estimator="backprop"),)
    config = dataclasses.replace(SMALL, phases=phases, inner_steps=60, tasks=("mixture",))
    serial = trainer.run(config, tmp_path / "one", console=QUIET)
    with closing(LocalProcesses(2)) as executor:
        other = trainer.run(config, tmp_path / "two", executor=executor, console=QUIET)
    assert serial.provenance["iterations"] >= 2
    assert not torch.equal(serial.flatten(), trainer.start_theta(config).flatten())
    assert torch.equal(serial.flatten(), other.flatten())
    families = [line["families"] for line in read_metrics(tmp_path / "one") if "families" in line]
    assert all(line["mixture"]["pairs"] == config.pairs for line in families)


def test_rules_of_others_are_refused():
    shared = pairs.Shared(config_of(), Theta.init("nn_adam").spec, torch.zeros(0), torch.zeros(0), 0, 0, 0)
    with pytest.raises(TypeError, match="estimator: backprop runs lopt's own optimizer"):
        pairs.unroll_group(shared, (0, None))
