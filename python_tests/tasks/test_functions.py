"""Quadratic forms and the problems of few parameters against closed forms, optima from the literature, and numpy."""

import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt.tasks import sample_task
from lopt.tasks.losg import SAMPLERS, LosgTask
from lopt.tasks.losg_problems import (
    FUNCTIONS,
    Bowl,
    DependencyChain,
    FullyConnected,
    MinMaxWell,
    Norm,
    Optimization,
    OutwardSnake,
    Problem,
    ProjectionQuadratic,
    Quadratic,
    SparseSoftmaxRegression,
    SumOfQuadratics,
)
from lopt.tasks.quadratics import Distribution, QuadraticForm
from lopt.tasks.task import NoisyBatch

EYE = Distribution("normal", 0.0, 1.0)


def value(task: LosgTask, x: Any) -> float:
    params = {"x": torch.as_tensor(x, dtype=torch.float32)}
    return float(task.loss(params, next(task.batches(0, "train"))))


@pytest.mark.parametrize("log", [False, True])
def test_quadratic_form_and_its_gradient(log: bool) -> None:
    task = QuadraticForm(seed=3, dim=6, matrix=EYE, start=EYE, log=log, scale=0.3)
    x, a = torch.linspace(-1, 1, 6), task.a
    batch = next(task.batches(0, "train"))
    square = float((a @ x).square().sum())
    expected = 0.3 * (math.log(square + 1e-8) if log else square)
    assert float(task.loss({"x": x}, batch)) == pytest.approx(expected, rel=1e-5)
    grad = torch.func.grad(task.loss)({"x": x}, batch)["x"]
    torch.testing.assert_close(grad, 0.6 * a.T @ (a @ x) / (square if log else 1.0), rtol=1e-4, atol=1e-5)
    assert task.loss_floor == (0.3 * math.log(1e-8) if log else 0.0)
    assert float(task.loss({"x": torch.zeros(6)}, batch)) == pytest.approx(task.loss_floor)


@pytest.mark.parametrize("kind", ["linspace_eigen", "logspace_eigen"])
def test_matrices_have_the_spectrum_they_say(kind: Any) -> None:
    task = QuadraticForm(seed=3, dim=40, matrix=Distribution(kind, 0.5, 20.0), start=EYE)
    eigenvalues = torch.linalg.eigvalsh(task.a.double()).numpy()
    expected = np.linspace(0.5, 20, 40) if kind == "linspace_eigen" else np.geomspace(0.5, 20, 40)
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-5)


def test_normal_and_uniform_matrices_have_the_moments_they_say() -> None:
    for distribution, mean, deviation in (
        (Distribution("normal", 0.7, 1.5), 0.7, 1.5),
        (Distribution("uniform", -1.0, 3.0), 1.0, 4 / math.sqrt(12)),
    ):
        a = QuadraticForm(seed=1, dim=200, matrix=distribution, start=EYE).a
        assert float(a.mean()) == pytest.approx(mean, abs=5 * deviation / 200)
        assert float(a.std()) == pytest.approx(deviation, rel=0.03)


def test_noise_is_another_matrix_in_every_step() -> None:
    noise = Distribution("normal", 0.0, 0.05)
    task = QuadraticForm(seed=3, dim=50, matrix=EYE, start=EYE, noise=noise)
    first, second = islice(task.batches(0, "train"), 2)
    assert isinstance(first, NoisyBatch)
    assert isinstance(second, NoisyBatch)
    assert float(first.noise.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float((first.noise * second.noise).mean())) < 5 * 0.05**2 / 50
    x = torch.ones(50)
    expected = float(((task.a + first.noise) @ x).square().sum())
    assert float(task.loss({"x": x}, first)) == pytest.approx(expected, rel=1e-5)


OPTIMA = {  # from the virtual library of simulation experiments
    "ackley": ((0.0, 0.0), 0.0),
    "beale": ((3.0, 0.5), 0.0),
    "branin": ((math.pi, 2.275), 0.397887),
    "logsumexp": ((-math.log(2) / 2, 0.0), math.log(1 + 2 * math.sqrt(2) * math.exp(-0.1))),
    "matyas": ((0.0, 0.0), 0.0),
    "michalewicz": ((2.185312, math.pi / 2), 0.193377),  # of LOSG's power 10, where the library has 20
    "rosenbrock": ((1.0, 1.0), 0.0),
    "styblinski_tang": ((-2.903534, -2.903534), 80 - 78.33233),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_test_functions_have_their_optimum_where_it_is_known(name: str) -> None:
    task = LosgTask(problem=Optimization(name), seed=0)
    place, optimum = OPTIMA[name]
    assert value(task, place) == pytest.approx(optimum, abs=1e-4)
    assert task.loss_floor == pytest.approx(optimum, abs=1e-4)
    function = FUNCTIONS[name]
    low, high = function.low or (-3.0, -3.0), function.high or (3.0, 3.0)
    axes = [torch.linspace(low[i], high[i], 801, dtype=torch.float64) for i in range(2)]
    grid = function.value(*torch.meshgrid(*axes, indexing="ij"))
    assert float(grid.min()) >= optimum - 1e-5
    params, gradient = {"x": torch.tensor(place)}, torch.func.grad(task.loss)
    if name != "ackley":  # which has an edge at its optimum
        assert float(gradient(params, next(task.batches(0, "train")))["x"].abs().max()) < 5e-3
    start = task.init(0)["x"]
    assert function.low is None or all(low[i] <= float(start[i]) <= high[i] for i in range(2))


def test_test_functions_at_other_points() -> None:
    assert value(LosgTask(problem=Optimization("rosenbrock"), seed=0), (2.0, 3.0)) == pytest.approx(101.0)
    assert value(LosgTask(problem=Optimization("beale"), seed=0), (1.0, 1.0)) == pytest.approx(14.203125)
    assert value(LosgTask(problem=Optimization("matyas"), seed=0), (1.0, 2.0)) == pytest.approx(0.34)
    assert value(LosgTask(problem=Optimization("styblinski_tang"), seed=0), (1.0, 0.0)) == pytest.approx(75.0)
    expected = 20 + math.e - 20 * math.exp(-0.2) - math.e
    assert value(LosgTask(problem=Optimization("ackley"), seed=0), (1.0, 1.0)) == pytest.approx(expected, rel=1e-5)


def test_bowl_and_its_condition() -> None:
    task = LosgTask(problem=Bowl(25.0, math.pi / 3), seed=0)
    batch = next(task.batches(0, "train"))
    hessian = torch.func.jacrev(torch.func.grad(lambda x: task.loss({"x": x}, batch)))(torch.ones(2))
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), torch.tensor([1.0, 25.0]), rtol=1e-4, atol=1e-4)
    turn = torch.tensor([[0.5, -math.sqrt(3) / 2], [math.sqrt(3) / 2, 0.5]])
    torch.testing.assert_close(hessian, turn.T @ torch.diag(torch.tensor([25.0, 1.0])) @ turn, rtol=1e-4, atol=1e-3)


def test_quadratic_and_norm() -> None:
    x = np.linspace(-1, 1, 12)
    task = LosgTask(problem=Quadratic(12), seed=5)
    w, y = (task.constants[name].double().numpy() for name in ("W", "y"))
    assert value(task, x) == pytest.approx(np.square(w @ x - y).sum() / 2, rel=1e-5)
    for power in (0.5, 2.0, 3.3):
        task = LosgTask(problem=Norm(12, power), seed=5)
        expected = ((np.abs(w @ x - y) + 1e-6) ** power).sum() ** (1 / power)
        assert value(task, x) == pytest.approx(expected, rel=1e-4)


def test_chain_and_well() -> None:
    x = [1.0, -2.0, 0.5]
    expected = 2 * 1 + 4 / (1 + 1e-6) + 0.25 / (4 + 1e-6)
    assert value(LosgTask(problem=DependencyChain(2), seed=0), x) == pytest.approx(expected, rel=1e-5)
    well = LosgTask(problem=MinMaxWell(3), seed=0)
    assert value(well, x) == pytest.approx(4 + 4 - 2)
    assert value(well, [1.0, -1.0, 1.0]) == pytest.approx(0.0, abs=1e-6)
    grad = torch.func.grad(well.loss)({"x": torch.tensor(x)}, next(well.batches(0, "train")))["x"]
    torch.testing.assert_close(grad, torch.tensor([0.0, -4.0, -2 / 0.125]))


def test_problems_with_rows() -> None:
    x = np.linspace(0.5, 1.5, 5)
    for problem in (OutwardSnake(5), SumOfQuadratics(5), ProjectionQuadratic(5)):
        task = LosgTask(problem=problem, seed=2, batch_size=7, samples=30)
        rows = next(task.batches(0, "train")).inputs.double().numpy()
        assert rows.shape == (7, 5)
        if isinstance(problem, OutwardSnake):
            wave = x[1:] - math.pi * np.cos(x[:-1])
            expected = (rows[:, 0] / (np.linalg.norm(x) + 1e-6)).sum() + np.square(wave * rows[:, 1:]).sum()
        elif isinstance(problem, SumOfQuadratics):
            expected = np.square(x - rows).sum() - np.square(rows).sum()
            everything = task.rows("train").inputs
            assert float(everything.sum(dim=0).abs().max()) < 1e-4  # symmetric: the sum of all rows is zero
        else:
            expected = np.square(x * rows).sum()
        assert value(task, x) == pytest.approx(expected, rel=1e-4)


def test_classifiers_by_hand() -> None:
    task = LosgTask(problem=SparseSoftmaxRegression(4), seed=1, batch_size=9, samples=30)
    params, batch = task.init(0), next(task.batches(0, "train"))
    p = {name: tensor.double().numpy() for name, tensor in params.items()}
    ids, labels = batch.inputs.long().numpy(), batch.targets.double().numpy()
    logit = (p["embedding"][ids].sum(axis=1) @ p["w0"] + p["b0"])[:, 0]
    losses = np.log1p(np.exp(-np.where(labels > 0.5, logit, -logit)))
    expected = losses.mean() + 1e-3 * np.mean([np.square(tensor).sum() for tensor in p.values()])
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)
    parity = LosgTask(problem=SparseSoftmaxRegression(4), seed=1, samples=4000).rows("train")
    wrong = (parity.inputs.sum(dim=1) % 2 != parity.targets).double().mean()
    assert float(wrong) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))

    task = LosgTask(problem=FullyConnected(3, (6, 5), "tanh"), seed=1, batch_size=9, samples=30)
    params, batch = task.init(0), next(task.batches(0, "train"))
    p = {name: tensor.double().numpy() for name, tensor in params.items()}
    hidden = np.tanh(np.tanh(batch.inputs.double().numpy() @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"])
    logit, labels = (hidden @ p["w2"] + p["b2"])[:, 0], batch.targets.numpy()
    losses = np.log1p(np.exp(-np.where(labels > 0.5, logit, -logit)))
    expected = losses.mean() + 1e-3 * np.mean([np.square(tensor).sum() for tensor in p.values()])
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


def test_gradient_noise_and_zeros_do_not_change_the_loss() -> None:
    """The gradient is the plain one where it is kept, plus noise of the given deviation; elsewhere it is zero."""
    plain = LosgTask(problem=Quadratic(400), seed=3)
    params = plain.init(0)
    batch = next(plain.batches(0, "train"))
    exact, loss = torch.func.grad_and_value(plain.loss)(params, batch)
    for zero_probability, deviation in ((0.0, 2.0), (0.9, 0.0), (0.95, 3.0)):
        task = LosgTask(problem=Quadratic(400), seed=3, gradient_noise=deviation, zero_probability=zero_probability)
        surplus, kept = [], 0
        for noisy in islice(task.batches(0, "train"), 50):
            grad, value = torch.func.grad_and_value(task.loss)(params, noisy)
            assert float(value) == pytest.approx(float(loss), rel=1e-5)
            nonzero = grad["x"] != 0
            kept += int(nonzero.sum())
            surplus.append((grad["x"] - exact["x"])[nonzero])
        share, expected = kept / 20000, 1 - zero_probability
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * zero_probability / 20000) + 1e-3)
        scale = float(exact["x"].abs().max())
        assert float(torch.cat(surplus).std()) == pytest.approx(deviation, rel=0.1, abs=1e-5 * scale)


def test_rescaled_and_logged_problems() -> None:
    plain = LosgTask(problem=Quadratic(10), seed=3)
    scaled = LosgTask(problem=Quadratic(10), seed=3, scale=50.0)
    logged = LosgTask(problem=Quadratic(10), seed=3, log=True)
    batch = next(plain.batches(0, "train"))
    x: dict[str, Tensor] = plain.init(0)
    torch.testing.assert_close(scaled.init(0)["x"], 50 * x["x"])
    loss = float(plain.loss(x, batch))
    assert float(scaled.loss(scaled.init(0), batch)) == pytest.approx(loss, rel=1e-5)
    assert float(logged.loss(x, batch)) == pytest.approx(math.log(loss + 1e-6) - math.log(1e-6), rel=1e-5)
    assert logged.loss_floor == pytest.approx(0.0)


def test_all_fourteen_kinds_are_sampled() -> None:
    tasks = [sample_task(seed, ["losg_tasks"]) for seed in range(600)]
    kinds = {task.wrapper if task.wrapper != "none" else type(task.problem).__name__ for task in tasks}  # type: ignore[attr-defined]
    problems = {type(SAMPLERS[name](np.random.default_rng(0))[0]).__name__ for name in SAMPLERS}
    assert kinds == problems | {"sparse", "rescale", "log"}
    assert len(kinds) == 14
    assert issubclass(Norm, Problem)
