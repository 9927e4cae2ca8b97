"""Statistics of the step before: their definition, one sweep, agreement of all back ends, refusals."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from kernel_cases import (
    ALIGNED,
    BF16,
    F16,
    F32,
    RANKS,
    Backend,
    Problem,
    Run,
    problem_of,
    same,
    solve_accumulate,
    solve_apply,
)
from optimizer_cases import assert_same_bits, copies, make_grads, make_loss, make_params, make_theta, run
from torch import Tensor
from torch.nn import Parameter

from lopt import LearnedOptimizer, Theta, kernels
from lopt.benchmark import traffic
from lopt.rule import PRESETS, ThetaSpec, reference, tensor_lstm
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes

PRESET = pytest.mark.parametrize("preset", PRESETS)
IMPLS = pytest.mark.parametrize("impl", ["cpu", "sim", "reference"])


def lagged(preset: str) -> Theta:
    return make_theta(preset).with_spec(stats="lagged")


@PRESET
def test_the_second_step_sees_the_statistics_of_the_first(preset: str) -> None:
    theta, params = lagged(preset), [param.detach() for param in make_params()]
    spec, weights = theta.spec, theta.tensors
    state = reference.init_state(spec, weights, params)
    current = dataclasses.replace(spec, stats="current")
    zeros = torch.zeros(len(params), spec.features.num_stats)
    first = reference.update(spec, weights, state, params, make_grads(params, 0), before=zeros)
    own = reference.update(current, weights, state, params, make_grads(params, 0))
    assert_same_bits(first.params, own.params)  # a first step sees its own
    assert_same_bits(first.trace["kept"], first.trace["stats"])
    second = reference.update(
        spec, weights, first.state, first.params, make_grads(params, 1), before=first.trace["kept"]
    )
    shapes = Shapes.of(spec, [tuple(param.shape) for param in params], weights["initial_h"])
    _, _, conditioning, _ = tensor_lstm.advance(
        spec, weights, first.state.globals, first.state.rows, first.trace["stats"], shapes, None, torch.zeros(())
    )
    assert_same_bits(second.trace["conditioning"], conditioning)
    assert not torch.equal(second.trace["stats"], first.trace["stats"])


@PRESET
def test_five_steps_agree_with_the_float64_reference(backend: Backend, preset: str) -> None:
    """With tensors that join later; errors within 1e-4 of the largest update, as with current statistics."""
    theta = Theta.init(preset, seed=3).with_spec(step_multiplier=0.1, stats="lagged")
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator) for shape in (*RANKS, (31,), (1134,), (20_000,), (8193,))]
    results = []
    for impl, device, dtype in (
        (backend.name, backend.device, torch.float32),
        ("reference", torch.device("cpu"), torch.float64),
    ):
        params = [Parameter(x.to(device, dtype, copy=True)) for x in start]
        opt = LearnedOptimizer(params, theta, impl=impl)
        generator.manual_seed(5)
        for step in range(5):
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator)
                param.grad = grad.to(device, dtype) if step >= 2 or i % 3 else None
            opt.step(loss=1.0 / (1 + step))
        results.append([param.detach().cpu().double() for param in params])
    found, expected, before = (torch.cat([x.double().reshape(-1) for x in some]) for some in (*results, start))
    assert float((found - expected).abs().max()) <= 1e-4 * float((expected - before).abs().max())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@PRESET
def test_one_sweep_is_accumulate_and_apply(
    preset: str, state_dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """The same bits as the two operations one after the other, for any number of threads."""
    results: list[list[Tensor]] = []
    for threads, apart in ((1, True), (1, False), (2, False), (3, False)):
        set_num_threads(threads)
        results.append(steps(preset, state_dtype, apart, ((30_000,), (5, 4), (), (8193,))))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("precision", ["high", "fast"])
@PRESET
def test_one_sweep_on_tensor_cores_is_accumulate_and_apply(
    preset: str, precision: Literal["high", "fast"], state_dtype: torch.dtype
) -> None:
    """The same bits under sim, for aligned tensors and others."""
    shapes = ((12, 100), (5, 4), (), (1134,), (8200,))
    apart, one_sweep = (steps(preset, state_dtype, x, shapes, impl="sim", precision=precision) for x in (True, False))
    assert same(apart, one_sweep)


def steps(
    preset: str, state_dtype: torch.dtype, apart: bool, shapes: tuple[tuple[int, ...], ...], **options: Any
) -> list[Tensor]:
    """Parameters and state after three steps, of which the last two are one sweep or two."""
    params = make_params(shapes)
    opt = LearnedOptimizer(params, lagged(preset), state_dtype=state_dtype, **options)
    run(opt, params, 1)
    for step in (1, 2):
        opt._stepper.some_first = apart  # type: ignore[union-attr]  # as if it were the first of some other tensor
        run(opt, params, 1, first=step)
    return [*(p.detach() for p in params), *(opt.state[p][name] for p in params for name in ("mom", "rms", "stats"))]


# ---- The kernel of one sweep on CUDA ---------------------------------------------------------------------------------

KERNELS = pytest.mark.parametrize(
    "backend", ["sim", "sim-reverse", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
# Aligned and not, in windows of 128 and a few beyond, in several chunks.
SWEPT = ((128,), (5, 4), (), (1134,), (640,), (8193,), (8196,))


def sweep(problem: Problem, backend: Backend, precision: str, apart: bool = False) -> dict[str, list[Tensor]]:
    """All that one sweep writes, or the two operations one after the other."""
    one = Run(problem, backend, guard=ALIGNED, precision=precision)
    limit, step = problem.clip_limit.to(backend.device), torch.tensor(3, device=backend.device)
    if apart:
        stats, hidden = one.plan.accumulate(limit, step=step), one.plan.apply(*one.operands())
    else:
        one.plan.bind_accumulate(limit)
        one.plan.bind_apply(*one.operands())
        one.plan.set_step(step)
        stats, hidden = one.plan.sweep()
    one.check_guards()
    assert not one.plan.finished.any()
    return {"state": [*one.mom, *one.rms], "stats": [stats], "params": one.params, "hidden": [hidden]}


@KERNELS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("width", kernels.WIDTHS)
@PRESET
def test_a_sweep_of_many_tensors(backend: Backend, preset: str, width: int, precision: str, dtype: torch.dtype) -> None:
    """One launch; of parameters and gradients in each dtype. On a GPU rounding may differ in the last bits."""
    problem = problem_of(preset, width, SWEPT, dtype, dtype)
    halved = {name: [x.to(BF16 if dtype == BF16 else F32) for x in getattr(problem, name)] for name in ("mom", "rms")}
    problem = dataclasses.replace(problem, **halved)
    launches = kernels.module_of("sim").launches() if backend.name == "sim" else 0
    found = sweep(problem, backend, precision)
    if backend.name == "sim":
        assert kernels.module_of("sim").launches() - launches == 1
        expected = sweep(problem, backend, precision, apart=True)
        if precision == "exact":  # its threads add up other parameters
            torch.testing.assert_close(found.pop("hidden"), expected.pop("hidden"), rtol=2e-6, atol=1e-6)
        assert_same_bits(found, expected)
    if dtype != F32:
        return
    state = solve_accumulate(problem, torch.float64)
    exact = solve_apply(dataclasses.replace(problem, mom=state.mom, rms=state.rms), torch.float64)
    cpu = sweep(problem, Backend("cpu", torch.device("cpu")), precision)
    tolerance = 3e-2 if precision == "fast" else 2e-5
    for i, (param, x) in enumerate(zip(found["params"], exact.params, strict=True)):
        for other in (x, cpu["params"][i].reshape(-1).double()):
            assert float((param.cpu().reshape(-1) - other).abs().max()) <= tolerance * float(x.abs().max())


@KERNELS
@PRESET
def test_a_sweep_beyond_the_range_of_halves(backend: Backend, preset: str) -> None:
    """Windows of 128 that tensor cores cannot do are done in plain float, from the accumulators of this step."""
    problem = problem_of(preset, 16, ((1024,),))
    params, scale = [problem.params[0].clone()], problem.conditioning.scale.clone()
    params[0][128:256] *= 1e-3  # so that the last bits of their updates are seen
    params[0][5], params[0][300] = 1e7, -1e5
    scale[:, problem.spec.features.column_index("param")] = 1.0
    spec, conditioning = problem.spec, problem.conditioning._replace(scale=scale)
    spec = dataclasses.replace(spec, feature_clip=None)
    problem = dataclasses.replace(problem, spec=spec, params=params, conditioning=conditioning)
    high, exact = (sweep(problem, backend, precision) for precision in ("high", "exact"))
    assert same(high["state"], exact["state"])
    first, second = (found["params"][0].cpu().view(-1, 128) for found in (high, exact))
    torch.testing.assert_close(first[[0, 2]], second[[0, 2]], rtol=1e-6, atol=0)
    assert not torch.equal(first[1], second[1])  # on tensor cores


@PRESET
def test_back_ends_round_a_bfloat16_state_alike(preset: str) -> None:
    """As with current statistics, in first steps too: where float32 differs in its last bit, one rounding in 2^16 may
    go the other way, by one spacing."""
    results = []
    for impl in ("cpu", "sim", "reference"):
        params = make_params(((129, 33), (7,)))
        opt = LearnedOptimizer(params, lagged(preset), impl=impl, state_dtype=torch.bfloat16)
        run(opt, params, 3)
        results.append(torch.cat([opt.state[p][name].float().reshape(-1) for p in params for name in ("mom", "rms")]))
    for other in results[1:]:
        assert float((other != results[0]).double().mean()) < 1e-3
        assert float((other - results[0]).abs().max()) <= 2.0**-7 * float(results[0].abs().max())


@IMPLS
@PRESET
def test_resume_is_never_having_stopped(impl: str, preset: str) -> None:
    params = make_params()
    opt = LearnedOptimizer(params, lagged(preset), impl=impl)
    run(opt, params, 2)
    others = copies(params)
    other = LearnedOptimizer(others, lagged(preset), impl=impl)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    both = copy.deepcopy((params, opt))
    for these, optimizer in ((params, opt), (others, other), both):
        run(optimizer, these, 3, first=2)
    for these, optimizer in ((others, other), both):
        assert_same_bits(these, params)
        assert_same_bits(optimizer.state_dict(), opt.state_dict())


@IMPLS
def test_nonfinite_gradients_are_counted_once(impl: str) -> None:
    """A step late, but for the first."""
    params = make_params(((4,),))
    opt = LearnedOptimizer(params, lagged("compact"), impl=impl)
    counts = []
    for bad in (1, 2, 0, 0):
        grad = torch.ones(4)
        grad[:bad] = math.nan
        params[0].grad = grad
        opt.step(loss=make_loss(0))
        counts.append(int(opt.nonfinite_gradients))
    assert counts == [1, 1, 3, 3]


def test_bytes_of_one_sweep() -> None:
    for preset, bytes_moved in (("paper", 92), ("compact", 52)):
        counted = traffic.learned(preset, dataclasses.replace(PRESETS[preset], stats="lagged"))
        assert counted.step == counted.single_sweep == bytes_moved


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stats: expected 'current' or 'lagged', got 'old'"):
        ThetaSpec(stats="old")
    theta = lagged("compact")
    rows = tensor_lstm.init_rows(theta.spec, theta.tensors, 1)
    with pytest.raises(ValueError, match="theta: has stats='lagged', which this computation does not have"):
        kernels.TensorLevel("cpu", theta, [(3,)], rows)
    params = [param.detach() for param in make_params()]
    state = reference.init_state(theta.spec, theta.tensors, params)
    with pytest.raises(ValueError, match="before: a theta with stats='lagged' needs the statistics"):
        reference.update(theta.spec, theta.tensors, state, params, params)
    plan = Run(problem_of("compact", 8, ((3,),)), Backend("cpu", torch.device("cpu"))).plan
    with pytest.raises(RuntimeError, match=r"operands of accumulate: not known yet; call Plan\.bind_accumulate"):
        plan.sweep()


def test_a_file_from_before_has_current_statistics() -> None:
    values = PRESETS["paper"].to_json()
    del values["stats"]
    assert ThetaSpec.from_json(values) == PRESETS["paper"]
    with pytest.raises(ValueError, match="missing fields"):
        ThetaSpec.from_json({name: value for name, value in values.items() if name != "mlp_width"})


def test_a_state_without_statistics_is_refused() -> None:
    params = make_params()
    opt = LearnedOptimizer(params, lagged("compact"))
    run(opt, params, 1)
    old = opt.state_dict()
    old["state"] = {i: {k: v for k, v in state.items() if k != "stats"} for i, state in old["state"].items()}
    with pytest.raises(ValueError, match=rf"state\[0\]\['stats'\] expected shape \({len(STATS) + 6},\), found nothing"):
        opt.load_state_dict(old)
