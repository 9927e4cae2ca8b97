"""The definition of correct against the recorded traces of the author's port, and its own invariances.

The port computes in float32, so no comparison can be closer than float32 rounding. Bounds are multiples of the
rounding of the compared array, ``2^-23 * its largest element``, with room for two to ten times the error measured.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kernel_cases import Backend
from torch import Tensor

from lopt import LearnedOptimizer, Theta
from lopt.rule import PRESETS, reference, unflatten
from lopt.rule.features import FEATURE_SETS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind
from lopt.rule.reference import State

Arrays = dict[str, np.ndarray]

TENSORS = ("b", "conv", "s", "sq", "w")
STEP_MULTIPLIER = {"default": 1e-3, "bigstep": 0.1, "valid": 0.1}
STEPS = 10
ULP = 2.0**-23
PARAM, LOG_PARAM = (FEATURE_SETS["paper"].column_index(name) for name in ("param", "log_param"))


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)


def port_theta(trace: Arrays, name: str) -> Theta:
    weights = {key: value for key, value in trace.items() if key.startswith("theta|")}
    return Theta.import_jax(weights).with_spec(step_multiplier=STEP_MULTIPLIER[name])


def largest_update(trace: Arrays) -> float:
    """Of any parameter in any step."""
    steps = [np.concatenate([trace[f"params0|{t}"][None], trace[f"params|{t}"]]) for t in TENSORS]
    return max(float(np.abs(np.diff(values, axis=0)).max()) for values in steps)


def bound_of_params(name: str, trace: Arrays, absolute: float) -> float:
    """``absolute`` on the default trace; on the others, where one update is large, 1e-4 of the largest."""
    return absolute if name == "default" else 1e-4 * largest_update(trace)


class Step(NamedTuple):
    """What one step of a replay left behind."""

    number: int
    params: list[Tensor]
    state: State
    intermediates: dict[str, Any] | None  # None after a validation update


def replay_steps(trace: Arrays, name: str, dtype: torch.dtype) -> Iterator[Step]:
    """Free-running replay of one trace with lopt/rule/reference.py."""
    theta = port_theta(trace, name).to(dtype=dtype)
    params = [as_tensor(trace[f"params0|{t}"], dtype) for t in TENSORS]
    state = reference.init_state(theta.spec, theta.tensors, params)
    for number in range(STEPS):
        loss, intermediates = as_tensor(trace["losses"][number], dtype), None
        if trace["is_valid"][number]:
            state = reference.observe_valid(theta.spec, state, loss)
        else:
            grads = [as_tensor(trace[f"grads|{t}"][number], dtype) for t in TENSORS]
            params, state, intermediates = reference.update(theta.spec, theta.tensors, state, params, grads, loss)
        yield Step(number, params, state, intermediates)


@pytest.fixture(params=STEP_MULTIPLIER)
def name(request: pytest.FixtureRequest) -> str:
    """Of a trace."""
    return request.param


@pytest.fixture
def trace(name: str, golden: Callable[[str], Arrays]) -> Arrays:
    return golden(f"rnn_mlp_lopt_{name}")


REPLAYS: dict[tuple[str, torch.dtype], list[Step]] = {}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def replay(request: pytest.FixtureRequest, trace: Arrays, name: str) -> list[Step]:
    """All steps of a trace, computed once."""
    key = name, request.param
    if key not in REPLAYS:
        REPLAYS[key] = list(replay_steps(trace, *key))
    return REPLAYS[key]


def check(label: str, found: Tensor, expected: np.ndarray, ulps: float) -> None:
    """Absolute error within ``ulps`` roundings of the largest element."""
    error = float((found.double() - as_tensor(expected, torch.float64)).abs().max())
    rounding = ULP * float(np.abs(expected).max())
    assert error <= ulps * rounding, f"{label}: {error / max(rounding, 1e-300):.1f} roundings"


# ---- The traces -----------------------------------------------------------------------------------------------------


def test_params(replay: list[Step], name: str, trace: Arrays) -> None:
    """The bar: 1e-6, or 1e-4 of the largest update. Measured: 3e-7, and 1.2e-5 of the largest update."""
    bound = bound_of_params(name, trace, 1e-6)
    for step in replay:
        for t, param in zip(TENSORS, step.params, strict=True):
            expected = as_tensor(trace[f"params|{t}"][step.number], torch.float64)
            assert param.shape == expected.shape
            assert float((param.double() - expected).abs().max()) <= bound, (step.number, t)


def test_lstm_inputs(replay: list[Step], trace: Arrays) -> None:
    """[5, 52] in every training update, elements up to 5. Measured: 17 roundings (logarithms of small variances)."""
    updates = [step for step in replay if step.intermediates is not None]
    for step, expected in zip(updates, trace["lstm_in"], strict=True):
        check(f"step {step.number}", step.intermediates["lstm_input"], expected, 40)


def test_mlp_inputs(replay: list[Step], trace: Arrays) -> None:
    """[numel, 54] in every training update: each column against its own rounding.

    A scalar parameter that passes zero magnifies its own error, which test_params bounds, by the normaliser and by the
    logarithm: those two columns have bounds of their own.
    """
    updates = [step for step in replay if step.intermediates is not None]
    assert len(updates) == len(trace["lstm_in"])
    for i, step in enumerate(updates):
        for t, found in zip(TENSORS, step.intermediates["mlp_input"], strict=True):
            columns, constant = trace[f"mlp_in_columns|{t}"][i], trace[f"mlp_in_constant|{t}"][i]
            assert found.shape == (columns.shape[0], 54)
            for c in range(23):
                label = f"step {step.number}, {t}, column {c}"
                check(label, found[:, c], columns[:, c], {PARAM: 200, LOG_PARAM: 1500}.get(c, 30))
            check(f"step {step.number}, {t}, constant", found[0, 23:], constant, 5)
            assert torch.equal(found[:, 23:], found[:1, 23:].expand(len(columns), -1))


def test_state(replay: list[Step], trace: Arrays) -> None:
    """In float64 the clip limit, and with it a clipped gradient, has another constant: .99 is not the float32 .99."""
    rounding = 4 if replay[0].params[0].dtype == torch.float32 else 32
    for number, _, state, _ in replay:
        assert int(state.globals.step) == trace["step"][number] == number + 1
        check("clip", state.globals.clip, trace["clip"][number], 1)
        check("train loss", state.globals.train_loss[:3], trace["train_loss"][number], 4)
        check("valid loss", state.globals.valid_loss[:3], trace["valid_loss"][number], 2)
        check("from_lstm", state.globals.from_lstm, trace["from_lstm"][number], 10)
        check("from_mlp", state.rows.feedback, trace["from_mlp"][number], 20)
        if f"h|step{number}" not in trace:
            continue
        check("h", state.rows.h, trace[f"h|step{number}"], 15)
        check("c", state.rows.c, trace[f"c|step{number}"], 10)
        for t, mom, rms in zip(TENSORS, state.mom, state.rms, strict=True):
            check(f"mom {t}", mom, trace[f"mom|step{number}|{t}"], rounding)
            check(f"rms {t}", rms, trace[f"rms|step{number}|{t}"], rounding)


def test_validation_updates_are_in_a_trace(golden: Callable[[str], Arrays]) -> None:
    """What the other tests rely on: validation losses in steps 2, 3 and 6 of one trace, which move no parameter."""
    trace = golden("rnn_mlp_lopt_valid")
    assert np.flatnonzero(trace["is_valid"]).tolist() == [2, 3, 6]
    for t in TENSORS:
        np.testing.assert_array_equal(trace[f"params|{t}"][2], trace[f"params|{t}"][1])
    assert not any(golden(f"rnn_mlp_lopt_{name}")["is_valid"].any() for name in ("default", "bigstep"))
    assert largest_update(golden("rnn_mlp_lopt_default")) < 2e-3  # near the resolution of a parameter
    assert largest_update(golden("rnn_mlp_lopt_bigstep")) > 0.1


def run_optimizer(trace: Arrays, name: str, impl: str, device: torch.device) -> Iterator[tuple[int, list[Tensor]]]:
    """The same trace through LearnedOptimizer."""
    params = [torch.nn.Parameter(as_tensor(trace[f"params0|{t}"], torch.float32).to(device)) for t in TENSORS]
    opt = LearnedOptimizer(params, port_theta(trace, name), impl=impl)
    for step in range(STEPS):
        loss = float(trace["losses"][step])
        if trace["is_valid"][step]:
            opt.observe(valid_loss=loss)
        else:
            for t, param in zip(TENSORS, params, strict=True):
                param.grad = as_tensor(trace[f"grads|{t}"][step], torch.float32).to(device)
            opt.step(loss=loss)
        yield step, [param.detach().cpu() for param in params]
    assert int(opt.param_groups[0]["step"]) == STEPS


def check_optimizer(trace: Arrays, name: str, impl: str, device: torch.device, absolute: float) -> None:
    bound = bound_of_params(name, trace, absolute)
    for step, params in run_optimizer(trace, name, impl, device):
        for t, param in zip(TENSORS, params, strict=True):
            error = np.abs(param.double().numpy() - trace[f"params|{t}"][step]).max()
            assert error <= bound, (step, t, error)


def test_optimizer_by_kernels(trace: Arrays, name: str, backend: Backend) -> None:
    """The bar: 2e-6, or 1e-4 of the largest update. Measured: 1e-8, and 5e-6 of the largest update."""
    check_optimizer(trace, name, backend.name, backend.device, 2e-6)


def test_optimizer_by_the_reference(trace: Arrays, name: str) -> None:
    check_optimizer(trace, name, "reference", torch.device("cpu"), 1e-6)


# ---- Invariances ----------------------------------------------------------------------------------------------------

SHAPES = ((), (4,), (3, 5), (2, 3, 2), (2, 3, 2, 2), (1, 2, 2, 1, 3))
#: Said outright, since where it is not, it follows from the order.
KINDS = (Kind(), Kind(), Kind("hidden"), Kind("input"), Kind("hidden"), Kind("output"))
F64 = torch.float64


@pytest.fixture(params=PRESETS)
def theta(request: pytest.FixtureRequest) -> Theta:
    """Random in every tensor, in float64, with steps that matter."""
    theta = Theta.init(request.param, seed=11).with_spec(step_multiplier=0.1).to(dtype=F64)
    generator = torch.Generator().manual_seed(12)
    return theta.unflatten(theta.flatten() + 0.1 * torch.randn(theta.num_floats, generator=generator, dtype=F64))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(step: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> tuple[list[Tensor], Tensor]:
    """Gradients and loss of a step."""
    grads = [normal(*shape, seed=100 * step + i) for i, shape in enumerate(shapes)]
    return grads, torch.tensor(2.0 / (1 + step), dtype=F64)


def run(theta: Theta, order: list[int], steps: int = 4) -> tuple[list[Tensor], State]:
    """Some steps with the tensors in this order."""
    params = [normal(*SHAPES[i], seed=i) for i in order]
    state = reference.init_state(theta.spec, theta.tensors, params)
    facts = [SHAPES[i] for i in order], theta.tensors["initial_h"], [KINDS[i] for i in order]
    shapes = Shapes.of(theta.spec, *facts)
    for step in range(steps):
        grads, loss = inputs(step)
        if step == 2:
            state = reference.observe_valid(theta.spec, state, loss * 1.1)
        ordered = [grads[i] for i in order]
        params, state, _ = reference.update(
            theta.spec, theta.tensors, state, params, ordered, loss, total_steps=20, shapes=shapes
        )
    return params, state


def test_order_of_tensors_does_not_matter(theta: Theta) -> None:
    order = [3, 0, 5, 1, 4, 2]
    params, state = run(theta, list(range(len(SHAPES))))
    others, other_state = run(theta, order)
    for position, i in enumerate(order):
        torch.testing.assert_close(others[position], params[i], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(other_state.rows.h[position], state.rows.h[i], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(other_state.globals.from_lstm, state.globals.from_lstm, rtol=1e-11, atol=1e-12)


def test_order_of_parameters_does_not_matter(theta: Theta) -> None:
    """Within a tensor, every parameter is treated alike."""
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    results = []
    for index in (torch.arange(30), permutation):
        params = [normal(30, seed=1)[index]]
        state = reference.init_state(theta.spec, theta.tensors, params)
        for step in range(3):
            (grad,), loss = inputs(step, ((30,),))
            params, state, _ = reference.update(theta.spec, theta.tensors, state, params, [grad[index]], loss)
        results.append(params[0])
    torch.testing.assert_close(results[1], results[0][permutation], rtol=1e-11, atol=1e-12)


def test_vmap_over_a_population(theta: Theta) -> None:
    """A batch of thetas, states and parameters by torch.vmap is each of them alone."""
    flat = theta.flatten() + 0.05 * normal(3, theta.num_floats, seed=0)
    population = unflatten(theta.spec, flat)
    shapes = ((3, 4), (5,), ())

    data = [inputs(step, shapes) for step in range(2)]

    def two_steps(weights: dict[str, Tensor], params: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        state = reference.init_state(theta.spec, weights, params)
        for grads, loss in data:
            params, state, _ = reference.update(theta.spec, weights, state, params, grads, loss)
            state = reference.observe_valid(theta.spec, state, loss)
        return params, state.rows.h

    start = [normal(3, *shape, seed=7) for shape in shapes]
    params, h = torch.vmap(two_steps)(population, start)
    for i in range(3):
        alone = {name: value[i] for name, value in population.items()}
        expected, expected_h = two_steps(alone, [param[i] for param in start])
        torch.testing.assert_close([param[i] for param in params], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(h[i], expected_h, rtol=1e-11, atol=1e-12)


def test_update_by_hand() -> None:
    """One parameter, one step, of an MLP whose hidden layers are off: direction and magnitude are the last bias."""
    theta = Theta.init("paper", seed=0).to(dtype=F64)
    tensors = {name: torch.zeros_like(value) for name, value in theta.tensors.items()}
    tensors["mlp.b3"][:3] = torch.tensor([2.0, 5.0, 0.25], dtype=F64)  # direction, magnitude, first feedback
    param, grad = torch.tensor([0.5], dtype=F64), torch.tensor([3.0], dtype=F64)
    state = reference.init_state(theta.spec, tensors, [param])
    (new,), state, trace = reference.update(
        theta.spec, tensors, state, [param], [grad], torch.tensor(1.0), lr=0.5, weight_decay=0.01
    )
    step = 0.5 * 1e-3 * 2.0 * math.exp(1e-3 * 5.0)
    assert new.item() == pytest.approx((1 - 0.5 * 1e-3 * 0.01) * 0.5 - step, rel=1e-14)
    assert state.rows.feedback[0].tolist() == [0.25] + [0.0] * 15
    assert trace["mlp_output"][0].tolist() == [[2.0, 5.0, 0.25] + [0.0] * 15]
    decays = np.array([0.5, 0.9, 0.99, 0.999, 0.9999], dtype=np.float32).astype(np.float64)
    np.testing.assert_allclose(state.mom[0][:, 0].numpy(), (1 - decays) * 3.0, rtol=1e-14)
    np.testing.assert_allclose(state.rms[0][:, 0].numpy(), (1 - decays) * 9.0, rtol=1e-14)


def test_skip_and_step_multiplier_by_hand() -> None:
    """``compact``: the skip reads a column, and the update is in units of the tensor's scale."""
    theta = Theta.init("compact", seed=0).with_spec(step_multiplier=0.01).to(dtype=F64)
    tensors = {name: torch.zeros_like(value) for name, value in theta.tensors.items()}
    tensors["skip"][theta.spec.features.column_index("grad")] = 3.0  # the gradient over its root mean square
    tensors["step.b"].fill_(math.log(2.0))
    param = torch.tensor([[0.3, 0.4], [-0.3, 0.4]], dtype=F64)
    grad = torch.tensor([[1.0, -1.0], [1.0, 3.0]], dtype=F64)
    state = reference.init_state(theta.spec, tensors, [param])
    (new,), state, _ = reference.update(theta.spec, tensors, state, [param], [grad])
    rms_param, rms_grad = math.sqrt(0.125), math.sqrt(3.0)
    expected = param - 0.01 * 0.1 * 2.0 * rms_param * 3.0 * grad / rms_grad  # the first of ten steps that warm up
    torch.testing.assert_close(new, expected, rtol=1e-12, atol=0)


def test_feature_clip_bounds_the_columns() -> None:
    theta = Theta.init("compact", seed=0).with_spec(feature_clip=0.5)
    param, grad = normal(40, seed=0).float(), normal(40, seed=1).float()
    state = reference.init_state(theta.spec, theta.tensors, [param])
    trace = reference.update(theta.spec, theta.tensors, state, [param], [grad]).trace
    columns = trace["mlp_input"][0][:, :12]
    assert float(columns.abs().max()) == 0.5
    assert float(columns.abs().min()) < 0.5


def test_zero_learning_rate_changes_no_parameter(theta: Theta) -> None:
    params = [normal(*shape, seed=0) for shape in SHAPES]
    state = reference.init_state(theta.spec, theta.tensors, params)
    grads, loss = inputs(0)
    new, *_ = reference.update(theta.spec, theta.tensors, state, params, grads, loss, lr=0.0, weight_decay=0.1)
    assert all(torch.equal(x, y) for x, y in zip(new, params, strict=True))


def test_nonfinite_gradients_do_not_reach_the_state(theta: Theta) -> None:
    params = [normal(6, seed=0)]
    state = reference.init_state(theta.spec, theta.tensors, params)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.5, 1e300, -0.25], dtype=F64)
    clean = torch.tensor([0.0, 10.0, -10.0, 0.5, 10.0, -0.25], dtype=F64)  # the first limit is 10
    dirty = reference.update(theta.spec, theta.tensors, state, params, [bad])
    expected = reference.update(theta.spec, theta.tensors, state, params, [clean])
    torch.testing.assert_close(dirty.params, expected.params, rtol=0, atol=1e-12)
    torch.testing.assert_close(dirty.state, expected.state, rtol=0, atol=1e-12)
    assert dirty.trace["stats"][0, 2] == 3.0
    assert float(dirty.trace["clip_limit"]) == pytest.approx(10.0, rel=1e-14)
