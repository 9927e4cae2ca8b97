"""The compiled kernels against float64: errors, bits, hostile values, wrong operands, and torch.library.

The rule for every quantity: ``error <= 2 * error of the float32 reference + one ulp``, where an error is
``max |value - exact| / scale`` over the elements of a tensor and the worst tensor counts, ``exact`` is the float64
reference on the same inputs, and one ulp is 2^-23. ``scale`` is the size of what is added up to make the quantity: the
largest element of an array, and for statistics see :func:`stats_scale`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from conftest import Backend
from torch import Tensor

from lopt import LearnedOptimizer, Theta, ops, reference
from lopt.features import FEATURE_SETS, STATS
from lopt.tensor_lstm import Conditioning
from lopt.theta import PRESETS, ThetaSpec

ULP = 2.0**-23
F32, BF16 = torch.float32, torch.bfloat16

SIZES = ((1,), (31,), (129,), (1134,), (8191,), (8192,), (8193,))
RANKS = ((), (7,), (5, 4), (3, 3, 2), (3, 3, 2, 4), (2, 3, 5, 4, 3))
MIXED = (*RANKS, *SIZES)
SHORT = ((), (31,), (3, 43), (8193,))
LONG = ((70_001,), (3,))


# ---- Problems and their exact solutions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Inputs of both operations for one list of tensors; ``mom`` and ``rms`` serve each of them as they are."""

    spec: ThetaSpec
    weights: dict[str, Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    mom: list[Tensor]
    rms: list[Tensor]
    clip_limit: Tensor  # [T]
    conditioning: Conditioning
    bias: Tensor  # [T, width] first layer, constant inputs folded in
    step_size: Tensor  # [T]
    keep: Tensor  # [T]

    def select(self, index: list[int]) -> "Problem":
        """The same problem for some of its tensors."""
        lists = {name: [getattr(self, name)[t] for t in index] for name in ("params", "grads", "mom", "rms")}
        rows = {name: getattr(self, name)[index] for name in ("clip_limit", "bias", "step_size", "keep")}
        conditioning = Conditioning(*(value[index] for value in self.conditioning))
        return dataclasses.replace(self, **lists, **rows, conditioning=conditioning)


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One dimension, in ``dtype``."""
    return x.reshape(-1).to(dtype)


def spec_of(feature_set: str, width: int) -> ThetaSpec:
    """A spec in which the magnitude output matters."""
    return dataclasses.replace(PRESETS[feature_set], mlp_width=width, magnitude_rate=0.1)


def random_weights(spec: ThetaSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values for every tensor of theta, biases and skip included."""
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[0] if shape else 1)
        for name, shape in spec.shapes().items()
    }


TINY = [0.0, -0.0, 1e-45, -1e-40, 1e-30, -1e-10, 1.0]


def pick(values: list[float], shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tensor of random elements of ``values``."""
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


def random_problem(
    feature_set: str,
    width: int,
    shapes: Sequence[tuple[int, ...]],
    param_dtype: torch.dtype = F32,
    grad_dtype: torch.dtype = F32,
    extreme: bool = False,
) -> Problem:
    """Tensors of different scales, gradients over three orders of magnitude and partly clipped, column maps as in use.

    ``extreme``: values are picked from tables of zeros, subnormal, tiny and huge numbers instead.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def powers(low: float, high: float, *shape: int) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(shape, generator=generator))

    spec = spec_of(feature_set, width)
    weights = random_weights(spec, generator)
    params = [((normal(*shape) + 0.3) * powers(-1, 1)).to(param_dtype) for shape in shapes]
    grads = [(normal(*shape) * powers(-2, 1, *shape)).to(grad_dtype) for shape in shapes]
    mom = [0.1 * normal(len(spec.mom_decays), param.numel()) for param in params]
    rms = [powers(-4, 0, len(spec.rms_decays), param.numel()) for param in params]
    if extreme:
        params = [pick([*TINY, 1e15, -1e15], param.shape, generator) for param in params]
        grads = [pick([*TINY, 1e30, -1e30, 3e38], grad.shape, generator) for grad in grads]
        mom = [pick(TINY, m.shape, generator) for m in mom]
        rms = [pick([0.0, 1e-45, 1e-30, 1e-10, 1.0, 100.0], r.shape, generator) for r in rms]
    count = len(shapes)
    clip_limit = 1.0 + torch.rand(count, generator=generator)
    stats = torch.stack(
        [
            reference.accumulate(
                spec, flat(param, torch.float64), flat(grad, torch.float64), m.double(), r.double(), limit
            )[3]
            for param, grad, m, r, limit in zip(params, grads, mom, rms, clip_limit.double(), strict=True)
        ]
    )
    decays = torch.tensor(spec.mom_decays + spec.rms_decays, dtype=torch.float64)
    scale, shift = spec.features.column_map(stats, torch.full((count,), 7.0, dtype=torch.float64), decays)
    constant = normal(count, spec.num_constant)
    return Problem(
        spec,
        weights,
        params,
        grads,
        mom,
        rms,
        clip_limit,
        Conditioning(scale.float(), shift.float(), constant, torch.ones(count)),
        ops.fold_bias(spec, weights, constant),
        step_size=0.1 * torch.rand(count, generator=generator),
        keep=1.0 - 0.1 * torch.rand(count, generator=generator),
    )


@dataclass(frozen=True)
class Accumulated:
    """Results of ``accumulate``."""

    mom: list[Tensor]
    rms: list[Tensor]
    stats: Tensor


@dataclass(frozen=True)
class Applied:
    """Results of ``apply``, parameters not rounded to their dtype."""

    params: list[Tensor]
    hidden: Tensor


def solve_accumulate(problem: Problem, dtype: torch.dtype) -> Accumulated:
    """By lopt/reference.py in ``dtype``."""
    operands = zip(problem.params, problem.grads, problem.mom, problem.rms, problem.clip_limit, strict=True)
    rows = [
        reference.accumulate(problem.spec, flat(param, dtype), flat(grad, dtype), *(x.to(dtype) for x in rest))
        for param, grad, *rest in operands
    ]
    _, mom, rms, stats = zip(*rows, strict=True)
    return Accumulated(list(mom), list(rms), torch.stack(stats))


def solve_apply(problem: Problem, dtype: torch.dtype) -> Applied:
    """By lopt/reference.py in ``dtype``; the last hidden layer from its MLP inputs."""
    weights = {name: value.to(dtype) for name, value in problem.weights.items()}
    params, hidden = [], []
    for t in range(len(problem.params)):
        limit, step_size, keep = (x[t].to(dtype) for x in (problem.clip_limit, problem.step_size, problem.keep))
        new, _, x, _ = reference.apply(
            problem.spec,
            weights,
            flat(problem.params[t], dtype),
            reference.clip_gradient(flat(problem.grads[t], dtype), limit),
            problem.mom[t].to(dtype),
            problem.rms[t].to(dtype),
            Conditioning(*(value[t].to(dtype) for value in problem.conditioning)),
            step_size,
            keep,
        )
        params.append(new)
        layer = torch.relu(x @ weights["mlp.w1"] + weights["mlp.b1"])
        hidden.append(torch.relu(layer @ weights["mlp.w2"] + weights["mlp.b2"]).mean(dim=0))
    return Applied(params, torch.stack(hidden))


def stats_scale(problem: Problem, exact: Accumulated) -> Tensor:
    """``[T, S]`` size of what is added up to make each statistic.

    Sums, means and moments: the same statistic of absolute values, where nothing cancels. Variances: sd * root mean
    square, their condition (Chan and Lewis 1979). The mean square of a logarithm: plus one, because rounding the
    argument moves a logarithm by one ulp of 1, however near to 0 it is.
    """
    positive = {name: [x.abs() for x in getattr(problem, name)] for name in ("params", "grads", "mom")}
    scale = solve_accumulate(dataclasses.replace(problem, **positive), torch.float64).stats
    for name in ("param", "mom", "rms"):
        mean, var = STATS.index(f"{name}_mean"), STATS.index(f"{name}_var")
        scale[:, var] = torch.sqrt(exact.stats[:, var] * (scale[:, var] + scale[:, mean] ** 2))
    for i, name in enumerate(problem.spec.features.moments):
        if name == "log_param^2":
            scale[:, len(STATS) + i] += 1.0
    return scale


# Computed once for all back ends.
problem_of = cache(random_problem)
accumulated_of = cache(lambda dtype, *key: solve_accumulate(problem_of(*key), dtype))
applied_of = cache(lambda dtype, *key: solve_apply(problem_of(*key), dtype))
stats_scale_of = cache(lambda *key: stats_scale(problem_of(*key), accumulated_of(torch.float64, *key)))


# ---- Running a kernel -----------------------------------------------------------------------------------------------

GUARD = 3  # elements before and after every tensor, an odd number: addresses are as unaligned as they may be
SENTINEL = -77.0


@dataclass
class Run:
    """One plan over guarded copies of a problem's tensors."""

    problem: Problem
    backend: Backend
    theta_index: Sequence[int] | None = None

    def __post_init__(self) -> None:
        problem = self.problem
        self.buffers: list[Tensor] = []
        self.params = [self._guarded(x) for x in problem.params]
        self.grads = [self._guarded(x) for x in problem.grads]
        self.mom = [self._guarded(x) for x in problem.mom]
        self.rms = [self._guarded(x) for x in problem.rms]
        name, spec = self.backend.name, problem.spec
        self.plan = ops.Plan(name, spec.feature_set, self.params, self.mom, self.rms, self.theta_index)
        self.plan.set_tensors(self.params, self.grads)

    def _guarded(self, x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 2 * GUARD,), SENTINEL, dtype=x.dtype)
        buffer[GUARD:-GUARD] = x.reshape(-1)
        self.buffers.append(buffer.to(self.backend.device))
        return self.buffers[-1][GUARD:-GUARD].view(x.shape)

    def accumulate(self) -> Tensor:
        return self.plan.accumulate(self.problem.clip_limit.to(self.backend.device)).cpu()

    def apply(self, weights: Tensor | None = None) -> Tensor:
        problem, spec = self.problem, self.problem.spec
        weights = ops.pack_mlp(spec, problem.weights)[None] if weights is None else weights
        scale, shift = problem.conditioning.scale, problem.conditioning.shift
        operands = problem.clip_limit, scale, shift, problem.bias, problem.step_size, problem.keep, weights
        moved = (x.to(self.backend.device) for x in operands)
        return self.plan.apply(*moved, spec.magnitude_rate, spec.feature_clip).cpu()

    def check_guards(self) -> None:
        for buffer in self.buffers:
            edges = torch.cat([buffer[:GUARD], buffer[-GUARD:]]).float().cpu()
            assert torch.equal(edges, torch.full_like(edges, SENTINEL)), "written outside of a tensor"


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all bits are the same."""
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(first, second, strict=True))


def error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error of an element, relative to the largest element of its tensor."""
    return max(
        float((flat(value.cpu(), x.dtype) - x.reshape(-1)).abs().max() / x.abs().max().clamp(min=1e-300))
        for value, x in zip(values, exact, strict=True)
    )


def check_rule(name: str, kernel: float, single: float, ulps: float = 1.0) -> None:
    """The rule of this file."""
    assert kernel <= 2 * single + ulps * ULP, (
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
    scale = stats_scale_of(*key).clamp(min=1e-300)
    errors = ((stats - exact.stats).abs() / scale).amax(dim=0)
    singles = ((single.stats.double() - exact.stats).abs() / scale).amax(dim=0)
    for i, name in enumerate((*STATS, *problem.spec.features.moments)):
        if name == "nonfinite":
            assert torch.equal(stats[:, i], exact.stats[:, i])
        else:
            # torch.var adds up in float64 even of float32 values, kernels partly in float32. Two ulp of a variance are
            # less than the resolution of its only use, the logarithm in the LSTM's input.
            check_rule(name, float(errors[i]), float(singles[i]), max(ulps, 2.0) if name.endswith("_var") else ulps)


def check_apply(backend: Backend, *key: object) -> None:
    """Errors of ``apply`` on one problem; what it may not write is unchanged."""
    problem, exact, single = problem_of(*key), applied_of(torch.float64, *key), applied_of(F32, *key)
    run = Run(problem, backend)
    hidden = run.apply()
    run.check_guards()
    assert same(run.grads, problem.grads)
    assert same(run.mom, problem.mom)
    assert same(run.rms, problem.rms)
    check_rule("hidden", error(hidden, exact.hidden), error(single.hidden, exact.hidden))
    single_error = error(single.params, exact.params)
    if problem.params[0].dtype == F32:
        check_rule("params", error(run.params, exact.params), single_error)
        return
    for param, x in zip(run.params, exact.params, strict=True):
        # Rounded once, to nearest: half a bfloat16 ulp beside the float32 error before the rounding.
        half_ulp = torch.ldexp(torch.full_like(x, 2.0**-9), torch.frexp(x).exponent)
        allowed = half_ulp + (2 * single_error + ULP) * x.abs().max()
        assert bool(((flat(param.cpu(), torch.float64) - x).abs() <= allowed).all())


# ---- Errors against float64 -----------------------------------------------------------------------------------------

HALF = pytest.mark.parametrize(
    "dtypes", [(F32, BF16), (BF16, F32), (BF16, BF16)], ids=["f32-bf16", "bf16-f32", "bf16-bf16"]
)
SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)
WIDTHS = pytest.mark.parametrize("width", ops.WIDTHS)


@SETS
def test_accumulate_error(backend: Backend, feature_set: str) -> None:
    check_accumulate(backend, feature_set, 8, MIXED)


@WIDTHS
@SETS
def test_apply_error(backend: Backend, feature_set: str, width: int) -> None:
    check_apply(backend, feature_set, width, MIXED)


@HALF
@SETS
def test_accumulate_error_bfloat16(backend: Backend, feature_set: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_accumulate(backend, feature_set, 8, SHORT, *dtypes)


@HALF
@WIDTHS
@SETS
def test_apply_error_bfloat16(
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


# ---- Bits -----------------------------------------------------------------------------------------------------------


def outputs(run: Run) -> list[Tensor]:
    """Everything that both operations write, in sequence."""
    stats = run.accumulate()
    hidden = run.apply()
    return [stats, hidden, *(x.cpu() for x in (*run.params, *run.mom, *run.rms))]


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


@SETS
def test_sim_same_bits_in_both_thread_orders(feature_set: str) -> None:
    problem, sim = problem_of(feature_set, 16, (*MIXED, (20_000,))), Backend("sim", torch.device("cpu"))
    forward = outputs(Run(problem, sim))
    try:
        ops._C.sim_reverse_order(True)
        backward = outputs(Run(problem, sim))
    finally:
        ops._C.sim_reverse_order(False)
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
    packed = ops.pack_mlp(spec, batched)
    assert torch.equal(packed, torch.stack([ops.pack_mlp(spec, theta) for theta in thetas]))
    bias = torch.stack([ops.fold_bias(spec, thetas[i], constant[t]) for t, i in enumerate(theta_index)])
    problem = dataclasses.replace(problem, bias=bias)
    together = Run(problem, backend, theta_index)
    hidden = together.apply(packed)
    for t, i in enumerate(theta_index):
        alone = Run(problem.select([t]), backend)
        assert same([alone.apply(packed[i : i + 1])[0], alone.params[0]], [hidden[t], together.params[t]])


# ---- Hostile gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", [F32, BF16], ids=["f32", "bf16"])
@SETS
def test_nan_counts_as_zero_and_inf_as_the_limit(backend: Backend, feature_set: str, grad_dtype: torch.dtype) -> None:
    problem = problem_of(feature_set, 16, SHORT, F32, grad_dtype)
    dirty, clean, counts = [], [], []
    for grad, limit in zip(problem.grads, problem.clip_limit, strict=True):
        bad = torch.zeros(grad.numel(), dtype=torch.int64)
        bad[::3], bad[1::7], bad[2::11] = 1, 2, 3  # NaN, Inf, -Inf; the first element of every tensor is a NaN
        bad = bad.view(grad.shape)
        # The limit itself is no bfloat16 number, so the clean gradient is a larger one, which is clipped to it.
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
    largest = max(float((new - old).abs().max()) for new, old in zip(results[1], start, strict=True) if new.numel())
    worst = max(float((x - y).abs().max()) for x, y in zip(*results, strict=True) if x.numel())
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
    _, feedback, x, _ = reference.apply(problem.spec, weights, param, param, mom, rms, row, 0.1, 1.0)
    columns = len(problem.spec.features.columns)
    folded = ops.fold_bias(problem.spec, weights, row.constant)
    torch.testing.assert_close(
        x[:, :columns] @ weights["mlp.w1"][:columns] + folded,
        x @ weights["mlp.w1"] + weights["mlp.b1"],
        rtol=0,
        atol=1e-12,
    )
    hidden = torch.relu(torch.relu(x @ weights["mlp.w1"] + weights["mlp.b1"]) @ weights["mlp.w2"] + weights["mlp.b2"])
    torch.testing.assert_close(ops.feedback(weights, hidden.mean(dim=0)[None])[0], feedback, rtol=0, atol=1e-12)


# ---- Wrong operands -------------------------------------------------------------------------------------------------


def plan_of(**changes: object) -> ops.Plan:
    """A plan over two tensors with some of its arguments replaced."""
    arguments = {
        "backend": "cpu",
        "feature_set": "compact",
        "params": [torch.zeros(4), torch.zeros(2, 3)],
        "mom": [torch.zeros(3, 4), torch.zeros(3, 6)],
        "rms": [torch.zeros(2, 4), torch.zeros(2, 6)],
    }
    return ops.Plan(**{**arguments, **changes})  # type: ignore[arg-type]


Z = torch.zeros
BAD_PLANS = [
    ({"backend": "tpu"}, ValueError, r"backend: expected one of \('cpu', 'cuda', 'sim'\), got 'tpu'"),
    ({"feature_set": "large"}, ValueError, r"feature_set: expected one of \['compact', 'paper'\], got 'large'"),
    ({"params": []}, ValueError, "params: expected at least one tensor, got none"),
    ({"params": [Z(4), Z(0)]}, ValueError, r"params\[1\]: empty; leave empty tensors out"),
    ({"params": [Z(4), Z(2, 3).double()]}, TypeError, r"params\[1\]: expected torch.float32 or torch.bfloat16, got "
     "torch.float64; convert it or use impl='reference'"),
    ({"params": [Z(4), Z(3, 2).T]}, ValueError, r"params\[1\]: expected a contiguous tensor, got strides \(1, 2\)"),
    ({"params": [Z(4), Z(2, 3, device="meta")]}, ValueError, r"params\[1\]: expected device cpu, got meta"),
    ({"params": [Z(4, device="meta"), Z(6)]}, ValueError, r"params\[0\]: on meta, which back end 'cpu' cannot reach"),
    ({"mom": [Z(3, 4)]}, ValueError, "mom: expected 2 entries, one for each tensor, got 1"),
    ({"mom": [Z(3, 4), Z(3, 6).bfloat16()]}, TypeError, r"mom\[1\]: expected torch.float32, got torch.bfloat16"),
    ({"mom": [Z(3, 5), Z(3, 6)]}, ValueError, r"mom\[0\]: expected 12 elements, got 15"),
    ({"rms": [Z(2, 4), Z(6, 2).T]}, ValueError, r"rms\[1\]: expected a contiguous tensor"),
    ({"rms": [Z(3, 4), Z(2, 6)]}, ValueError, r"rms\[0\]: expected 8 elements, got 12"),
    ({"theta_index": [0]}, ValueError, "theta_index: expected 2 entries, one for each tensor, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_PLANS)
def test_plan_names_what_is_wrong(changes: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan_of(**changes)


BAD_GRADS = [
    ([Z(4)], ValueError, "grads: expected 2 entries, one for each tensor, got 1"),
    ([Z(4), Z(6).half()], TypeError, r"grads\[1\]: expected torch.float32 or torch.bfloat16, got torch.float16"),
    ([Z(4), Z(5)], ValueError, r"grads\[1\]: expected 6 elements, got 5"),
    (
        [Z(4), Z(3, 2).T],
        ValueError,
        r"grads\[1\]: expected a contiguous tensor, got strides \(1, 2\); pass x.contiguous",
    ),
    ([Z(4), Z(6, device="meta")], ValueError, r"grads\[1\]: expected device cpu, got meta; all tensors must share one"),
]


@pytest.mark.parametrize(("grads", "kind", "message"), BAD_GRADS)
def test_set_tensors_names_what_is_wrong(grads: list[Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan_of().set_tensors([Z(4), Z(2, 3)], grads)


def test_operations_need_gradients_first() -> None:
    with pytest.raises(RuntimeError, match="grads: not known yet; call"):
        plan_of().accumulate(torch.ones(2))


BAD_ACCUMULATE = [
    (
        {"clip_limit": torch.ones(1)},
        r"clip_limit: expected float32 of shape \(2,\) on cpu, got torch.float32 of shape \(1,\)",
    ),
    ({"clip_limit": torch.ones(2).double()}, "clip_limit: expected float32 .* got torch.float64"),
    ({"clip_limit": torch.ones(2), "mom_decays": (0.9,)}, "mom_decays: expected 3 decays, got 1"),
    ({"clip_limit": torch.ones(2), "rms_decays": (0.9, 0.9, 0.9)}, "rms_decays: expected 2 decays, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ACCUMULATE)
def test_accumulate_names_what_is_wrong(arguments: dict[str, object], message: str) -> None:
    plan = plan_of()
    plan.set_tensors([Z(4), Z(2, 3)], [Z(4), Z(2, 3)])
    with pytest.raises(ValueError, match=message):
        plan.accumulate(**arguments)  # type: ignore[arg-type]


SIZE = ops._C.packed_weights(ops.FEATURE_SET_INDEX["compact"], 8)
BAD_APPLY = [
    (
        {"clip_limit": Z(3)},
        None,
        r"clip_limit: expected float32 of shape \(2,\) on cpu, got torch.float32 of shape \(3,\)",
    ),
    ({"scale": Z(2, 11)}, None, r"scale: expected float32 of shape \(2, 12\)"),
    ({"shift": Z(12)}, None, r"shift: expected float32 of shape \(2, 12\)"),
    ({"bias": Z(2, 7)}, None, r"bias: kernels exist for MLP widths \(8, 16, 32\), got 7; use impl='reference'"),
    ({"bias": Z(1, 8)}, None, r"bias: expected float32 of shape \(2, 8\)"),
    ({"step_size": Z(())}, None, r"step_size: expected float32 of shape \(2,\)"),
    ({"keep": Z(2).double()}, None, "keep: expected float32 .* got torch.float64"),
    ({"weights": Z(1, SIZE - 4)}, None, rf"weights: expected float32 \[num_theta, {SIZE}\] on cpu"),
    ({"weights": Z(1, SIZE).bfloat16()}, None, "weights: expected float32 .* got torch.bfloat16"),
    ({}, [0, 2], "theta_index: out of range for 2 rows of weights"),
    ({}, [-1, 0], "theta_index: out of range for 2 rows of weights"),
]


@pytest.mark.parametrize(("changes", "theta_index", "message"), BAD_APPLY)
def test_apply_names_what_is_wrong(changes: dict[str, Tensor], theta_index: list[int] | None, message: str) -> None:
    plan = plan_of(theta_index=theta_index)
    plan.set_tensors([Z(4), Z(2, 3)], [Z(4), Z(2, 3)])
    operands = {"clip_limit": Z(2), "scale": Z(2, 12), "shift": Z(2, 12), "bias": Z(2, 8), "step_size": Z(2)}
    operands |= {"keep": Z(2), "weights": Z(2, SIZE)}
    with pytest.raises(ValueError, match=message):
        plan.apply(**{**operands, **changes}, magnitude_rate=0.1, feature_clip=None)


@pytest.mark.skipif(ops._C.has_cuda, reason="lopt was built with CUDA")
def test_cuda_needs_a_build_with_cuda() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda': lopt was built without CUDA; rebuild with LOPT_CUDA=ON"):
        plan_of(backend="cuda")


def test_is_compiled() -> None:
    for feature_set in FEATURE_SETS:
        compiled = [width for width in range(1, 65) if ops.is_compiled(spec_of(feature_set, width))]
        assert tuple(compiled) == ops.WIDTHS


# ---- torch.library --------------------------------------------------------------------------------------------------

Operands = tuple[object, ...]


def library_operands(feature_set: str, device: torch.device) -> tuple[Operands, Operands]:
    """Fresh arguments of ``torch.ops.lopt.accumulate`` and ``torch.ops.lopt.apply``."""
    problem = problem_of(feature_set, 8, SHORT, BF16, F32)
    spec, conditioning = problem.spec, problem.conditioning
    state = [[x.to(device, copy=True) for x in getattr(problem, name)] for name in ("params", "grads", "mom", "rms")]
    limit = problem.clip_limit.to(device)
    rows = conditioning.scale, conditioning.shift, problem.bias, problem.step_size, problem.keep
    rows = (*rows, ops.pack_mlp(spec, problem.weights)[None])
    index = [0] * len(SHORT)
    constants = (index, spec.magnitude_rate, spec.feature_clip)
    return (feature_set, *state, limit), (feature_set, *state, limit, *(x.to(device) for x in rows), *constants)


@SETS
def test_opcheck(device: torch.device, feature_set: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    accumulate, apply = library_operands(feature_set, device)
    torch.library.opcheck(torch.ops.lopt.accumulate.default, accumulate)
    torch.library.opcheck(torch.ops.lopt.apply.default, apply)


@SETS
def test_library_operations_are_the_plan(device: torch.device, feature_set: str) -> None:
    accumulate, apply = library_operands(feature_set, device)
    stats = torch.ops.lopt.accumulate(*accumulate)
    hidden = torch.ops.lopt.apply(*apply)
    run = Run(problem_of(feature_set, 8, SHORT, BF16, F32), Backend(device.type, device))
    expected = outputs(run)
    _, params, _, mom, rms, *_ = apply
    assert same([stats, hidden, *params, *mom, *rms], expected)  # type: ignore[misc]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(device: torch.device, compiler: str) -> None:
    """One graph, the same bits as without a compiler."""

    def both(accumulate: Operands, apply: Operands) -> tuple[Tensor, Tensor]:
        stats = torch.ops.lopt.accumulate(*accumulate)
        return stats * 2.0, torch.ops.lopt.apply(*apply) + stats[:, :1]

    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    results = []
    for function in (both, compiled):
        accumulate, apply = library_operands("compact", device)
        results.append([*function(accumulate, apply), *apply[1], *apply[3], *apply[4]])  # type: ignore[misc]
    assert same(*results)
