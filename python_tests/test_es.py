"""lopt/meta/es.py: against the author's estimators, and against meta-gradients known in closed form.

golden/es_and_helpers.npz: losses, perturbations and results of truncated_es.py, truncated_pes.py and full_es.py of
google/learned_optimization on random numbers, with runs that end inside the window (``is_done``, ``mask``).
golden/pes_rnn_quadratic.npz: 4 outer steps of its truncated PES with the paper's optimizer on a quadratic (4 pairs,
windows of 5 steps, runs of 7): all losses, and for 51 of the 35,799 components of theta the perturbations, gradients,
accumulators and theta under Adam with the gradient clipped at 3.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt.meta import es

Golden = Callable[[str], dict[str, np.ndarray]]


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def window_mean(losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean ``[runs]`` of ``losses`` ``[steps, runs]`` over the steps where ``mask`` is true."""
    return losses.mean(dim=0) if mask is None else (losses * mask).sum(dim=0) / mask.sum(dim=0)


def pes_window(
    eps: Tensor, xi: Tensor, plus: Tensor, minus: Tensor, sigma: float, done: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and next xi of a window in which runs may end, as the author's code defines them.

    From the step where ``done`` is true on, the losses are of a new run, which has seen ``eps`` only; windows of ours
    end with a run, so this is two of them.
    """
    pes = es.ESTIMATORS["pes"]
    fresh = torch.cumsum(done, dim=0) > 0
    delta = (plus - minus) * mask / mask.sum(dim=0)
    assert [sum(pes.directions(windows)) for windows in ((1,), (1, 10))] == [1, 11]
    direction = eps + xi
    gradient = es.es_gradient(direction, (delta * ~fresh).sum(dim=0), sigma)
    gradient = gradient + es.es_gradient(eps, (delta * fresh).sum(dim=0), sigma)
    return gradient, torch.where(fresh[-1][:, None], eps, direction)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture
def recorded(golden: Golden) -> dict[str, Tensor]:
    """es_and_helpers with theta flattened and one time axis: losses [10, 4], vec_pos, accum [4, 13], gradients [13]."""
    z = tensors(golden("es_and_helpers"))
    flat = {name: z[name].reshape(10, 4) for name in ("pos_loss", "neg_loss", "is_done", "mask")}
    for name in ("vec_pos", "accum", "pes|new_accum"):
        flat[name] = torch.cat([z[f"{name}|a"].reshape(4, -1), z[f"{name}|b"]], dim=1)
    for name in ("es", "pes", "es_sign0.5", "full_avg_clip0.1"):
        flat[f"{name}|grad"] = torch.cat([z[f"{name}|grad|a"].reshape(-1), z[f"{name}|grad|b"]])
    return {**z, **flat}


def test_es_matches_the_authors_truncated_es(recorded: dict[str, Tensor]) -> None:
    sigma = float(recorded["std"])
    plus = window_mean(recorded["pos_loss"], recorded["mask"])
    minus = window_mean(recorded["neg_loss"], recorded["mask"])
    gradient = es.es_gradient(recorded["vec_pos"] / sigma, plus - minus, sigma)
    assert relative_error(plus - minus, recorded["es|delta_loss"]) < 1e-6
    assert relative_error(gradient, recorded["es|grad"]) < 1e-6
    assert float((plus + minus).mean() / 2) == pytest.approx(float(recorded["es|mean_loss"]), rel=1e-6)


def test_variants_of_the_loss_difference_compose(recorded: dict[str, Tensor]) -> None:
    sigma, eps = float(recorded["std"]), recorded["vec_pos"] / float(recorded["std"])
    delta = window_mean(recorded["pos_loss"], recorded["mask"]) - window_mean(recorded["neg_loss"], recorded["mask"])
    assert relative_error(es.es_gradient(eps, 0.5 * delta.sign(), sigma), recorded["es_sign0.5|grad"]) < 1e-6
    delta = window_mean(recorded["pos_loss"] - recorded["neg_loss"])
    assert relative_error(es.es_gradient(eps, delta.clamp(-0.1, 0.1), sigma), recorded["full_avg_clip0.1|grad"]) < 1e-6


def test_pes_matches_the_authors_truncated_pes(recorded: dict[str, Tensor]) -> None:
    sigma = float(recorded["std"])
    gradient, xi = pes_window(
        recorded["vec_pos"] / sigma,
        recorded["accum"] / sigma,
        recorded["pos_loss"],
        recorded["neg_loss"],
        sigma,
        recorded["is_done"],
        recorded["mask"],
    )
    assert relative_error(gradient, recorded["pes|grad"]) < 1e-6
    assert relative_error(xi * sigma, recorded["pes|new_accum"]) < 1e-6


def test_four_recorded_outer_iterations_of_pes_with_clipped_adam(golden: Golden) -> None:
    z = tensors(golden("pes_rnn_quadratic"))
    sigma, lr = float(z["config"][4]), float(z["config"][5])
    theta = z["theta0"].clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    xi = torch.zeros(4, 51)
    for outer in range(4):
        plus, minus, mask = z["loss_plus"][outer], z["loss_minus"][outer], z["mask"][outer]
        eps = z["vec_pos"][outer] / sigma
        gradient, xi = pes_window(eps, xi, plus, minus, sigma, z["is_done"][outer], mask)
        assert relative_error(gradient, z["grad"][outer]) < 1e-6
        assert relative_error(xi * sigma, z["accumulator"][outer]) < 1e-6
        mean = (window_mean(plus, mask) + window_mean(minus, mask)).mean() / 2
        assert float(mean) == pytest.approx(float(z["mean_loss"][outer]), rel=1e-6)
        theta.grad = gradient.clamp(-3.0, 3.0)
        adam.step()
        assert float((theta.detach() - z["theta"][outer]).abs().max()) < 1e-7


def test_antithetic_is_theta_plus_and_minus_sigma_eps() -> None:
    theta, eps = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, -2.0]])
    expected = torch.tensor([[1.25, 2.0], [1.125, 1.5], [0.75, 2.0], [0.875, 2.5]])
    assert torch.equal(es.antithetic(theta, eps, 0.25), expected)


@pytest.mark.parametrize("curvature", [0.0, 3.0])
def test_one_pair_gives_the_directional_derivative_exactly(curvature: float, generator: torch.Generator) -> None:
    """The antithetic difference of a loss that is at most quadratic is 2 sigma eps . gradient, without any noise."""
    theta, slope = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    eps = torch.randn(1, 7, dtype=torch.float64, generator=generator)

    def loss(thetas: Tensor) -> Tensor:
        return thetas @ slope + curvature * torch.square(thetas).sum(dim=1) / 2

    plus, minus = loss(es.antithetic(theta, eps, 0.3)).chunk(2)
    gradient = slope + curvature * theta
    torch.testing.assert_close(es.es_gradient(eps, plus - minus, 0.3), eps[0] * (eps[0] @ gradient), rtol=1e-12, atol=0)


def test_es_is_unbiased_on_a_quadratic(generator: torch.Generator) -> None:
    """L = theta' A theta / 2 + b . theta has gradient A theta + b; 4000 seeds agree within 4 standard errors."""
    root, theta, slope = torch.randn(6, 6, generator=generator), *torch.randn(2, 6, generator=generator)
    matrix = root @ root.T

    def loss(thetas: Tensor) -> Tensor:
        return ((thetas @ matrix) * thetas).sum(dim=1) / 2 + thetas @ slope

    estimates = []
    for _ in range(4000):
        eps = torch.randn(3, 6, generator=generator)
        plus, minus = loss(es.antithetic(theta, eps, 0.1)).chunk(2)
        estimates.append(es.es_gradient(eps, plus - minus, 0.1))
    sample = torch.stack(estimates)
    z_scores = (sample.mean(dim=0) - (matrix @ theta + slope)) / (sample.std(dim=0) / len(sample) ** 0.5)
    assert float(z_scores.abs().max()) < 4.0


@pytest.mark.parametrize("name", ["pes", "nres", "truncated_es"])
def test_which_estimators_are_unbiased_under_truncation(name: es.EstimatorName, generator: torch.Generator) -> None:
    """An inner run with a memory: s' = .9 s + theta, loss c . s, four windows of five steps.

    The gradient of the mean loss is c mean_t (1 - .9^t) / .1. Truncated ES differentiates each window as if its first
    state did not depend on theta, and so finds c mean over one window instead.
    """
    windows, steps, decay, sigma = 4, 5, 0.9, 0.2
    repeats, pairs = 4000, 2
    estimator = es.ESTIMATORS[name]
    slope, theta = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.1])
    memory = (1 - decay ** torch.arange(1, windows * steps + 1)) / (1 - decay)
    whole, first = slope * memory.mean(), slope * memory[:steps].mean()
    total, state = torch.zeros(repeats, 2), torch.zeros(repeats, 2 * pairs, 2)
    eps = torch.randn(repeats, pairs, 2, generator=generator)
    seen: list[torch.Tensor] = []
    for window in range(windows):
        if window and not estimator.one_eps_per_run:
            eps = torch.randn(repeats, pairs, 2, generator=generator)
        thetas = torch.cat([theta + sigma * eps, theta - sigma * eps], dim=1)
        losses = torch.zeros(repeats, 2 * pairs)
        for _ in range(steps):
            state = decay * state + thetas
            losses += state @ slope / steps
        plus, minus = losses.chunk(2, dim=1)
        seen.append(eps)
        direction = torch.stack(estimator.directions(tuple(seen))).sum(dim=0)
        total += torch.vmap(es.es_gradient, in_dims=(0, 0, None))(direction, plus - minus, sigma)
        if estimator.shares_state:
            state = state[:, :pairs].repeat(1, 2, 1)
    expected = first if name == "truncated_es" else whole
    error = total.mean(dim=0) / windows - expected
    assert float((error / (total.std(dim=0) / windows / repeats**0.5)).abs().max()) < 4.0
    assert float((whole / first).min()) > 1.5  # so the two are told apart


def test_directions() -> None:
    """Of the third window of a run, whose last entry is the one that it is perturbed by."""
    found = {name: estimator.directions((1, 2, 3)) for name, estimator in es.ESTIMATORS.items()}
    assert found == {"es": (3,), "truncated_es": (3,), "pes": (1, 2, 3), "nres": (1,)}
    assert all(estimator.directions((1,)) == (1,) for estimator in es.ESTIMATORS.values())


def test_every_family_has_a_say_whatever_the_size_of_its_differences() -> None:
    """Two families, of which the one pulls to the left by little and the other to the right by much, and noisily."""
    random = torch.Generator().manual_seed(0)
    eps = torch.randn(4000, 2, generator=random)
    small, large = 0.001 * eps[:3000, 0], -0.1 * eps[3000:, 0] * (1 + 100 * (torch.rand(1000, generator=random) < 0.01))
    delta, families = torch.cat([small, large]), ["a"] * 3000 + ["b"] * 1000
    plain = es.es_gradient(eps, delta, 0.5)
    fair = es.es_gradient(eps, es.equalised(delta, families), 0.5)
    assert plain[0] < 0 < fair[0]
    assert abs(float(fair[1])) < 0.1 * float(fair[0])
    assert not es.equalised(torch.zeros(3), ["a", "a", "b"]).any()
