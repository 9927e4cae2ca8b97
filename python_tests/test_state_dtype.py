"""Accumulators in bfloat16: random bits alike in all back ends, right on average, no stall, states that resume."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import ALIGNED, BF16, F32, GUARD, Backend, Problem, Run, problem_of, same
from optimizer_cases import assert_same_bits, copies, make_optimizer, make_params, run
from torch import Tensor

from lopt import kernels
from lopt.benchmark import traffic
from lopt.rule import PRESETS, reference
from lopt.rule.features import FEATURE_SETS
from lopt.rule.rounding import Rounding

SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)
SIZES = ((1,), (31,), (129,), (8193,), (20_000,))
DYADIC = {"paper": ((0.5, 0.75, 0.875, 0.75, 0.9375),) * 2, "compact": ((0.5, 0.75, 0.875), (0.75, 0.9375))}


def ones_and_more(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bfloat16 numbers in [1, 2)."""
    return 1.0 + torch.randint(128, shape, generator=generator) / 128


def dyadic_problem(feature_set: str) -> Problem:
    """Accumulators and gradients whose sums and products are float32 numbers: every back end must find the same."""
    problem, generator = problem_of(feature_set, 8, SIZES), torch.Generator().manual_seed(3)
    new = {
        "grads": [ones_and_more(grad.shape, generator) for grad in problem.grads],
        "mom": [ones_and_more(tuple(x.shape), generator).bfloat16() for x in problem.mom],
        "rms": [ones_and_more(tuple(x.shape), generator).bfloat16() for x in problem.rms],
    }
    return dataclasses.replace(problem, **new, clip_limit=torch.full((len(SIZES),), 4.0))  # type: ignore[arg-type]


def accumulate(run: Run, step: int, decays: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())) -> Tensor:
    device = run.backend.device
    counter = torch.tensor(step, device=device)
    return run.plan.accumulate(run.problem.clip_limit.to(device), *decays, counter).cpu()


@pytest.mark.parametrize("guard", [GUARD, ALIGNED])
@SETS
def test_the_same_bits_as_the_reference(backend: Backend, feature_set: str, guard: int) -> None:
    problem, decays = dyadic_problem(feature_set), DYADIC[feature_set]
    spec = dataclasses.replace(problem.spec, mom_decays=decays[0], rms_decays=decays[1])
    step = 2**33 + 5  # more than a word
    kernel = Run(problem, backend, guard=guard)
    stats = accumulate(kernel, step, decays)
    kernel.check_guards()
    for i, limit in enumerate(problem.clip_limit):
        operands = (x[i].float() for x in (problem.params, problem.grads, problem.mom, problem.rms))
        param, grad, mom, rms = operands
        flat = param.reshape(-1), grad.reshape(-1)
        _, mom, rms, row = reference.accumulate(spec, *flat, mom, rms, limit, Rounding(step, i))
        assert same([kernel.mom[i].float(), kernel.rms[i].float()], [mom, rms]), f"tensor {i}"
        torch.testing.assert_close(stats[i], row, rtol=1e-5, atol=1e-6)  # of the accumulators that are stored


def test_bits_of_another_step_tensor_or_seed_are_others() -> None:
    """Any two agree in 2^-16 of the places, plus six standard deviations."""
    count = 1_000_000
    streams = [
        row
        for rounding in (Rounding(3, 1), Rounding(4, 1), Rounding(3, 2))
        for row in (
            *rounding.bits(5, count),
            *Rounding(rounding.step, rounding.tensor, seed=1).bits(5, count),
        )
    ]
    expected = count / 2**16
    for i, one in enumerate(streams):
        mean = float(one.double().mean()) / (2**16 - 1)
        assert abs(mean - 0.5) < 5 * math.sqrt(1 / 12 / count)
        for other in streams[:i]:
            assert int((one == other).sum()) <= expected + 6 * math.sqrt(expected)


@SETS
def test_rounded_to_a_neighbour_and_right_on_average(backend: Backend, feature_set: str) -> None:
    """The mean error of n values in units of their spacing has a standard deviation of at most 1 / (2 sqrt(n))."""
    problem = problem_of(feature_set, 8, ((30_000,),))
    state = {name: [x.bfloat16() for x in getattr(problem, name)] for name in ("mom", "rms")}
    narrow = Run(dataclasses.replace(problem, **state), backend)
    wide = Run(dataclasses.replace(problem, **{name: [x.float() for x in state[name]] for name in state}), backend)
    accumulate(narrow, 7)
    wide.accumulate()
    for found, exact in ((narrow.mom[0], wide.mom[0]), (narrow.rms[0], wide.rms[0])):
        exact = exact.cpu()
        spacing = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)
        off = (found.cpu().float() - exact) / spacing
        assert float(off.abs().max()) < 1.0
        means = off.mean(dim=1)
        assert bool((means.abs() < 5 * 0.5 / math.sqrt(off.shape[1])).all()), means


@SETS
def test_apply_reads_the_numbers_that_are_stored(backend: Backend, feature_set: str) -> None:
    """Same bits as from a float32 state of the same values."""
    problem = problem_of(feature_set, 16, SIZES)
    state = {name: [x.bfloat16() for x in getattr(problem, name)] for name in ("mom", "rms")}
    for guard in (GUARD, ALIGNED):
        narrow = Run(dataclasses.replace(problem, **state), backend, guard=guard)
        floats = {name: [x.float() for x in state[name]] for name in state}
        wide = Run(dataclasses.replace(problem, **floats), backend, guard=guard)
        assert same([narrow.apply(), *narrow.params], [wide.apply(), *wide.params])
        narrow.check_guards()


def test_a_slow_accumulator_does_not_stall(backend: Backend) -> None:
    r"""It follows float32 where rounding to nearest stands still.

    A stored value m is a bfloat16 number, the next one m + (1 - d)(g - m); with spacing s it is rounded up or down with
    a variance of at most :math:`s (1 - d) |g - m|`, where stored values only rise from the start towards g. Errors of
    earlier steps shrink by d, so after T steps the variance is at most T times that, and that of the mean of n values
    is 1 / n of it.
    """
    steps, count, start, decay = 200, 8192, 0.8984375, 0.9999
    state = {name: [torch.full((5, count), start).bfloat16()] for name in ("mom", "rms")}
    problem = problem_of("paper", 8, ((count,),))
    problem = dataclasses.replace(problem, grads=[torch.ones(count)], clip_limit=torch.full((1,), 4.0), **state)
    kernel = Run(problem, backend)
    single, nearest = torch.tensor(start), torch.tensor(start).bfloat16()
    for step in range(steps):
        accumulate(kernel, step)
        single = decay * single + (1.0 - decay)
        nearest = (decay * nearest.float() + (1.0 - decay)).bfloat16()
    assert float(nearest) == start
    spacing = 2.0**-8
    deviation = math.sqrt(steps * spacing * (1.0 - decay) * (1.0 - start) / count)
    gained = float(single) - start
    assert gained > 10 * deviation
    for found in (kernel.mom[0][4], kernel.rms[0][4]):  # decay .9999
        assert abs(float(found.float().mean()) - float(single)) < 5 * deviation
        assert start <= float(found.float().min()) <= float(found.float().max()) < 1.0  # as the bound takes for granted


def test_a_step_counter_is_needed() -> None:
    state = {name: [torch.zeros(k, 4, dtype=BF16)] for name, k in (("mom", 3), ("rms", 2))}
    plan = kernels.Plan("cpu", "compact", [torch.zeros(4)], **state)
    plan.set_tensors([torch.zeros(4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="step: a bfloat16 state needs one int64 on cpu to be rounded by, got nothing"):
        plan.accumulate(torch.ones(1))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1,\)"):
        plan.accumulate(torch.ones(1), step=torch.ones(1))
    with pytest.raises(TypeError, match=r"rms\[0\]: expected torch.bfloat16, got torch.float32"):
        kernels.Plan("cpu", "compact", [torch.zeros(4)], state["mom"], [torch.zeros(2, 4)])


# ---- LearnedOptimizer -----------------------------------------------------------------------------------------------

IMPLS = pytest.mark.parametrize("impl", ["cpu", "sim", "reference"])
PRESET = pytest.mark.parametrize("preset", PRESETS)


@pytest.mark.parametrize("state_dtype", [torch.float16, "bfloat16", None])
def test_other_dtypes_are_refused(state_dtype: object) -> None:
    with pytest.raises(ValueError, match=r"state_dtype: expected one of \(torch.float32, torch.bfloat16\), got "):
        make_optimizer(make_params(), state_dtype=state_dtype)


@PRESET
def test_memory_is_halved(preset: str) -> None:
    """As benchmarks count it."""
    for dtype, size in ((F32, 4), (BF16, 2)):
        params = make_params(((100, 3),))
        opt = make_optimizer(params, preset=preset, state_dtype=dtype)
        run(opt, params, 1)
        state = opt.state[params[0]]
        held = sum(state[name].numel() * state[name].element_size() for name in ("mom", "rms"))
        assert held == 300 * traffic.learned(preset, PRESETS[preset], state_bytes=size).state
        assert state["lstm"]["h"].dtype == F32


@PRESET
def test_back_ends_agree(preset: str) -> None:
    """Where float32 differs in its last bit, one rounding in 2^16 may go the other way, by one spacing."""
    results = []
    for impl in ("cpu", "sim", "reference"):
        params = make_params(((129, 33), (7,)))
        opt = make_optimizer(params, impl, preset, state_dtype=BF16)
        run(opt, params, 3)
        results.append(torch.cat([opt.state[p][name].float().reshape(-1) for p in params for name in ("mom", "rms")]))
    for other in results[1:]:
        assert float((other != results[0]).double().mean()) < 1e-3
        assert float((other - results[0]).abs().max()) <= 2.0**-7 * float(results[0].abs().max())


@IMPLS
@PRESET
def test_resume_is_never_having_stopped(impl: str, preset: str) -> None:
    params = make_params()
    opt = make_optimizer(params, impl, preset, state_dtype=BF16)
    run(opt, params, 2)
    others = copies(params)
    other = make_optimizer(others, impl, preset, state_dtype=BF16)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert {x.dtype for p in others for x in (other.state[p]["mom"], other.state[p]["rms"])} == {BF16}
    both = copy.deepcopy((params, opt))
    for these, optimizer in ((params, opt), (others, other), both):
        run(optimizer, these, 3, first=2)
    for these, optimizer in ((others, other), both):
        assert_same_bits(these, params)
        assert_same_bits(optimizer.state_dict(), opt.state_dict())


def test_a_state_of_the_other_dtype_is_converted() -> None:
    for mine, other in ((F32, BF16), (BF16, F32)):
        params = make_params()
        saved = make_optimizer(params, state_dtype=other)
        run(saved, params, 2)
        opt = make_optimizer(params, state_dtype=mine)
        opt.load_state_dict(saved.state_dict())
        for param in params:
            assert_same_bits(opt.state[param]["mom"], saved.state[param]["mom"].to(mine))
            assert_same_bits(opt.state[param]["lstm"], saved.state[param]["lstm"])
        run(opt, params, 1, first=2)


def test_any_number_of_threads(set_num_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        params = make_params(((20_000,), (5, 4), ()))
        opt = make_optimizer(params, state_dtype=BF16)
        run(opt, params, 3)
        results.append([*params, *(opt.state[param]["mom"] for param in params)])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
