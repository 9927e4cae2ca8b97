"""lopt/meta/unroll.py: against LearnedOptimizer in a plain loop, against the author's recorded run, its promises."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from meta_cases import Double
from torch import Tensor

from lopt import LearnedOptimizer, Theta
from lopt.meta.unroll import Run, RunState, start, unroll
from lopt.rule import PRESETS, reference, unflatten
from lopt.tasks import Batch, Task
from lopt.tasks.synthetic import Perceptron, Quadratic
from lopt.tasks.task import SplitName, map_tensors

# Not a classifier: there the gradients of the last layer sum to zero, and the sign of their mean, an input of the LSTM,
# is rounding noise.
TASK = Perceptron(seed=0, data="teacher", regression=True, inputs=6, hidden=(9,), outputs=3, batch_size=8)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def population(preset: str, rows: int, spread: float = 0.02, stats: str = "current") -> tuple[Theta, Tensor]:
    """A theta, and ``[rows, P]`` thetas around it."""
    theta = Theta.init_adam(preset).with_spec(stats=stats)
    noise = torch.randn(rows, theta.num_floats, generator=torch.Generator().manual_seed(1))
    return theta, theta.flatten() + spread * noise


@pytest.mark.parametrize("preset", ["compact", "spectral", "paper"])
@pytest.mark.parametrize(("stats", "total_steps"), [("current", 0), ("current", 25), ("lagged", 25)])
def test_unroll_is_the_learned_optimizer_in_a_plain_loop(preset: str, stats: str, total_steps: int) -> None:
    theta, thetas = population(preset, rows=3, stats=stats)
    theta, thetas, task = theta.to(dtype=torch.float64), thetas.double(), Double(TASK)
    run = Run(task, seed=5, horizon=25, total_steps=total_steps)
    weights = unflatten(theta.spec, thetas)
    state, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 25)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for row in range(3):
        params = {name: value.requires_grad_() for name, value in task.init(5).items()}
        optimizer = LearnedOptimizer(
            [task.group(params.values())],
            theta.unflatten(thetas[row]),
            total_steps=total_steps or None,
            impl="reference",
        )
        train, inner, outer = (task.batches(5, split) for split in ("train", "inner_valid", "outer_valid"))
        for step in range(25):
            if step % 10 == 0:
                optimizer.observe(valid_loss=task.loss(params, next(inner)).detach())
            optimizer.zero_grad()
            loss = task.loss(params, next(train))
            loss.backward()
            optimizer.step(loss=loss.detach())
            close(losses.train[row, step], loss.detach())
            close(losses.outer[row, step], task.loss(params, next(outer)).detach())
        for name, value in params.items():
            close(state.params[name][row], value.detach())
    assert float(losses.outer[:, -1].std()) > 1e-4  # the thetas do differ


@dataclass(frozen=True)
class PortQuadratic(Task):
    """``|a - target_a|^2 + |b - target_b|^2 / 4``, the task of golden/pes_rnn_quadratic.npz (see test_es.py)."""

    arrays: Mapping[str, np.ndarray]

    name = "port-quadratic"
    config: Any = None

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(self.arrays[f"init|{name}"]) for name in "ab"}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        a, b = (torch.square(params[name] - torch.from_numpy(self.arrays[f"target|{name}"])).sum() for name in "ab")
        return a + b / 4

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        while True:
            yield Batch(torch.zeros(1), torch.zeros(1))


def test_unroll_replays_the_authors_recorded_run(golden: Callable[[str], Any]) -> None:
    """Pair 2 of the first outer step, positive sign: 5 steps under theta + sigma eps, without validation losses.

    Its optimizer state began under the unperturbed theta (``initial0``), and its step_multiplier is .1.
    """
    z = golden("pes_rnn_quadratic")
    spec = dataclasses.replace(PRESETS["paper"], step_multiplier=0.1)
    run = Run(PortQuadratic(z), seed=0, horizon=5, valid_every=0)
    other = Theta.init("paper", seed=3).flatten()
    theta = torch.from_numpy(z["theta_plus"])
    first = torch.cat([torch.from_numpy(z["initial0"]), theta[len(z["initial0"]) :]])
    state = start(spec, unflatten(spec, torch.stack([other, first, other])), run)
    weights = unflatten(spec, torch.stack([other, theta, other]))
    for step in range(5):
        state, losses = unroll(spec, weights, run, state, 1)
        assert float(losses.train[1, 0]) == pytest.approx(float(z["loss_plus"][0, step, 2]), rel=1e-6)
        for name in "ab":
            error = np.abs(state.params[name][1].numpy() - z[f"params_plus|{name}"][step]).max()
            assert error < 1e-6
    moved = np.abs(z["params_plus|a"][-1] - z["init|a"]).max()
    assert moved > 1e-2  # what an error of 1e-6 is to be compared with


def equal(a: Any, b: Any) -> bool:
    """Whether two states have the same bits."""
    return torch.equal(flat(a), flat(b))


def flat(tree: Any) -> Tensor:
    leaves: list[Tensor] = []
    map_tensors(lambda x: leaves.append(x.reshape(-1).double()) or x, tree)
    return torch.cat(leaves)


@pytest.mark.parametrize("preset", ["compact", "spectral", "paper"])
def test_kernels_unroll_lagged_statistics_as_the_reference_does(preset: str) -> None:
    theta, thetas = population(preset, rows=3, stats="lagged")
    run, weights = Run(TASK, seed=5, horizon=20, total_steps=20), unflatten(theta.spec, thetas)
    begun = start(theta.spec, weights, run)
    ends = [unroll(theta.spec, weights, run, begun, 20, impl=impl)[1] for impl in ("cpu", "sim", "reference")]
    for end in ends[:2]:
        torch.testing.assert_close(end.outer, ends[2].outer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stats", ["current", "lagged"])
@pytest.mark.parametrize("windows", [(7, 18), (10, 10, 5), (1,) * 25])
def test_windows_make_the_same_run_to_the_bit(windows: tuple[int, ...], stats: str) -> None:
    theta, thetas = population("compact", rows=4, stats=stats)
    weights = unflatten(theta.spec, thetas)
    run = Run(TASK, seed=2, horizon=25, total_steps=25, valid_batches=2)
    whole, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 25)
    state, parts = start(theta.spec, weights, run), []
    for steps in windows:
        state, part = unroll(theta.spec, weights, run, state, steps)
        parts.append(part)
    assert state.step == 25
    assert equal(state[1:], whole[1:])
    assert torch.equal(torch.cat([part.outer for part in parts], dim=1), losses.outer)


def test_the_same_theta_twice_is_the_same_run_twice() -> None:
    """Common random numbers: in an antithetic pair with eps = 0 the losses are equal, whatever else is in the batch."""
    theta, thetas = population("compact", rows=3)
    weights = unflatten(theta.spec, thetas[[0, 1, 0, 2]])
    run = Run(TASK, seed=2, horizon=12)
    _, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 12)
    assert torch.equal(losses.outer[0], losses.outer[2])
    assert not torch.equal(losses.outer[0], losses.outer[1])


@pytest.mark.parametrize(("steps", "valid_every", "expected"), [(20, 10, 2), (21, 10, 3), (7, 1, 7), (9, 0, 0)])
def test_validation_losses_are_observed_every_so_many_steps(steps: int, valid_every: int, expected: int) -> None:
    theta, thetas = population("compact", rows=1)
    weights = unflatten(theta.spec, thetas)
    run = Run(TASK, seed=0, horizon=30, valid_every=valid_every)
    state, _ = unroll(theta.spec, weights, run, start(theta.spec, weights, run), steps)
    assert state.optimizer.globals.valid_loss[0, 2] == expected
    assert state.optimizer.globals.train_loss[0, 2] == steps


def test_a_validation_loss_is_the_mean_over_minibatches() -> None:
    theta, thetas = population("compact", rows=2)
    weights = unflatten(theta.spec, thetas)
    run = Run(TASK, seed=3, horizon=30, valid_batches=4)
    before = start(theta.spec, weights, run)
    observed = []
    for step in range(20):
        after, _ = unroll(theta.spec, weights, run, before, 1)
        if step % 10 == 0:
            first = step // 10 * 4
            some = itertools.islice(TASK.batches(3, "inner_valid"), first, first + 4)
            params = {name: value[1] for name, value in before.params.items()}
            observed.append(float(torch.stack([TASK.loss(params, batch) for batch in some]).mean()))
        before = after
    expected = Run(TASK, seed=3, horizon=30, valid_every=0)
    state = start(theta.spec, weights, expected)
    for step in range(20):
        if step % 10 == 0:
            loss = torch.full((2,), observed[step // 10])
            observe = torch.vmap(lambda state, loss: reference.observe_valid(theta.spec, state, loss))
            state = state._replace(optimizer=observe(state.optimizer, loss))
        state, _ = unroll(theta.spec, weights, expected, state, 1)
    ours, theirs = (torch.cat([value[1].reshape(-1) for value in s.params.values()]) for s in (before, state))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(before.optimizer.globals.valid_loss[1, 2], torch.tensor(2.0))


def test_loss_every_only_thins_out() -> None:
    theta, thetas = population("compact", rows=2)
    weights = unflatten(theta.spec, thetas)
    every, fifth = (Run(TASK, seed=2, horizon=20, loss_every=number) for number in (1, 5))
    _, dense = unroll(theta.spec, weights, every, start(theta.spec, weights, every), 20)
    _, thin = unroll(theta.spec, weights, fifth, start(theta.spec, weights, fifth), 20)
    assert torch.equal(thin.outer, dense.outer[:, 4::5])
    assert torch.equal(thin.train, dense.train)
    with pytest.raises(ValueError, match="steps: expected a multiple of loss_every=5, got 7"):
        unroll(theta.spec, weights, fifth, start(theta.spec, weights, fifth), 7)


def test_a_diverging_run_stays_so_and_harms_no_other() -> None:
    theta, thetas = population("compact", rows=3)
    unflatten(theta.spec, thetas)["mlp.b3"][1, 0] = 1e30  # the direction: squares of the parameters overflow
    run = Run(Quadratic(seed=0), seed=0, horizon=9)
    weights = unflatten(theta.spec, thetas)
    state, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 8)
    healthy = unflatten(theta.spec, thetas[[0, 0, 2]])
    _, expected = unroll(theta.spec, healthy, run, start(theta.spec, healthy, run), 8)
    assert math.isfinite(losses.train[1, 0])
    assert bool(losses.train[1, 1:].isnan().all())
    assert not bool(losses.outer[1].isfinite().any())
    assert bool(state.params["x"][1].isnan().all())
    for name in ("outer", "train"):
        assert torch.equal(getattr(losses, name)[[0, 2]], getattr(expected, name)[[0, 2]])
    back = unflatten(theta.spec, thetas[[0, 0, 0]])
    _, later = unroll(theta.spec, back, run, state, 1)
    assert later.outer.isfinite().tolist() == [[True], [False], [True]]


def test_a_packed_state_is_the_same_state() -> None:
    theta, thetas = population("compact", rows=2)
    weights = unflatten(theta.spec, thetas)
    run = Run(TASK, seed=0, horizon=8)
    state, _ = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 3)
    again = RunState.unpack(3, state.pack())
    assert again.step == 3
    assert equal(again[1:], state[1:])


@pytest.mark.parametrize("steps", [0, 7])
def test_a_window_stays_inside_the_run(steps: int) -> None:
    theta, thetas = population("compact", rows=1)
    weights = unflatten(theta.spec, thetas)
    run = Run(TASK, seed=0, horizon=8)
    state, _ = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 2)
    with pytest.raises(ValueError, match=f"steps: expected 1 to 6, at step 2 of 8, got {steps}"):
        unroll(theta.spec, weights, run, state, steps)


def test_map_tensors_keeps_the_kinds_of_containers() -> None:
    tree = {"a": [torch.ones(2), (torch.zeros(1),)], "b": Batch(torch.ones(1), torch.ones(1))}
    doubled = map_tensors(lambda x: 2 * x, tree)
    assert doubled["a"][0].tolist() == [2.0, 2.0]
    assert type(doubled["a"][1]) is tuple
    assert isinstance(doubled["b"], Batch)
    assert float(doubled["b"].targets) == 2.0
