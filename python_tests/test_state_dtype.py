"""Accumulators in bfloat16 and in 8 bits: random bits alike in all back ends, right on average, no stall, states that
resume."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import ALIGNED, BF16, F32, GUARD, Backend, Problem, Run, problem_of, same
from optimizer_cases import assert_same_bits, copies, make_optimizer, make_params, run
from torch import Tensor

from lopt import LearnedOptimizer, kernels
from lopt.benchmark import traffic
from lopt.rule import PRESETS, codes, reference
from lopt.rule.features import FEATURE_SETS
from lopt.rule.rounding import Coding, Rounding, coded, decoded

SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)
SIZES = ((1,), (31,), (129,), (8193,), (20_000,))
DYADIC = {"paper": ((0.5, 0.75, 0.875, 0.75, 0.9375),) * 2, "compact": ((0.5, 0.75, 0.875), (0.75, 0.9375))}
# Powers of two times a number of a code are exact, so that a sum is rounded once, fused or not.
DYADIC_OF_CODES = {"paper": ((0.5, 0.25, 0.125, 0.75, 0.5),) * 2, "compact": ((0.5, 0.75, 0.25), (0.5, 0.25))}
DYADIC_OF_CODES["paper"] = DYADIC_OF_CODES["paper"][0], (0.5, 0.25, 0.125, 0.0625, 0.5)
INT8 = torch.int8


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


def coded_problem(feature_set: str, shapes: tuple[tuple[int, ...], ...] = SIZES, around: int = 78) -> Problem:
    """Random codes, blocks of different scales; momenta up to about 2 where a scale is ``around`` 79."""
    problem, generator = problem_of(feature_set, 8, shapes), torch.Generator().manual_seed(5)

    def of(code: codes.Code, x: Tensor) -> Tensor:
        low = -code.levels if code.dtype == INT8 else 0
        return torch.randint(low, code.levels + 1, x.shape, generator=generator).to(code.dtype)

    counts = [(len(m) + len(r), codes.blocks_of(m.shape[1])) for m, r in zip(problem.mom, problem.rms, strict=True)]
    new = {
        "grads": [ones_and_more(grad.shape, generator) for grad in problem.grads],
        "mom": [of(codes.MOM, x) for x in problem.mom],
        "rms": [of(codes.RMS, x) for x in problem.rms],
        "scales": [(around + torch.randint(3, count, generator=generator)).to(torch.uint8) for count in counts],
    }
    return dataclasses.replace(problem, **new, clip_limit=torch.full((len(shapes),), 4.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("guard", [GUARD, ALIGNED])
@SETS
def test_the_same_codes_as_the_reference(backend: Backend, feature_set: str, guard: int) -> None:
    problem, decays = coded_problem(feature_set), DYADIC_OF_CODES[feature_set]
    spec = dataclasses.replace(problem.spec, mom_decays=decays[0], rms_decays=decays[1])
    kernel, step = Run(problem, backend, guard=guard), 2**33 + 5
    stats = accumulate(kernel, step, decays)
    kernel.check_guards()
    assert problem.scales is not None
    assert kernel.scales is not None
    for i, limit in enumerate(problem.clip_limit):
        flat = problem.params[i].reshape(-1), problem.grads[i].reshape(-1)
        state = decoded(problem.mom[i], problem.rms[i], problem.scales[i])
        coding = Coding(Rounding(step, i), len(state[0]))
        row = reference.accumulate(spec, *flat, *state, limit, coding)[3]
        assert same([kernel.scales[i], kernel.mom[i], kernel.rms[i]], [coding.stored[k] for k in (2, 0, 1)]), i
        torch.testing.assert_close(stats[i], row, rtol=1e-5, atol=1e-6)  # of the numbers that are stored


@pytest.mark.parametrize("code", [codes.MOM, codes.RMS])
def test_numbers_of_codes(code: codes.Code) -> None:
    """All codes and scales are exact numbers, which are their own codes; the largest of a block is in the upper half of
    what its scale reaches; what is between two codes becomes either, in proportion."""
    every = torch.arange(-127 if code.dtype == INT8 else 0, code.levels + 1)
    scales = torch.arange(207, dtype=torch.uint8)[:, None]
    numbers = codes.decode(code, every[:128].to(code.dtype).expand(207, -1), scales)
    exact = every[:128].double() ** code.power * 2.0 ** (scales.double() + code.unit)
    torch.testing.assert_close(numbers.double(), exact, rtol=2**-24, atol=0.0)
    again, same_scales = codes.encode(code, numbers[:206])
    kept = (same_scales == scales[:206])[:, 0]
    assert torch.equal(again[kept], every[:128].to(code.dtype).expand(int(kept.sum()), -1))

    values = torch.rand(50, 128, generator=torch.Generator().manual_seed(0)) ** 3
    scales = codes.encode(code, values)[1]
    top = code.levels**code.power * 2.0 ** (scales.double() + code.unit)
    assert bool((values.amax(1, keepdim=True) <= top).all())
    assert bool((values.amax(1, keepdim=True) > 0.48 * top).all())

    highest = code.levels - 1
    low, high = (
        codes.decode(code, torch.tensor([[c]]).to(code.dtype), torch.tensor([[79]])) for c in (highest - 1, highest)
    )
    share = torch.linspace(0, 1, 9)[:-1]
    between, lots = low + share * (high - low), torch.arange(2**16)
    chosen = codes.encode(code, between.repeat_interleave(2**16, 1), lots.repeat(8)[None])[0].view(8, -1)
    risen = (chosen.double() - chosen.double().min()).mean(1)
    torch.testing.assert_close(risen, share.double(), atol=2e-5, rtol=0.0)
    assert codes.encode(codes.RMS, torch.tensor([[1.0, 1e-30, 0.0]]))[0].tolist() == [[228, 1, 0]]


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
def test_a_neighbouring_code_and_right_on_average(backend: Backend, feature_set: str) -> None:
    """As above, in units of the distance between the two codes."""
    problem = problem_of(feature_set, 8, ((30_000,),))
    mom, rms, scales = coded(torch.cat([problem.mom[0], problem.rms[0]]), len(problem.mom[0]))
    narrow = Run(dataclasses.replace(problem, mom=[mom], rms=[rms], scales=[scales]), backend)
    wide_mom, wide_rms = decoded(mom, rms, scales)
    wide = Run(dataclasses.replace(problem, mom=[wide_mom], rms=[wide_rms]), backend)
    accumulate(narrow, 7)
    wide.accumulate()
    assert narrow.scales is not None
    new = [x.cpu() for x in (narrow.mom[0], narrow.rms[0], narrow.scales[0])]
    for code, k, found, exact in zip(
        (codes.MOM, codes.RMS), (0, 1), decoded(*new), (wide.mom[0], wide.rms[0]), strict=True
    ):
        exact = exact.cpu()
        of = new[2][: len(mom)] if k == 0 else new[2][len(mom) :]
        unit = 2.0 ** (of.double() + code.unit).repeat_interleave(codes.BLOCK, 1)[:, : exact.shape[1]]
        low = torch.floor((exact.double().abs() / unit) ** (1 / code.power))
        spacing = ((low + 1) ** code.power - low**code.power) * unit
        off = (found.double() - exact.double()) / spacing
        assert float(off.abs().max()) < 1.0001
        means = off.mean(dim=1)
        assert bool((means.abs() < 5 * 0.5 / math.sqrt(off.shape[1])).all()), means


@SETS
def test_apply_reads_the_numbers_of_codes(backend: Backend, feature_set: str) -> None:
    problem = coded_problem(feature_set)
    assert problem.scales is not None
    states = [decoded(*some) for some in zip(problem.mom, problem.rms, problem.scales, strict=True)]
    floats = {"mom": [mom for mom, _ in states], "rms": [rms for _, rms in states], "scales": None}
    for guard in (GUARD, ALIGNED):
        narrow = Run(problem, backend, guard=guard)
        wide = Run(dataclasses.replace(problem, **floats), backend, guard=guard)  # type: ignore[arg-type]
        assert same([narrow.apply(), *narrow.params], [wide.apply(), *wide.params])
        narrow.check_guards()


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


def test_a_slow_accumulator_in_8_bits_does_not_stall(backend: Backend) -> None:
    r"""It follows :math:`g + (m - g) d^T` in expectation, where rounding to nearest stands still.

    As above, with the widest distance of two codes that are met: the scale of a block is the same in all steps, as
    numbers stay between a half and 61/64 of a power of two.
    """
    steps, count, decay, goal = 200, 8192, 0.999, 0.9
    problem = problem_of("compact", 8, ((count,),))
    start, scales = {codes.MOM: 104, codes.RMS: 230}, torch.full((5, count // 128), 78, dtype=torch.uint8)
    state = {
        "mom": [torch.full((3, count), start[codes.MOM]).to(torch.int8)],
        "rms": [torch.full((2, count), start[codes.RMS]).to(torch.uint8)],
        "scales": [scales],
        "grads": [torch.full((count,), goal)],
    }
    kernel = Run(dataclasses.replace(problem, clip_limit=torch.full((1,), 4.0), **state), backend)  # type: ignore[arg-type]
    assert kernel.scales is not None
    begun = [float(x[-1, 0]) for x in decoded(state["mom"][0], state["rms"][0], scales)]
    for step in range(steps):
        accumulate(kernel, step)
    assert torch.equal(kernel.scales[0][[2, 4]].cpu(), scales[[2, 4]])
    ends = decoded(*(x.cpu() for x in (kernel.mom[0], kernel.rms[0], kernel.scales[0])))
    for code, first, found, g in zip((codes.MOM, codes.RMS), begun, ends, (goal, goal * goal), strict=True):
        assert 0.5 < first < 0.6
        nearest = codes.encode(code, torch.full((1, 1), decay * first + (1 - decay) * g))[0]
        assert int(nearest) == start[code]
        expected, spacing = g + (first - g) * decay**steps, 0.024
        deviation = math.sqrt(steps * spacing * (1.0 - decay) * (g - first) / count)
        assert expected - first > 10 * deviation
        assert abs(float(found[-1].double().mean()) - expected) < 5 * deviation  # decay .999
        assert first <= float(found[-1].min()) <= float(found[-1].max()) < 61 / 64


def test_a_step_counter_is_needed() -> None:
    state = {name: [torch.zeros(k, 4, dtype=BF16)] for name, k in (("mom", 3), ("rms", 2))}
    plan = kernels.Plan("cpu", "compact", [torch.zeros(4)], **state)
    plan.set_tensors([torch.zeros(4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="step: a narrow state needs one int64 on cpu to be rounded by, got nothing"):
        plan.accumulate(torch.ones(1))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1,\)"):
        plan.accumulate(torch.ones(1), step=torch.ones(1))
    with pytest.raises(TypeError, match=r"rms\[0\]: expected torch.bfloat16, got torch.float32"):
        kernels.Plan("cpu", "compact", [torch.zeros(4)], state["mom"], [torch.zeros(2, 4)])


def test_scales_are_needed() -> None:
    mom, rms = [torch.zeros(3, 300, dtype=torch.int8)], [torch.zeros(2, 300, dtype=torch.uint8)]
    params = [torch.zeros(300)]
    with pytest.raises(ValueError, match=r"scales\[0\]: accumulators in 8 bits need 15 of them, got nothing"):
        kernels.Plan("cpu", "compact", params, mom, rms)
    with pytest.raises(ValueError, match=r"scales\[0\]: expected 15 elements, got 10"):
        kernels.Plan("cpu", "compact", params, mom, rms, scales=[torch.zeros(5, 2, dtype=torch.uint8)])
    with pytest.raises(TypeError, match=r"rms\[0\]: expected torch.uint8, got torch.int8"):
        kernels.Plan("cpu", "compact", params, mom, [torch.zeros(2, 300, dtype=torch.int8)])


# ---- LearnedOptimizer -----------------------------------------------------------------------------------------------

IMPLS = pytest.mark.parametrize("impl", ["cpu", "sim", "reference"])
PRESET = pytest.mark.parametrize("preset", PRESETS)


@pytest.mark.parametrize("state_dtype", [torch.float16, "bfloat16", None])
def test_other_dtypes_are_refused(state_dtype: object) -> None:
    with pytest.raises(
        ValueError, match=r"state_dtype: expected one of \(torch.float32, torch.bfloat16, torch.int8\), "
    ):
        make_optimizer(make_params(), state_dtype=state_dtype)


@PRESET
def test_memory_is_a_half_and_a_quarter(preset: str) -> None:
    """As benchmarks count it, but for scales."""
    for dtype, size in ((F32, 4), (BF16, 2), (INT8, 1)):
        params = make_params(((100, 3),))
        opt = make_optimizer(params, preset=preset, state_dtype=dtype)
        run(opt, params, 1)
        state = opt.state[params[0]]
        held = sum(state[name].numel() * state[name].element_size() for name in ("mom", "rms"))
        assert held == 300 * traffic.learned(preset, PRESETS[preset], state_bytes=size).state
        assert state["lstm"]["h"].dtype == F32
        assert dtype != INT8 or state["scales"].numel() == held // 300 * 3


def accumulators(opt: LearnedOptimizer, param: Tensor) -> list[Tensor]:
    """Of a parameter, in float32."""
    state = opt.state[param]
    if "scales" in state:
        return list(decoded(state["mom"], state["rms"], state["scales"]))
    return [state[name].float() for name in ("mom", "rms")]


@PRESET
def test_back_ends_agree_on_codes(preset: str) -> None:
    results = []
    for impl in ("cpu", "sim", "reference"):
        params = make_params(((129, 33), (7,)))
        opt = make_optimizer(params, impl, preset, state_dtype=INT8)
        run(opt, params, 3)
        results.append([torch.cat([accumulators(opt, p)[k].reshape(-1) for p in params]) for k in range(2)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert float((a != b).double().mean()) < 1e-3
            assert float((a - b).abs().max()) <= 2.0**-5 * float(a.abs().max())


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


@pytest.mark.parametrize("dtype", [BF16, INT8])
@IMPLS
@PRESET
def test_resume_is_never_having_stopped(impl: str, preset: str, dtype: torch.dtype) -> None:
    params = make_params()
    opt = make_optimizer(params, impl, preset, state_dtype=dtype)
    run(opt, params, 2)
    others = copies(params)
    other = make_optimizer(others, impl, preset, state_dtype=dtype)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    expected = {BF16} if dtype == BF16 else {torch.int8, torch.uint8}
    assert {x.dtype for p in others for x in (other.state[p]["mom"], other.state[p]["rms"])} == expected
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


def test_a_state_in_8_bits_is_converted() -> None:
    """Numbers of codes are exact; others become the nearest code."""
    for dtype in (F32, BF16):
        params = make_params()
        narrow, wide = (make_optimizer(params, state_dtype=some) for some in (INT8, dtype))
        run(narrow, params, 2)
        wide.load_state_dict(narrow.state_dict())
        for param in params:
            assert_same_bits(
                [wide.state[param][x] for x in ("mom", "rms")], [x.to(dtype) for x in accumulators(narrow, param)]
            )
            assert "scales" not in wide.state[param]
        run(wide, params, 1, first=2)
        narrow.load_state_dict(wide.state_dict())
        for param in params:
            both = torch.cat(accumulators(wide, param))
            new = coded(both, len(wide.state[param]["mom"]))
            assert_same_bits([narrow.state[param][name] for name in ("mom", "rms", "scales")], list(new))
        run(narrow, params, 1, first=3)


def test_a_state_dict_without_scales_is_refused() -> None:
    params = make_params(((5, 4),))
    opt = make_optimizer(params, state_dtype=INT8)
    run(opt, params, 1)
    saved = opt.state_dict()
    del saved["state"][0]["scales"]
    with pytest.raises(ValueError, match=r"state\[0\]\['scales'\] expected shape \(5, 1\), found nothing"):
        opt.load_state_dict(saved)


def test_parts_of_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sharded_state: state_dtype=torch\.int8 has a scale for each 128 "):
        make_optimizer(make_params(), state_dtype=INT8, sharded_state=True)


def test_a_run_with_codes_is_as_good() -> None:
    """Cross-entropy of a teacher's classes in the last 50 of 300 steps."""
    ends = []
    for dtype in (F32, INT8):
        torch.manual_seed(0)
        teacher = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        opt = LearnedOptimizer(model, total_steps=300, state_dtype=dtype)
        losses = []
        for _ in range(300):
            x = torch.randn(64, 16)
            loss = torch.nn.functional.cross_entropy(model(x), (4 * teacher(x)).softmax(1).detach())
            opt.zero_grad()
            loss.backward()
            opt.step(loss=loss)
            losses.append(float(loss.detach()))
        ends.append(sum(losses[-50:]) / 50)
        assert ends[-1] < 0.85 * losses[0]
    assert 0.97 < ends[1] / ends[0] < 1.03


def test_any_number_of_threads(set_num_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        found: list[Tensor] = []
        for dtype in (BF16, INT8):
            params = make_params(((20_000,), (5, 4), ()))
            opt = make_optimizer(params, state_dtype=dtype)
            run(opt, params, 3)
            found += [*params, *(opt.state[param]["mom"] for param in params)]
        results.append(found)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
