"""The compiled kernels against float64: errors, bits, hostile values.

The rule for every quantity: ``error <= 2 * error of the float32 reference + one ulp``. An error is
``max |value - exact| / scale`` over the elements of a tensor, and the worst tensor counts; ``exact`` is the float64
reference on the same inputs; one ulp is 2^-23. ``scale`` is the size of what is added up to make the quantity: the
largest element of an array, and for statistics see :func:`kernel_cases.stats_scale`; at least 2^-103, where one ulp is
the smallest normal number. The float32 reference is given half an ulp: below that it was lucky, or, as torch.var,
added up in float64.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from kernel_cases import (
    ALIGNED,
    BF16,
    F16,
    F32,
    GUARD,
    LONG,
    MIXED,
    RANKS,
    SHORT,
    WINDOWS,
    Backend,
    Problem,
    Run,
    accumulated_of,
    applied_of,
    feedback_of,
    flat,
    fold_bias,
    outputs,
    problem_of,
    random_weights,
    same,
    solve_accumulate,
    stats_scale,
    stats_scale_of,
)
from torch import Tensor

from lopt import LearnedOptimizer, Theta, kernels
from lopt.rule import PRESETS, reference
from lopt.rule.features import FEATURE_SETS, STATS
from lopt.rule.tensor_lstm import Conditioning

ULP, SMALLEST_SCALE = 2.0**-23, 2.0**-103
SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)
WIDTHS = pytest.mark.parametrize("width", kernels.WIDTHS)


def error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error of an element, relative to the largest element of its tensor; NaN if there is one."""
    errors = [
        (flat(value.cpu(), x.dtype) - x.reshape(-1)).abs().max() / x.abs().max().clamp(min=SMALLEST_SCALE)
        for value, x in zip(values, exact, strict=True)
    ]
    return float(torch.stack(errors).max())


def check_rule(name: str, kernel: float, single: float, ulps: float = 1.0) -> None:
    """The rule of this file."""
    assert kernel <= 2 * max(single, ULP / 2) + ulps * ULP, (
        f"{name}: error {kernel / ULP:.2f} ulp, of float32 PyTorch {single / ULP:.2f} ulp"
    )


def check_accumulate(backend: Backend, *key: object, ulps: float = 1.0) -> None:
    """Errors of ``accumulate`` on one problem; what it may not write is unchanged. ``ulps``: allowed of a statistic."""
    problem, exact, single = problem_of(*key), accumulated_of(torch.float64, *key), accumulated_of(F32, *key)
    run = Run(problem, backend)
    stats = run.accumulate().double()
    run.check_guards()
    assert same(run.params, problem.params)
    assert same(run.grads, problem.grads)
    check_rule("mom", error(run.mom, exact.mom), error(single.mom, exact.mom))
    check_rule("rms", error(run.rms, exact.rms), error(single.rms, exact.rms))
    scale = stats_scale_of(*key).clamp(min=SMALLEST_SCALE)
    errors = ((stats - exact.stats).abs() / scale).amax(dim=0)
    singles = ((single.stats.double() - exact.stats).abs() / scale).amax(dim=0)
    for i, name in enumerate((*STATS, *problem.spec.features.moments)):
        if name == "nonfinite":
            assert torch.equal(stats[:, i], exact.stats[:, i])
        else:
            check_rule(name, float(errors[i]), float(singles[i]), ulps)


def check_apply(backend: Backend, *key: object, guard: int = GUARD, precision: str = "high") -> None:
    """Errors of ``apply`` on one problem; what it may not write is unchanged."""
    problem, exact, single = problem_of(*key), applied_of(torch.float64, *key), applied_of(F32, *key)
    run = Run(problem, backend, guard=guard, precision=precision)
    hidden = run.apply()
    run.check_guards()
    assert same(run.grads, problem.grads)
    assert same(run.mom, problem.mom)
    assert same(run.rms, problem.rms)
    # In a tensor with one element, nothing averages the rounding of the bias that holds all constant inputs.
    for ulps, averaged in ((1.0, True), (2.0, False)):
        rows = [row for row, param in enumerate(problem.params) if (param.numel() != 1) == averaged]
        if rows:
            found, x, y = ([value[row] for row in rows] for value in (hidden, exact.hidden, single.hidden))
            check_rule("hidden", error(found, x), error(y, x), ulps)
    single_error = error(single.params, exact.params)
    if problem.params[0].dtype == F32:
        check_rule("params", error(run.params, exact.params), single_error)
        return
    for param, x in zip(run.params, exact.params, strict=True):
        # Rounded once, to nearest: half an ulp of 8 or 11 bits beside the float32 error before the rounding.
        half = 2.0**-9 if param.dtype == BF16 else 2.0**-12
        half_ulp = torch.ldexp(torch.full_like(x, half), torch.frexp(x).exponent)
        allowed = half_ulp + (2 * single_error + ULP) * x.abs().max()
        assert bool(((flat(param.cpu(), torch.float64) - x).abs() <= allowed).all())


# ---- Errors against float64 -----------------------------------------------------------------------------------------

HALF = pytest.mark.parametrize(
    "dtypes",
    [(F32, BF16), (BF16, F32), (BF16, BF16), (F32, F16), (F16, F32), (F16, F16), (F16, BF16), (BF16, F16)],
    ids=["f32-bf16", "bf16-f32", "bf16-bf16", "f32-f16", "f16-f32", "f16-f16", "f16-bf16", "bf16-f16"],
)


@SETS
def test_accumulate_error(backend: Backend, feature_set: str) -> None:
    check_accumulate(backend, feature_set, 8, MIXED)


@WIDTHS
@SETS
def test_apply_error(backend: Backend, feature_set: str, width: int) -> None:
    check_apply(backend, feature_set, width, MIXED)


@HALF
@SETS
def test_accumulate_in_16_bits(backend: Backend, feature_set: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_accumulate(backend, feature_set, 8, SHORT, *dtypes)


@HALF
@WIDTHS
@SETS
def test_apply_in_16_bits(
    backend: Backend, feature_set: str, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check_apply(backend, feature_set, width, SHORT, *dtypes)


@pytest.mark.parametrize(("feature_set", "width"), [("paper", 32), ("compact", 8)])
def test_error_over_many_chunks(backend: Backend, feature_set: str, width: int) -> None:
    check_accumulate(backend, feature_set, width, LONG)
    check_apply(backend, feature_set, width, LONG)


@SETS
def test_extreme_values(backend: Backend, feature_set: str) -> None:
    """Zeros, subnormals, 1e-30 and, clipped, 1e30: the same rule, and everything finite.

    Eight ulp for the statistics: with few distinct values the roundings of a running sum do not average out, and a
    kernel adds up to 64 values in float32 before it goes on in float64.
    """
    key = (feature_set, 8, MIXED, F32, F32, True)
    check_accumulate(backend, *key, ulps=8.0)
    check_apply(backend, *key)
    assert all(bool(x.isfinite().all()) for x in outputs(Run(problem_of(*key), backend)))


@pytest.mark.parametrize("outliers", [False, True])
@SETS
def test_statistics_around_a_pivot(backend: Backend, feature_set: str, outliers: bool) -> None:
    """Of values far from zero but near each other, and where the first parameter of every thread of a GPU, the pivot of
    what it adds up (Note [Pivots]), is 30 times as large as all others: then its sum of squares may be 64 times the
    result, and so may be its error.
    """
    size = 20_000
    problem = problem_of(feature_set, 8, ((size,),))
    first = (torch.arange(size) % 8192 < 512) & (torch.arange(size) % 4 == 0)
    values = {
        name: [torch.where(first, 30.0 * x.abs(), 1.0 + 0.01 * x) if outliers else 1000.0 + x for x in of]
        for name, of in (("params", problem.params), ("mom", problem.mom), ("rms", problem.rms))
    }
    problem = dataclasses.replace(problem, grads=[0.01 * x for x in problem.grads], **values)
    exact = solve_accumulate(problem, torch.float64)
    stats = Run(problem, backend).accumulate().double()
    errors = ((stats - exact.stats).abs() / stats_scale(problem, exact))[0]
    allowed = 64 * ULP if outliers else 8 * ULP
    for name, off in zip(STATS, errors.tolist(), strict=False):
        assert name == "nonfinite" or off <= allowed, f"{name}: {off / ULP:.1f} ulp"


# ---- Wide accesses and tensor cores ---------------------------------------------------------------------------------

GPU_KERNELS = pytest.mark.parametrize(
    "backend", ["sim", "sim-reverse", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@GPU_KERNELS
@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32), (F32, BF16), (BF16, F32), (F32, F16), (F16, F32), (F16, BF16)],
    ids=["f32-f32", "f32-bf16", "bf16-f32", "f32-f16", "f16-f32", "f16-bf16"],
)
@SETS
def test_wide_accesses_give_the_same_bits(
    backend: Backend, feature_set: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    problem = problem_of(feature_set, 8, WINDOWS, *dtypes)
    narrow, wide = (Run(problem, backend, guard=guard, precision="exact") for guard in (GUARD, ALIGNED))
    assert same(outputs(narrow), outputs(wide))
    wide.check_guards()


@GPU_KERNELS
@pytest.mark.parametrize("unaligned", [("grads",), ("params",), ("mom",), ("rms", "grads")], ids="-".join)
@SETS
def test_an_unaligned_operand_changes_no_bit(backend: Backend, feature_set: str, unaligned: tuple[str, ...]) -> None:
    """Each operand is as wide as its address allows, and tensor cores are used whatever the addresses are."""
    problem = problem_of(feature_set, 8, ((1152,), (20, 100)))
    one, all_aligned, exact = (
        Run(problem, backend, guard=ALIGNED, precision=precision, unaligned=names)
        for precision, names in (("high", unaligned), ("high", ()), ("exact", ()))
    )
    found = outputs(one)
    one.check_guards()
    assert same(found, outputs(all_aligned))
    assert not same(found, outputs(exact))


@GPU_KERNELS
@pytest.mark.parametrize("precision", ["exact", "high"])
@WIDTHS
@SETS
def test_aligned_apply_error(backend: Backend, feature_set: str, width: int, precision: str) -> None:
    """Tensor cores are held to the rule of plain float32."""
    check_apply(backend, feature_set, width, WINDOWS, guard=ALIGNED, precision=precision)


@GPU_KERNELS
@HALF
@SETS
def test_aligned_apply_in_16_bits(backend: Backend, feature_set: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_apply(backend, feature_set, 16, WINDOWS, *dtypes, guard=ALIGNED)


@GPU_KERNELS
@WIDTHS
@SETS
def test_fast_keeps_eleven_bits(backend: Backend, feature_set: str, width: int) -> None:
    """Each of two layers rounds inputs and weights by up to 2^-12: below 2^-9 in all, and not float32."""
    problem, exact = problem_of(feature_set, width, WINDOWS), applied_of(torch.float64, feature_set, width, WINDOWS)
    run = Run(problem, backend, guard=ALIGNED, precision="fast")
    hidden = run.apply()
    run.check_guards()
    assert 2.0**-16 < error(hidden, exact.hidden) < 2.0**-9
    assert error(run.params, exact.params) < 2.0**-6  # through the exponential of a magnitude of several units


@GPU_KERNELS
@SETS
def test_beyond_the_range_of_halves(backend: Backend, feature_set: str) -> None:
    """Windows of 128 with a column above 65504, a hidden unit above 1023, or a NaN: as without tensor cores."""
    problem = problem_of(feature_set, 16, ((1024,), (8192,)))
    spec = dataclasses.replace(problem.spec, feature_clip=None)
    params = [param.clone() for param in problem.params]
    params[0][5], params[0][300], params[1][4000], params[1][8191] = 1e7, -1e5, math.nan, 3e4
    scale = problem.conditioning.scale.clone()
    scale[:, spec.features.column_index("param")] = 1.0
    problem = dataclasses.replace(
        problem, spec=spec, params=params, conditioning=problem.conditioning._replace(scale=scale)
    )
    plain, split = (Run(problem, backend, guard=ALIGNED, precision=name) for name in ("exact", "high"))
    hidden, found = plain.apply(), split.apply()
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=0, equal_nan=True)
    for one, other, windows in zip(plain.params, split.params, ([0, 2], [31, 63]), strict=True):
        first, second = one.cpu().view(-1, 128), other.cpu().view(-1, 128)
        assert torch.equal(first[windows].nan_to_num(), second[windows].nan_to_num())
        assert torch.equal(first.isnan(), second.isnan())
        assert not torch.equal(first.nan_to_num(), second.nan_to_num())  # the others were on tensor cores


@GPU_KERNELS
@SETS
def test_extreme_values_on_tensor_cores(backend: Backend, feature_set: str) -> None:
    key = (feature_set, 8, WINDOWS, F32, F32, True)
    check_apply(backend, *key, guard=ALIGNED)
    for precision in ("high", "fast"):
        assert all(
            bool(x.isfinite().all())
            for x in outputs(Run(problem_of(*key), backend, guard=ALIGNED, precision=precision))
        )


# ---- Columns and exponential, one by one ----------------------------------------------------------------------------


def transparent(problem: Problem) -> Problem:
    """The same tensors with an MLP of zeros: ``apply`` then writes the direction times e^magnitude and nothing else."""
    spec = dataclasses.replace(problem.spec, linear_skip=True, feature_clip=None, magnitude_rate=1.0)
    scale = torch.ones_like(problem.conditioning.scale)
    count = len(problem.params)
    return dataclasses.replace(
        problem,
        spec=spec,
        weights={name: torch.zeros(shape) for name, shape in spec.shapes().items()},
        conditioning=problem.conditioning._replace(scale=scale, shift=torch.zeros_like(scale)),
        bias=torch.zeros_like(problem.bias),
        step_size=-torch.ones(count),
        keep=torch.zeros(count),
    )


@SETS
def test_every_column(backend: Backend, feature_set: str) -> None:
    """Element by element, from the smallest to the largest numbers, through a skip that is one on one column; 0 where a
    parameter rests.

    Two ulp of the value are allowed, three of a GPU's logarithm (csrc/rule/maths.h). A logarithm may be off by those of
    1, a difference of logarithms by those of its largest term.
    """
    problem = transparent(problem_of(feature_set, 8, SHORT))
    generator = torch.Generator().manual_seed(7)

    def spread(x: Tensor, low: float, high: float) -> Tensor:
        return x.sign() * 10 ** (low + (high - low) * torch.rand(x.shape, generator=generator))

    params, rms = [spread(x, -45, 38) for x in problem.params], [spread(x, -45, 38) for x in problem.rms]
    edges = torch.tensor([0.0, 2.0**-149, 2.0**-126, 1e-24, 1e-8, 1e-6, 0.5, 1.0, 2.0, 3.3e38])
    for x in (*params, *rms):
        for edge in torch.stack([edges, edges * (1 - ULP / 2), edges * (1 + ULP)]) if x.numel() > 100 else ():
            x.view(-1)[torch.randperm(x.numel(), generator=generator)[: len(edges)]] = edge
    problem = dataclasses.replace(problem, params=params, rms=rms)
    exact = [
        reference.raw_columns(
            problem.spec,
            reference.clip_gradient(flat(grad, torch.float64), limit.double()),
            flat(param, torch.float64),
            mom.double(),
            rms.double(),
        )
        for param, grad, mom, rms, limit in zip(
            problem.params, problem.grads, problem.mom, problem.rms, problem.clip_limit, strict=True
        )
    ]
    active = [problem.spec.features.active(second) for second in problem.rms]
    assert set(torch.cat(active).tolist()) == ({0.0, 1.0} if feature_set == "compact" else {1.0})
    for i, column in enumerate(problem.spec.features.columns):
        weights = {**problem.weights, "skip": torch.eye(len(problem.weights["skip"]))[i]}
        run = Run(problem, backend)
        run.apply(kernels.pack_mlp(problem.spec, weights)[None])
        least = {"log_param": 1.0, "log_slow": 1.0, "log_ratio": -0.5 * math.log(1e-24)}.get(
            column.name, SMALLEST_SCALE
        )
        for param, columns, moves in zip(run.params, exact, active, strict=True):
            off = (flat(param.cpu(), torch.float64) - moves * columns[i]).abs() / columns[i].abs().clamp(min=least)
            allowed = 3 if column.name.startswith("log") and backend.name != "cpu" else 2
            assert float(off.max()) <= allowed * ULP, f"{column.name}: {float(off.max()) / ULP:.1f} ulp"


def test_exponential(backend: Backend) -> None:
    """Of the magnitude, through a population of thetas with one magnitude each, or no step if it overflows.

    Two ulp, on a GPU (csrc/rule/maths.h) .62 |magnitude| more.
    """
    magnitudes = [*torch.linspace(-87.0, 88.0, 71).tolist(), -500.0, 500.0]
    shapes = tuple((t % 5 + 1,) for t in range(len(magnitudes)))
    problem = transparent(problem_of("compact", 8, shapes))
    bias = torch.tensor([[1.0, magnitude, *[0.0] * 4] for magnitude in magnitudes])
    weights = {name: value.expand(len(magnitudes), *value.shape) for name, value in problem.weights.items()}
    run = Run(problem, backend, range(len(magnitudes)))
    run.apply(kernels.pack_mlp(problem.spec, {**weights, "mlp.b3": bias}))
    for param, magnitude in zip(run.params[:-2], magnitudes, strict=False):
        ulps = 2 if backend.name == "cpu" else 2 + 0.62 * abs(magnitude)
        assert param.tolist() == pytest.approx([math.exp(magnitude)] * len(param), rel=ulps * ULP), magnitude
    assert all(0.0 <= value <= 1e-37 for value in run.params[-2].tolist())
    assert torch.equal(run.params[-1].cpu(), problem.params[-1].cpu())  # e^500: no step


# ---- Bits -----------------------------------------------------------------------------------------------------------


@SETS
def test_same_bits_for_any_number_of_threads(
    backend: Backend, feature_set: str, set_num_threads: Callable[[int], None]
) -> None:
    problem = problem_of(feature_set, 16, (*MIXED, (20_000,)))
    results = []
    for num_threads in (1, 2, 2, 3):
        set_num_threads(num_threads)
        results.append(outputs(Run(problem, backend)))
    assert all(same(results[0], result) for result in results[1:])


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@SETS
def test_sim_same_bits_in_both_thread_orders(feature_set: str, precision: str) -> None:
    problem, sim = problem_of(feature_set, 16, (*MIXED, (20_000,))), Backend("sim", torch.device("cpu"))
    forward = outputs(Run(problem, sim, guard=ALIGNED, precision=precision))
    try:
        kernels.module_of("sim").reverse_order(True)
        backward = outputs(Run(problem, sim, guard=ALIGNED, precision=precision))
    finally:
        kernels.module_of("sim").reverse_order(False)
    assert same(forward, backward)


@SETS
def test_a_list_is_its_tensors_one_by_one(backend: Backend, feature_set: str) -> None:
    problem = problem_of(feature_set, 16, MIXED)
    together = Run(problem, backend)
    stats, hidden = together.accumulate(), together.apply()
    for t in range(len(MIXED)):
        alone = Run(problem.select([t]), backend)
        assert same([alone.accumulate()[0], alone.apply()[0]], [stats[t], hidden[t]])
        assert same([*alone.params, *alone.mom, *alone.rms], [together.params[t], together.mom[t], together.rms[t]])


@SETS
def test_a_population_is_its_thetas_one_by_one(backend: Backend, feature_set: str) -> None:
    """One call, in which each tensor names the theta that drives it."""
    shapes, theta_index = ((129,), (3, 43), (8193,), (), (129,)), [2, 0, 1, 1, 2]
    problem = problem_of(feature_set, 16, shapes)
    spec, constant = problem.spec, problem.conditioning.constant
    generator = torch.Generator().manual_seed(1)
    thetas = [random_weights(spec, generator) for _ in range(3)]
    batched = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    packed = kernels.pack_mlp(spec, batched)
    assert torch.equal(packed, torch.stack([kernels.pack_mlp(spec, theta) for theta in thetas]))
    bias = torch.stack([fold_bias(spec, thetas[i], constant[t]) for t, i in enumerate(theta_index)])
    problem = dataclasses.replace(problem, bias=bias)
    together = Run(problem, backend, theta_index)
    hidden = together.apply(packed)
    for t, i in enumerate(theta_index):
        alone = Run(problem.select([t]), backend)
        assert same([alone.apply(packed[i : i + 1])[0], alone.params[0]], [hidden[t], together.params[t]])


# ---- Hostile gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@SETS
def test_nan_counts_as_zero_and_inf_as_the_limit(backend: Backend, feature_set: str, grad_dtype: torch.dtype) -> None:
    problem = problem_of(feature_set, 16, SHORT, F32, grad_dtype)
    dirty, clean, counts = [], [], []
    for grad, limit in zip(problem.grads, problem.clip_limit, strict=True):
        bad = torch.zeros(grad.numel(), dtype=torch.int64)
        bad[::3], bad[1::7], bad[2::11] = 1, 2, 3  # NaN, Inf, -Inf; the first element of every tensor is a NaN
        bad = bad.view(grad.shape)
        # The limit itself is no 16-bit number, so the clean gradient is a larger one, which is clipped to it.
        large = torch.full_like(grad, 2.0 * float(limit))
        dirty.append(torch.where(bad == 1, math.nan, torch.where(bad == 2, math.inf, grad)))
        dirty[-1] = torch.where(bad == 3, -math.inf, dirty[-1]).to(grad_dtype)
        clean.append(torch.where(bad == 1, 0.0, torch.where(bad == 2, large, grad)))
        clean[-1] = torch.where(bad == 3, -large, clean[-1]).to(grad_dtype)
        counts.append(float((bad > 0).sum()))
    with_bad = Run(dataclasses.replace(problem, grads=dirty), backend)
    without = Run(dataclasses.replace(problem, grads=clean), backend)
    stats, expected = with_bad.accumulate(), without.accumulate()
    counted = STATS.index("nonfinite")
    assert stats[:, counted].tolist() == counts
    assert expected[:, counted].tolist() == [0.0] * len(SHORT)
    expected[:, counted] = stats[:, counted]
    assert same([stats, *with_bad.mom, *with_bad.rms], [expected, *without.mom, *without.rms])
    assert same([with_bad.apply(), *with_bad.params], [without.apply(), *without.params])
    assert all(bool(x.isfinite().all()) for x in (stats, *with_bad.mom, *with_bad.rms, *with_bad.params))


# ---- All steps together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_five_steps_agree_with_the_float64_reference(backend: Backend, preset: str) -> None:
    """Empty tensors are left out. Errors within 1e-4 of the largest update, the bar of the golden traces."""
    theta = Theta.init(preset, seed=3).with_spec(step_multiplier=0.1)
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator) for shape in (*RANKS, (0,), (31,), (1134,), (8193,), (2, 0))]
    results = []
    for impl, device, dtype in ((backend.name, backend.device, F32), ("reference", torch.device("cpu"), torch.float64)):
        params = [torch.nn.Parameter(x.to(device, dtype, copy=True)) for x in start]
        opt = LearnedOptimizer(params, theta, impl=impl, total_steps=20, weight_decay=0.01)
        generator.manual_seed(5)
        for step in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
            if step == 2:
                opt.observe(valid_loss=1.5)
            opt.step(loss=1.0 / (1 + step))
        results.append([param.detach().cpu().double() for param in params])
    found, expected = (torch.cat([flat(param, torch.float64) for param in params]) for params in results)
    largest = float((expected - torch.cat([flat(param, torch.float64) for param in start])).abs().max())
    worst = float((found - expected).abs().max())
    assert worst <= 1e-4 * largest, f"{worst / largest:.1e} of the largest update"


@pytest.mark.parametrize("impl", ["cpu", "sim"])
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_same_bits_for_any_number_of_threads(
    preset: str, impl: str, set_num_threads: Callable[[int], None]
) -> None:
    """With many tensors, so that the LSTM's matrix products are shared out too."""
    theta = Theta.init(preset, seed=3)
    results = []
    for num_threads in (1, 2, 2):
        set_num_threads(num_threads)
        generator = torch.Generator().manual_seed(6)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [*RANKS, (1134,)] * 6]
        opt = LearnedOptimizer(params, theta, impl=impl)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            opt.step(loss=1.0)
        state = [value for param in params for value in opt.state[param]["lstm"].values()]
        results.append([param.detach().clone() for param in params] + state)
    assert same(results[0], results[1])
    assert same(results[1], results[2])


@SETS
def test_folding_is_exact(feature_set: str) -> None:
    """In float64: constant inputs folded into a bias, feedback from the mean hidden vector."""
    problem = problem_of(feature_set, 16, ((129,),))
    weights = {name: value.double() for name, value in problem.weights.items()}
    row = Conditioning(*(value[0].double() for value in problem.conditioning))
    param, mom, rms = flat(problem.params[0], torch.float64), problem.mom[0].double(), problem.rms[0].double()
    _, feedback, x, _ = reference.apply(problem.spec, weights, param, param, mom, rms, row)
    columns = len(problem.spec.features.columns)
    folded = fold_bias(problem.spec, weights, row.constant)
    torch.testing.assert_close(
        x[:, :columns] @ weights["mlp.w1"][:columns] + folded,
        x @ weights["mlp.w1"] + weights["mlp.b1"],
        rtol=0,
        atol=1e-12,
    )
    hidden = torch.relu(torch.relu(x @ weights["mlp.w1"] + weights["mlp.b1"]) @ weights["mlp.w2"] + weights["mlp.b2"])
    torch.testing.assert_close(feedback_of(weights, hidden.mean(dim=0)[None])[0], feedback, rtol=0, atol=1e-12)
