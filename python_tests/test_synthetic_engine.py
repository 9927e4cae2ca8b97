"""Sampled tasks in both engines: the torch unroll (lopt/meta/unroll.py) and the fused one (lopt/meta/engine.py)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt import Theta
from lopt.kernels.structs import shape_records
from lopt.meta import engine
from lopt.meta.unroll import Run, start, unroll
from lopt.rule import unflatten
from lopt.tasks import ENGINE_FAMILIES, NETWORK_FAMILIES, Task, sample_task
from lopt.tasks.families import NetworkFamily, with_batch_size
from lopt.tasks.network import Activate, Pool, perceptron
from lopt.tasks.synthetic import Family, Perceptron, Quadratic
from lopt.tasks.task import SplitName, map_tensors

STEPS = 50
SEED = 3


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def population(preset: str) -> tuple[Theta, Tensor]:
    """A theta that is not quite Adam, and an antithetic pair around it."""
    theta = Theta.init_adam(preset)
    noise = 0.01 * torch.randn(2, theta.num_floats, generator=torch.Generator().manual_seed(3))
    return theta, theta.flatten() + noise[0] + torch.stack([noise[1], -noise[1]])


def sampled(family: Family, count: int) -> list[Perceptron]:
    tasks = [sample_task(seed, [family]) for seed in range(count)]
    return [task for task in tasks if isinstance(task, Perceptron)]


class Double(Task):
    """The same task in float64."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def config(self) -> dict[str, Any]:
        return self.task.config

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: value.double() for name, value in self.task.init(seed).items()}

    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        return self.task.loss(params, batch)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Any]:
        for batch in self.task.batches(seed, split, start):
            yield map_tensors(lambda part: part.double() if part.is_floating_point() else part, batch)


def by_torch(
    theta: Theta, thetas: Tensor, task: Task, total_steps: int, valid_every: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters ``[2, num_params]``, outer_valid and train losses ``[2, steps]``."""
    weights = unflatten(theta.spec, thetas)
    run = Run(task, SEED, STEPS, total_steps, valid_every, valid_batches=2)
    state, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), STEPS)
    params = torch.cat([value.reshape(2, -1) for value in state.params.values()], dim=1)
    return params, losses.outer, losses.train


def by_engine(
    theta: Theta, thetas: Tensor, task: Task, total_steps: int, valid_every: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """The same."""
    problem, keys = engine.problem_of(task), engine.minibatch_keys(SEED)
    assert problem is not None
    init = engine.initial_params(task, SEED)
    states = [engine.start(theta.spec, problem, row, init) for row in thetas]
    runs = [engine.EngineRun(0, row, state, keys, total_steps) for row, state in enumerate(states)]
    valid = {"valid_every": valid_every, "valid_batches": 2}
    outer, train = engine.unroll(theta.spec, thetas, [problem], runs, STEPS, **valid)
    return torch.stack([engine.params_of(theta.spec, problem, state) for state in states]), outer, train


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference in each row, relative to the largest number of ``b`` where that is above 1."""
    assert torch.isfinite(b).all()
    return (a - b).abs().amax(dim=1) / b.abs().max().clamp(min=1.0)


def assert_same(theta: Theta, thetas: Tensor, task: Task, total_steps: int) -> None:
    """Both engines within 1e-5, or the fused one no further from float64 than 1e-5 or three times float32 PyTorch.

    Why that is needed is said in test_engine.py.
    """
    ours, single = by_engine(theta, thetas, task, total_steps), by_torch(theta, thetas, task, total_steps)
    if all(apart(a, b).max() <= 1e-5 for a, b in zip(ours, single, strict=True)):
        return
    double = by_torch(theta.to(dtype=torch.float64), thetas.double(), Double(task), total_steps)
    for one, two, exact in zip(ours, single, double, strict=True):
        assert exact.dtype == torch.float64
        assert (one - exact).abs().max() <= max(1e-5, 3 * (two - exact).abs().max().item())


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_compact_runs_are_the_same_in_both_engines(family: Family) -> None:
    """Parameters and losses after 50 steps, on tasks with smooth activations or none."""
    theta, thetas = population("compact")
    tasks = [task for task in sampled(family, 8) if task.activation != "relu" or not task.hidden]
    assert len(tasks) >= 3
    for index, task in enumerate(tasks[:3]):
        assert_same(theta, thetas, task, STEPS * (index % 2))


def test_runs_without_validation_losses_see_none() -> None:
    """Not even one before the first step."""
    theta, thetas = population("compact")
    task = Perceptron(seed=0, data="teacher", regression=True, inputs=6, hidden=(9,), outputs=3, activation="tanh")
    ours, theirs = by_engine(theta, thetas, task, 0, 0), by_torch(theta, thetas, task, 0, 0)
    assert all(apart(a, b).max() <= 1e-5 for a, b in zip(ours, theirs, strict=True))
    seen = by_engine(theta, thetas, task, 0, STEPS)  # one, before the first step
    assert all(apart(a, b).max() > 1e-4 for a, b in zip(ours, seen, strict=True))


def test_compact_runs_with_relu_are_the_same_in_both_engines() -> None:
    """Nearly all within 1e-5 after 50 steps, and all in the first steps.

    Runs come apart where an input of a relu is zero but for rounding, as float32 PyTorch then comes apart from float64.
    """
    theta, thetas = population("compact")
    errors = []
    for family in ENGINE_FAMILIES:
        for task in sampled(family, 2):
            relu = dataclasses.replace(task, activation="relu", hidden=task.hidden or (16,))
            ours, theirs = by_engine(theta, thetas, relu, 0), by_torch(theta, thetas, relu, 0)
            errors.append(torch.stack([apart(a, b) for a, b in zip(ours, theirs, strict=True)]).amax(dim=0))
            assert apart(ours[2][:, :3], theirs[2][:, :3]).max() <= 1e-5
    assert (torch.cat(errors) <= 1e-5).double().mean() > 0.75


@pytest.mark.parametrize("family", NETWORK_FAMILIES)
def test_networks_are_the_same_in_both_engines(family: NetworkFamily) -> None:
    """As the perceptrons: tasks of the family with few rows, without relu and largest values."""
    theta, thetas = population("compact")
    tasks = [with_batch_size(sample_task(seed, [family]), 8) for seed in range(40)]
    kinks = (Activate("relu"), Pool("max"))
    smooth = [task for task in tasks if task.network and not set(kinks) & set(task.network.layers)]
    largest = 9000 if family == "text_transformer" else 5000
    small = [task for task in smooth if task.num_params < largest]
    assert len(small) >= 4
    for index, task in enumerate(small[:4]):
        assert_same(theta, thetas, task, STEPS * (index % 2))


@pytest.mark.parametrize("family", ["mixture", "patches"])
def test_spectral_runs_are_the_same_in_both_engines(family: Family) -> None:
    """With hidden matrices, which are treated as wholes, of different shapes and of one."""
    theta, thetas = population("spectral")
    (task,) = sampled(family, 1)
    for hidden in ((16,), (9, 24), (12, 12, 12)):
        assert_same(theta, thetas, dataclasses.replace(task, activation="tanh", hidden=hidden), STEPS)


@pytest.mark.parametrize("seed", range(20))
def test_facts_about_tensors_are_those_of_the_task(seed: int) -> None:
    """Natural sizes, places and roles, whichever engine runs it."""
    for family in ENGINE_FAMILIES:
        task = sample_task(seed, [family])
        problem = engine.problem_of(task)
        if problem is not None:
            assert problem.shapes.tobytes() == shape_records(list(task.shapes.values()), task.kinds).tobytes()


@pytest.mark.parametrize("family", ["mixture", "patches"])
def test_paper_runs_are_the_same_in_both_engines(family: Family) -> None:
    theta, thetas = population("paper")
    (task,) = sampled(family, 1)
    assert_same(theta, thetas, task, 0)


def test_what_the_engine_cannot_run_is_none() -> None:
    assert engine.problem_of(Quadratic(seed=0)) is None
    assert engine.problem_of(Perceptron(seed=0, data="mixture", hidden=(8,) * engine.MAX_LAYERS)) is None
    problem = engine.problem_of(Perceptron(seed=0, data="mixture", hidden=(8,) * 4, batch_size=9))
    assert problem is not None
    assert (problem.network, problem.batch) == (perceptron((8, 8, 8, 8, 8, 4), "relu"), 9)


def test_initial_parameters_are_in_the_order_of_the_engine() -> None:
    task = Perceptron(seed=0, data="teacher", inputs=3, hidden=(2,), outputs=2, init_gain=None)
    params = task.init(1)
    expected = [value for name in ("w0", "b0", "w1", "b1") for value in params[name].flatten().tolist()]
    assert engine.initial_params(task, 1).tolist() == expected
