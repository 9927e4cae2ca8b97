"""The unroll engine in CUDA blocks against that of the CPU, which test_engine.py compares with PyTorch."""

import dataclasses

import numpy as np
import pytest
import torch
from engine_cases import KEYS, NETWORKS, engine_unroll, initial_params, make_data, make_problem, separate
from kernel_cases import Backend
from torch import Tensor

from lopt import Theta, kernels
from lopt.kernels.structs import spec_record
from lopt.meta import engine, inner, pairs
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.tasks.network import Dense, Network, Pool, perceptron

STEPS = 20
BLOCKS = pytest.mark.parametrize(
    "backend", ["sim", "sim-reverse", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
ONE = pytest.mark.parametrize("backend", ["sim", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def noisy(theta: Theta) -> Theta:
    return theta.unflatten(theta.flatten() + 0.01 * torch.randn(theta.num_floats, generator=torch.manual_seed(3)))


def check_same(
    backend: Backend, theta: Theta, problem: engine.Problem, steps: int = STEPS, within: float = 1e-5, **more: object
) -> None:
    """Parameters and losses after a few steps, before what training amplifies of rounding is much."""
    init = initial_params(problem)
    expected = engine_unroll(theta, problem, init, [steps], **more)
    found = engine_unroll(theta, problem, init, [steps], backends=[backend.name], **more)
    assert (expected[0] - init).abs().max() > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(theirs).all()
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within)


@BLOCKS
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_are_those_of_the_cpu(name: str, backend: Backend) -> None:
    """Of every tensor to 1e-5 of its largest entry."""
    problem = engine.Problem(NETWORKS[name], 8, make_data(NETWORKS[name]))
    init = initial_params(problem)
    for split, step in ((0, 0), (2, 5)):
        place = engine.SPLITS[split], KEYS[split], step
        expected, grads = engine.loss_and_grad(problem, init, *place)
        loss, grad = engine.loss_and_grad(problem, init, *place, backend.name)
        assert loss == pytest.approx(expected, rel=1e-6)
        for ours, theirs in zip(separate(problem, grad), separate(problem, grads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 * float(theirs.abs().max()))


@BLOCKS
@pytest.mark.parametrize(
    ("preset", "activation", "loss", "hidden", "total_steps"),
    [
        ("compact", "relu", "softmax", (16,), 0),
        ("compact", "gelu", "squared_error", (9, 17, 5, 8), STEPS),
        ("spectral", "tanh", "softmax", (40, 24), STEPS),
        ("paper", "tanh", "squared_error", (33, 3), 0),
    ],
)
def test_perceptrons_equal_those_of_the_cpu(preset, activation, loss, hidden, total_steps, backend):
    check_same(backend, noisy(Theta.init_adam(preset)), make_problem(activation, loss, hidden), total_steps=total_steps)


@ONE
@pytest.mark.parametrize("name", list(NETWORKS)[1:])
def test_networks_equal_those_of_the_cpu(name: str, backend: Backend) -> None:
    """With the shipped theta, which treats matrices as wholes; before rounding decides which of two is the largest."""
    problem = engine.Problem(NETWORKS[name], 8, make_data(NETWORKS[name]))
    steps = STEPS // 2 if Pool("max") in NETWORKS[name].layers else STEPS
    check_same(backend, noisy(Theta.load("default")), problem, steps, total_steps=STEPS)


@BLOCKS
@pytest.mark.parametrize("averaged", [False, True])
def test_lagged_statistics_averages_and_sparse_losses(averaged: bool, backend: Backend) -> None:
    problem = engine.Problem(NETWORKS["rms norm"], 8, make_data(NETWORKS["rms norm"]))
    theta = noisy(Theta.load("default")).with_spec(stats="lagged")
    check_same(backend, theta, problem, averaged=averaged, loss_every=5)


@ONE
@pytest.mark.parametrize("valid_every", [0, 3])
def test_a_validation_loss_is_shown_when_it_is_due_or_never(valid_every: int, backend: Backend) -> None:
    theta, problem = noisy(Theta.load("default")), make_problem("tanh", "softmax", (8,))
    check_same(backend, theta, problem, valid_every=valid_every)
    one, other = (
        engine_unroll(theta, problem, initial_params(problem), [STEPS], backends=[backend.name], valid_every=every)
        for every in (0, 3)
    )
    assert not torch.equal(one[2], other[2])


@ONE
@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_windows_of_any_length_give_the_same_bits(stats: str, backend: Backend) -> None:
    theta = noisy(Theta.load("default")).with_spec(stats=stats)
    problem = engine.Problem(NETWORKS["one head"], 8, make_data(NETWORKS["one head"]))
    init = initial_params(problem)
    whole, parts = (
        engine_unroll(theta, problem, init, windows, backends=[backend.name], averaged=True)
        for windows in ([20], [1, 9, 3, 7])
    )
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


@ONE
def test_runs_go_on_with_another_back_end(backend: Backend) -> None:
    theta, problem = noisy(Theta.load("default")), make_problem("tanh", "softmax", (8, 6))
    init = initial_params(problem)
    expected = engine_unroll(theta, problem, init, [20], averaged=True)
    found = engine_unroll(theta, problem, init, [5, 5, 5, 5], averaged=True, backends=["cpu", backend.name])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def wide_problem() -> engine.Problem:
    """With more parameters, as momenta and so on, than the shared memory of a multiprocessor holds."""
    network = perceptron((12, 120, 70, 5), "relu")
    return engine.Problem(network, 16, make_data(network))


@ONE
def test_what_does_not_fit_into_shared_memory_is_elsewhere(backend: Backend) -> None:
    theta, problem = noisy(Theta.load("default")), wide_problem()
    spec, record, small = spec_record(theta.spec), problem.record(), make_problem().record()
    scratch = [
        kernels.module_of(backend.name).unroll_scratch(backend.name, spec.ctypes.data, one.ctypes.data, 1, 0)
        for one in (record, small)
    ]
    assert scratch[0] > 0 == scratch[1]
    check_same(backend, theta, problem, steps=10)


@BLOCKS
def test_order_and_company_do_not_matter(backend: Backend) -> None:
    """Runs of several problems under several thetas at once, one of them with memory elsewhere."""
    spec = Theta.load("default").spec
    theta = torch.stack([noisy(Theta.load("default")).flatten() * scale for scale in (1.0, 0.9)])
    problems = [make_problem("relu", "softmax", (16,)), make_problem("tanh", "squared_error", (8, 24)), wide_problem()]
    device = engine.device_of(backend.name)

    def run(order: list[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        states = [engine.start(spec, problems[p], theta[t], initial_params(problems[p])).to(device) for p, t in order]
        runs = [engine.EngineRun(p, t, state, KEYS) for (p, t), state in zip(order, states, strict=True)]
        outer, _ = engine.unroll(spec, theta, problems, runs, 4, backend=backend.name)
        return {key: outer[i] for i, key in enumerate(order)}

    order = [(p, t) for p in range(3) for t in range(2)]
    expected = run(order)
    assert len({tuple(losses.tolist()) for losses in expected.values()}) == len(order)
    for other in (run(order[::-1]), run(order[:2])):
        for key, losses in other.items():
            assert torch.equal(losses, expected[key])


@ONE
def test_a_diverged_run_ends_and_stays_ended(backend: Backend) -> None:
    theta = Theta.init_adam("compact").with_spec(step_multiplier=1e30)
    problem = make_problem("relu", "squared_error", (16,))
    params, outer, train = engine_unroll(theta, problem, initial_params(problem), [20, 5], backends=[backend.name])
    assert torch.isfinite(train[0])
    assert torch.isnan(outer[-6:]).all()
    assert torch.isnan(train[-6:]).all()
    assert torch.isnan(params[0])


@ONE
def test_units_of_meta_training_by_this_back_end(backend: Backend) -> None:
    """Deltas of two pairs that share a task, over two windows whose states travel on the CPU."""
    phase = Phase(1.0, (10, 10), "all", "pes", 5)
    theta = Theta.init_adam("compact")
    config = MetaTrainConfig(10_000, (phase,), pairs=4, pairs_per_task=2, seed=11, tasks=("mixture",))

    def deltas(config: MetaTrainConfig) -> list[float]:
        found: list[float] = []
        carry = None
        for iteration in (0, 1):
            item = pairs.Shared(config, theta.spec, theta.flatten(), torch.ones(theta.num_floats), 0, -1, iteration)
            result = pairs.unroll_group(item, (1, carry))
            carry = result.carry
            found += result.deltas
        return found

    ours = dataclasses.replace(config, backend=backend.name)
    assert MetaTrainConfig.from_json(ours.to_json()) == ours
    expected = deltas(config)
    assert min(map(abs, expected)) > 1e-5
    assert deltas(ours) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, problem = Theta.init_adam("compact"), make_problem()
    state = engine.start(theta.spec, problem, theta.flatten(), initial_params(problem))
    run = engine.EngineRun(0, 0, state, KEYS)

    def unroll(backend: str) -> None:
        engine.unroll(theta.spec, theta.flatten()[None], [problem], [run], 4, backend=backend)

    with pytest.raises(ValueError, match="backend: expected one of"):
        unroll("gpu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        dataclasses.replace(MetaTrainConfig(10, (Phase(1.0, (5, 5)),)), backend="gpu")
    if not kernels.has_cuda():
        with pytest.raises(RuntimeError, match="backend 'cuda': lopt was built without CUDA"):
            unroll("cuda")
    monkeypatch.setattr(engine, "module_of", lambda backend: kernels.module_of("sim"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'cuda': torch finds no GPU; use backend='cpu'"):
        unroll("cuda")
    monkeypatch.setattr(engine, "device_of", lambda backend: torch.device("meta"))
    with pytest.raises(ValueError, match=r"runs\[0\]: expected a state on meta, where 'cuda' runs, got cpu"):
        unroll("cuda")
    monkeypatch.undo()
    network = Network((Dense(2**14, "w"), Dense(2**12, "v")), inputs=4)
    rows = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    record = engine.Problem(network, 1, (rows,) * 3).record()
    with pytest.raises(RuntimeError, match=r"layer 1 has 603979776 numbers, expected at most 2\^28"):
        kernels.module_of("sim").unroll_scratch("sim", 0, np.stack([record]).ctypes.data, 1, 0)


def test_inner_runs_take_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation of theta runs where the configuration says."""
    seen: list[str] = []
    original = inner.engine.unroll

    def unroll(*args: object, backend: str, **more: object) -> object:
        seen.append(backend)
        return original(*args, backend=backend, **more)

    monkeypatch.setattr(inner.engine, "unroll", unroll)
    theta = Theta.init_adam("compact")
    config = MetaTrainConfig(10, (Phase(1.0, (4, 4)),), tasks=("teacher",), validation_horizons=(4,), backend="sim")
    item = pairs.Shared(config, theta.spec, theta.flatten(), torch.ones(theta.num_floats), 0, -1, 0)
    scores, _ = pairs.validate_task(item, 0)
    assert len(scores) == 2
    assert seen == ["sim", "sim"]
