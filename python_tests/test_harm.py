"""No gradient, loss or parameter does lasting harm: state and parameters stay finite, training goes on."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import assert_same_bits, make_theta
from torch import Tensor
from torch.nn import Parameter

from lopt import LearnedOptimizer, Theta, kernels
from lopt.rule.constants import LARGEST_PARAM

SHAPES = ((3, 4), (5,), (), (2, 3))
NUMEL = sum(math.prod(shape) for shape in SHAPES)
MAX = torch.finfo(torch.float32).max
#: Around which sums, squares, roots and logarithms of float32 change their nature.
EDGES = (0.0, 1e-45, 1.2e-38, 1e-30, 1e-20, 1e-12, 1e-4, 1.0, 1e4, 1e8, 1e10, 1e12, 1e14, 1e18, 1.9e19, 1e30, 3e38, MAX)
NONFINITE = (math.nan, math.inf, -math.inf)
CASES = [*(f"cpu-{name}" for name in kernels._C.simd_available()), "sim", "reference"]
PRESETS = ("compact", "spectral", "paper", "lagged", "spectral lagged")

finite = st.one_of(
    st.sampled_from([*EDGES, *(-edge for edge in EDGES)]), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
anything = st.one_of(finite, st.sampled_from(NONFINITE))


def theta_of(preset: str) -> Theta:
    theta = make_theta("paper" if preset == "paper" else "spectral" if preset.startswith("spectral") else "compact")
    return theta.with_spec(stats="lagged") if preset.endswith("lagged") else theta


@contextmanager
def implementation(case: str) -> Iterator[str]:
    """``impl`` of a case; an instruction set is put back."""
    impl, _, simd = case.partition("-")
    before = kernels._C.simd_selected()
    if simd:
        assert kernels._C.simd_select(simd)
    try:
        yield impl
    finally:
        kernels._C.simd_select(before)


def split(values: list[float]) -> list[Tensor]:
    parts = torch.tensor(values, dtype=torch.float32).split([math.prod(shape) for shape in SHAPES])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def assert_finite(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            assert_finite(item, f"{where}[{name!r}]")
    elif isinstance(value, Tensor):
        assert bool(torch.isfinite(value.double()).all()), f"{where}: {value}"


numbers = st.lists(anything, min_size=NUMEL, max_size=NUMEL)
uniform = st.builds(lambda value: [value] * NUMEL, anything)  # overflows in sums, too
steps = st.tuples(numbers | uniform, anything, st.none() | anything)  # gradients, training and validation loss


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(start=numbers | uniform, given_steps=st.lists(steps, min_size=1, max_size=5), decay=st.sampled_from([0.0, 0.1]))
def test_everything_stays_finite(
    case: str, preset: str, dtypes: str, start: list[float], given_steps: list[Any], decay: float
) -> None:
    """Every finite parameter and all state, whatever comes, as bfloat16 too; what is not finite stays as it is."""
    dtype = getattr(torch, dtypes)
    params = [Parameter(value.to(dtype)) for value in split(start)]
    with implementation(case) as impl:
        opt = LearnedOptimizer(params, theta_of(preset), impl=impl, state_dtype=dtype, weight_decay=decay)
        for grads, train_loss, valid_loss in given_steps:
            before = [param.detach().clone() for param in params]
            for param, grad in zip(params, split(grads), strict=True):
                param.grad = grad.to(dtype)
            if valid_loss is not None:
                opt.observe(valid_loss=torch.tensor(valid_loss))
            opt.observe(train_loss=torch.tensor(train_loss))
            opt.step(loss=torch.tensor(train_loss))
            for old, param in zip(before, params, strict=True):
                kept = torch.isfinite(old)
                assert bool(torch.isfinite(param[kept]).all()), f"{old} became {param.detach()}"
                assert bool((param[~kept].isnan() == old[~kept].isnan()).all())
                assert not bool(torch.isfinite(param[~kept]).any())
                if not preset.endswith("lagged") and not bool(kept.all()):
                    torch.testing.assert_close(param.detach(), old, rtol=0, atol=0, equal_nan=True)
        for index, state in opt.state_dict()["state"].items():
            assert_finite({name: value for name, value in state.items() if name != "stats"}, f"state[{index}]")
        assert_finite(opt.param_groups[0], "param_groups[0]")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", NONFINITE)
def test_a_tensor_with_a_nonfinite_parameter_rests_and_no_other_notices(case: str, preset: str, bad: float) -> None:
    """Bit for bit: the others move as in a list without it; after it is restored, it moves again."""
    shapes = ((3, 4), (6,), (2, 5))
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params[1].data[2] = bad
    others = [Parameter(params[i].detach().clone()) for i in (0, 2)]
    first, grads = params[1].detach().clone(), [[torch.randn(s, generator=generator) for s in shapes] for _ in range(7)]
    with implementation(case) as impl:
        opt = LearnedOptimizer(params, theta_of(preset), impl=impl)
        other = LearnedOptimizer(others, theta_of(preset), impl=impl)
        for step in range(4):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad
            for param, i in zip(others, (0, 2), strict=True):
                param.grad = grads[step][i].clone()
            opt.step(loss=1.0 / (1 + step))
            other.step(loss=1.0 / (1 + step))
        assert_same_bits(params[1].detach(), first)
        fresh = tensor_rows(preset)
        state = opt.state_dict()["state"]
        if preset in ("compact", "spectral"):  # the paper's LSTM sees how many tensors there are
            assert_same_bits([params[0].detach(), params[2].detach()], [param.detach() for param in others])
            rows = [state[i]["lstm"] for i in (0, 2)]
            assert_same_bits(rows, [other.state_dict()["state"][i]["lstm"] for i in (0, 1)])
        for name, value in fresh.items():
            assert torch.equal(state[1]["lstm"][name], value), name
        assert int(opt.nonfinite_parameters) == 4
        assert int(opt.nonfinite_gradients) == 0
        params[1].data[2] = 0.5
        before = params[1].detach().clone()
        for step in range(4, 7):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad
            opt.step(loss=0.1)
        assert int(opt.nonfinite_parameters) == (5 if preset.endswith("lagged") else 4)
        assert bool((params[1] != before).all())
        assert bool(torch.isfinite(params[1]).all())


def tensor_rows(preset: str) -> dict[str, Tensor]:
    """State of a tensor before its first step."""
    tensors = theta_of(preset).tensors
    names = {"h": "initial_h", "c": "initial_c", "feedback": "initial_from_mlp"}
    return {**{name: tensors[key] for name, key in names.items()}, "scale": torch.zeros(()), "rank": torch.ones(())}


BAD_STEPS = {
    "gradients of 3e38": (3e38, 1.0),
    "gradients of 1e12": (1e12, 1.0),
    "gradients that are NaN": (math.nan, math.nan),
    "infinite gradients": (-math.inf, math.inf),
    "losses of 3e38": (None, 3e38),
    "losses of -3e38": (None, -3e38),
    "subnormal gradients": (1e-42, 1e-42),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
@pytest.mark.parametrize("theta", ["default", "adam paper", "default lagged"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_training_recovers(impl: str, theta: str, bad: str) -> None:
    """A quadratic: after three bad steps, as little is left as a thousandth of the loss at the start, at most."""
    name, _, kind = theta.partition(" ")
    meta = Theta.init_adam("paper").with_spec(step_multiplier=0.01) if name == "adam" else Theta.load(name)
    meta = meta.with_spec(stats="lagged") if kind == "lagged" else meta
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 4), (4,), (4, 3))
    target = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    opt = LearnedOptimizer(params, meta, impl=impl)

    def loss_now() -> Tensor:
        return sum((0.5 * (p - t).square().sum() for p, t in zip(params, target, strict=True)), torch.zeros(()))

    start = float(loss_now().detach())
    grad, loss = BAD_STEPS[bad]
    for step in range(1000):
        opt.zero_grad()
        value = loss_now()
        value.backward()
        disturbed = 20 <= step < 23
        if disturbed and grad is not None:
            for param in params:
                param.grad = torch.full_like(param, grad)
        if step % 10 == 0:
            opt.observe(valid_loss=value.detach())
        opt.step(loss=loss if disturbed else value.detach())
        if disturbed:
            opt.observe(valid_loss=loss)
    assert float(loss_now().detach()) < 1e-3 * start


def test_one_loss_does_not_blind_the_inputs_for_good() -> None:
    """Twenty losses after one of 1e20, the standardised loss is what it would be without, to a tenth."""
    generator = torch.Generator().manual_seed(0)
    losses = 2.0 + 0.1 * torch.randn(400, generator=generator)
    for spike in (1e20, -1e20, 3e38):
        states = []
        for bad in (None, spike):
            param = Parameter(torch.ones(3))
            opt = LearnedOptimizer([param], impl="cpu")
            for i, loss in enumerate(losses.tolist()):
                param.grad = torch.zeros(3)
                opt.step(loss=bad if bad is not None and i == 200 else loss)
                if i in (205, 260):
                    states.append(opt.param_groups[0]["train_loss"].clone())
        early, late, early_hit, late_hit = states
        spread = math.sqrt(float(early[1]))
        assert abs(float(early_hit[0] - early[0])) < spread  # a tenth of ten standard deviations
        assert float(early_hit[1]) < 100 * float(early[1])
        assert float(late_hit[0]) == pytest.approx(float(late[0]), rel=1e-3)
        assert float(late_hit[1]) == pytest.approx(float(late[1]), rel=0.1)


def test_losses_that_stay_far_away_are_reached() -> None:
    """The deviation grows threefold with each of them, so a million times the spread takes a dozen losses."""
    param = Parameter(torch.ones(3))
    opt = LearnedOptimizer([param], impl="reference")
    for step in range(300):
        param.grad = torch.zeros(3)
        opt.step(loss=1.0 + 0.001 * (step % 2) if step < 200 else 1000.0)
    assert float(opt.param_groups[0]["train_loss"][0]) == pytest.approx(1000.0, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_dominates_the_steps_of_others(case: str) -> None:
    """A mask of -1e4 without gradient, and coordinates of size 100, beside a perceptron."""
    generator = torch.Generator().manual_seed(1)
    layers = [
        0.2 * torch.randn(8, 16, generator=generator),
        torch.zeros(16),
        0.2 * torch.randn(16, 3, generator=generator),
    ]
    beside = {
        "nothing": [],
        "mask": [torch.full((16, 16), -1e4)],
        "coordinates": [100 * torch.randn(20, 3, generator=generator)],
    }
    moved = {}
    with implementation(case) as impl:
        for name, more in beside.items():
            params = [Parameter(value.clone()) for value in (*layers, *more)]
            opt = LearnedOptimizer(params, Theta.init_adam("compact"), impl=impl)
            for param, grad in zip(params, itertools.cycle([0.3, -0.2, 0.1, 0.4]), strict=False):
                param.grad = torch.full_like(param, grad)
            if name == "mask":
                params[-1].grad.zero_()
            opt.step()
            moved[name] = [float((p.detach() - q).abs().mean()) for p, q in zip(params, layers, strict=False)]
    assert moved["mask"] == pytest.approx(moved["nothing"], rel=1e-6)
    for one, other in zip(moved["coordinates"], moved["nothing"], strict=True):
        assert 0.99 < one / other < 8.0
    assert min(moved["nothing"]) > 0.0


@pytest.mark.parametrize("case", CASES)
def test_a_huge_step_is_not_made(case: str) -> None:
    """Where a step is not finite, or would leave what bfloat16 can hold, the parameter stays as it is."""
    for dtype in (torch.float32, torch.bfloat16):
        param = Parameter(torch.tensor([LARGEST_PARAM, -LARGEST_PARAM, 1.0, 0.0]).to(dtype))
        before = param.detach().clone()
        with implementation(case) as impl:
            opt = LearnedOptimizer([param], make_theta("paper"), impl=impl, lr=1e38)
            for _ in range(3):
                param.grad = torch.tensor([1.0, -1.0, 1e30, 1e-3], dtype=dtype)
                opt.step(loss=1.0)
        after = param.detach()
        assert bool(torch.isfinite(after).all())
        assert float(after.abs().max()) <= LARGEST_PARAM
        assert not torch.equal(after, before) or dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_weight_decay_is_that_of_adamw_with_the_learned_step_as_rate(case: str, preset: str) -> None:
    """Two steps from the same state, with decay and without: they differ by ``step weight_decay param``."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, 5), (5,))
    values = [1.0 + torch.rand(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(12)]
    meta = Theta.init_adam("compact") if preset == "compact" else make_theta("paper")
    results, decay = [], 2.0
    with implementation(case) as impl:
        for last_decay, last_lr in ((0.0, 0.5), (decay, 0.5), (0.0, 1.0), (1e9, 1.0), (decay, 0.0)):
            params = [Parameter(value.clone()) for value in values]
            opt = LearnedOptimizer(params, meta, impl=impl)
            for step, row in enumerate(grads):
                for param, grad in zip(params, row, strict=True):
                    param.grad = grad.clone()
                if step == len(grads) - 1:
                    before = [param.detach().clone() for param in params]
                    opt.param_groups[0]["weight_decay"], opt.param_groups[0]["lr"] = last_decay, last_lr
                opt.step(loss=1.0)
            results.append([param.detach().clone() for param in params])
    plain, decayed, whole, crushed, still = results
    assert_same_bits(still, before)
    for old, without, with_decay, all_gone, full in zip(before, plain, decayed, crushed, whole, strict=True):
        shrunk = (without - with_decay).double() / (decay * old.double())  # lr step, of the tensor
        step = float(shrunk.mean())
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, step), rtol=0, atol=2e-7)
        if preset == "paper":
            assert step == pytest.approx(0.5 * meta.spec.step_multiplier, abs=2e-7)
        else:  # Adam's direction is at most about 1
            assert 0.25 * float((without - old).abs().max()) < step < 4.0 * float((without - old).abs().max())
        torch.testing.assert_close(all_gone, full - old, rtol=0, atol=5e-7)  # keep is 0 and not below
