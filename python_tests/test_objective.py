"""lopt/meta/objective.py and outer.py: meta-loss, weights, scales and Adam against their formulas."""

import math

import pytest
import torch

from lopt import Theta
from lopt.meta import objective, outer
from lopt.meta.objective import Losses, Unit
from lopt.rule import unflatten


def test_normalised_loss_is_the_log_of_the_clipped_ratio_and_always_finite() -> None:
    loss = torch.tensor([1.0, 4.0, 9.0, -1.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    expected = [math.log(ratio + 0.01) for ratio in (0.5, 2.0, 3.0, 0.0, 3.0, 3.0, 3.0)]
    assert objective.normalise(loss, Unit(0.0, 2.0), 3.0).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("initial", "floor", "loss", "ratio"),
    [
        (2.0, None, 0.5, 0.25),
        (2.0, 1.0, 1.25, 0.25),  # above its floor
        (-4.0, -8.0, -7.0, 0.25),
        (-4.0, None, -7.0, 0.25),  # as far below its start as .5 is below 2: 1 - 3 / 4
        (-4.0, None, -1.0, 1.75),
        (2.0, 2.5, 0.5, 0.25),  # a floor that the first losses are below is none
        (0.0, None, 1e-7, 0.1),
        (math.nan, 0.0, 1.0, 3.0),
        (math.inf, None, 1.0, 3.0),
    ],
)
def test_the_unit_of_a_loss(initial: float, floor: float | None, loss: float, ratio: float) -> None:
    found = objective.normalise(torch.tensor(loss, dtype=torch.float64), Unit.of(initial, floor), 3.0)
    assert float(found) == pytest.approx(math.log(ratio + 0.01), abs=1e-6)


def test_train_losses_are_averaged_where_held_out_ones_are_sampled() -> None:
    losses = Losses(torch.tensor([[2.0, 1.0]]), torch.tensor([[8.0, 6.0, 4.0, 2.0]]))
    logs = [math.log(value + 0.01) for value in (2.0, 1.5, 1.0, 0.5)]
    assert objective.per_point(losses, "train", Unit(0.0, 4.0), 3.0)[0].tolist() == pytest.approx(
        [(logs[0] + logs[1]) / 2, (logs[2] + logs[3]) / 2], abs=1e-6
    )
    held_out = objective.per_point(losses, "held_out", Unit(0.0, 4.0), 3.0)[0].tolist()
    assert held_out == pytest.approx([math.log(0.51), math.log(0.26)], abs=1e-6)


@pytest.mark.parametrize("points", [1, 3, 100])
def test_weights_have_mean_one(points: int) -> None:
    for name in ("mean", "linear", "last"):
        assert float(objective.weights(name, points).double().mean()) == pytest.approx(1.0, abs=1e-6)
    assert objective.weights("mean", 2).tolist() == [1.0, 1.0]
    assert objective.weights("linear", 3).tolist() == [0.5, 1.0, 1.5]
    assert objective.weights("last", 8).tolist() == [0.0] * 6 + [4.0] * 2


@pytest.mark.parametrize(
    ("horizon", "window", "expected"),
    [(50, 50, 1), (1000, 1000, 10), (1990, 1990, 10), (10_000, 500, 100), (210, 7, 1)],
)
def test_spacing_divides_the_window(horizon: int, window: int, expected: int) -> None:
    assert objective.spacing(horizon, window) == expected


def test_a_run_that_ended_not_finite_diverged() -> None:
    outer_losses = torch.tensor([[1.0, 2.0], [1.0, math.nan], [1.0, math.inf]])
    assert objective.diverged(Losses(outer_losses, outer_losses)).tolist() == [False, True, True]


def test_scales_are_those_of_the_initialisation() -> None:
    """``1 / sqrt(fan_in)``, .3 and .25, zero outside the groups; phase by phase, its counts add up."""
    spec = Theta.init("compact").spec
    every = unflatten(spec, outer.scales(spec, "prior", "all"))
    assert every["mlp.w1"].unique().item() == pytest.approx(spec.shapes()["mlp.w1"][0] ** -0.5)
    assert every["mlp.w3"].unique().item() == pytest.approx(spec.mlp_width**-0.5)
    for name, scale in {"skip": 0.25, "step.w": 0.25, "step.b": 0.25, "mlp.b1": 0.3, "initial_h": 0.3}.items():
        assert every[name].unique().item() == pytest.approx(scale)
    linear, mlp, lstm = (outer.scales(spec, "prior", groups) for groups in ("linear", "mlp", "lstm"))
    assert int((linear > 0).sum()) == 12 + 36
    assert int((mlp > 0).sum()) == 24 * 8 + 8 + 8 * 8 + 8 + 8 * 6 + 6 + 12 + 36
    assert torch.equal(linear[mlp == 0], torch.zeros(int((mlp == 0).sum())))
    assert torch.equal(mlp + lstm, outer.scales(spec, "prior", "all"))
    direction = unflatten(spec, outer.scales(spec, "prior", "direction"))
    assert {name for name, scale in direction.items() if scale.any()} == {
        name for name in spec.shapes() if name.startswith(("mlp.", "skip"))
    }
    assert bool((mlp * lstm == 0).all())
    assert set(outer.scales(spec, "none", "lstm").tolist()) == {0.0, 1.0}


def test_adam_is_torchs_adam(generator: torch.Generator) -> None:
    theta = torch.zeros(5, requires_grad=True)
    reference = torch.optim.Adam([theta], lr=1.0, betas=(0.8, 0.95))
    moments, ours = outer.Moments.zeros(5), torch.zeros(5)
    for _ in range(20):
        gradient = torch.randn(5, generator=generator)
        theta.grad = gradient.clone()
        reference.step()
        moments, direction = outer.adam(moments, gradient, torch.ones(5, dtype=torch.bool), (0.8, 0.95))
        ours = ours - direction
    torch.testing.assert_close(ours, theta.detach(), rtol=1e-5, atol=1e-5)


def test_components_are_trained_and_warmed_up_on_their_own(generator: torch.Generator) -> None:
    """Component 1 joins after two steps, as if it began then; each waits for three gradients."""
    moments, alone = outer.Moments.zeros(2), outer.Moments.zeros(1)
    for step in range(8):
        gradient = torch.randn(2, generator=generator)
        trained = torch.tensor([True, step >= 2])
        moments, direction = outer.adam(moments, gradient, trained, (0.9, 0.99), warmup=3)
        assert [bool(value != 0) for value in direction] == [step >= 3, step >= 5]
        if step >= 2:
            alone, expected = outer.adam(alone, gradient[1:], trained[1:], (0.9, 0.99), warmup=3)
            assert float(direction[1]) == float(expected)


def test_sgd_follows_the_mean_of_the_gradients(generator: torch.Generator) -> None:
    moments, trained, seen = outer.Moments.zeros(3), torch.tensor([True, True, False]), torch.zeros(0, 3)
    for step in range(1, 6):
        seen = torch.cat([seen, torch.randn(1, 3, generator=generator)])
        moments, direction = outer.sgd(moments, seen[-1], trained, (0.8, 0.95), warmup=2)
        weights = 0.2 * 0.8 ** torch.arange(step - 1, -1, -1) / (1.0 - 0.8**step)
        torch.testing.assert_close(direction, torch.where(trained & (step > 2), weights @ seen, torch.zeros(3)))
