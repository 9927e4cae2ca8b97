"""Statistics of the step before: their definition, one sweep on the CPU, agreement of all back ends, refusals."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import RANKS, Backend, same
from optimizer_cases import assert_same_bits, copies, make_grads, make_loss, make_params, make_theta, run
from torch import Tensor
from torch.nn import Parameter

from lopt import LearnedOptimizer, Theta, ops, reference, tensor_lstm
from lopt.benchmark import traffic
from lopt.features import STATS
from lopt.meta import engine
from lopt.theta import PRESETS, ThetaSpec

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
    shapes = tensor_lstm.Shapes.of(spec, [tuple(param.shape) for param in params], weights["initial_h"])
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


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@PRESET
def test_one_sweep_is_accumulate_and_apply(
    preset: str, state_dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """The same bits as the two operations one after the other, for any number of threads."""
    results: list[list[Tensor]] = []
    for threads, apart in ((1, True), (1, False), (2, False), (3, False)):
        set_num_threads(threads)
        params = make_params(((30_000,), (5, 4), (), (8193,)))
        opt = LearnedOptimizer(params, lagged(preset), state_dtype=state_dtype)
        run(opt, params, 1)
        if apart:  # as if every step were the first one of some other tensor
            for step in range(1, 4):
                opt._active.plan.some_first = True  # type: ignore[union-attr]
                run(opt, params, 1, first=step)
        else:
            run(opt, params, 3, first=1)
        state = [opt.state[param][name] for param in params for name in ("mom", "rms", "stats")]
        results.append([*(param.detach() for param in params), *state])
    assert all(same(results[0], other) for other in results[1:])


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
        ops.TensorLevel("cpu", theta, [(3,)], rows)
    params = [param.detach() for param in make_params()]
    state = reference.init_state(theta.spec, theta.tensors, params)
    with pytest.raises(ValueError, match="before: a theta with stats='lagged' needs the statistics"):
        reference.update(theta.spec, theta.tensors, state, params, params)
    with pytest.raises(ValueError, match="spec: the unroll engine computes with stats='current', got 'lagged'"):
        engine._check_stats(theta.spec)


def test_a_file_from_before_has_current_statistics() -> None:
    values = PRESETS["paper"].to_json()
    del values["stats"]
    assert ThetaSpec.from_json(values) == PRESETS["paper"]
    with pytest.raises(ValueError, match="missing fields"):
        ThetaSpec.from_json({name: value for name, value in values.items() if name != "mlp_width"})


def test_a_state_without_statistics_is_refused() -> None:
    params = make_params()
    old = LearnedOptimizer(params, make_theta("compact"))
    run(old, params, 1)
    opt = LearnedOptimizer(params, lagged("compact"))
    with pytest.raises(ValueError, match=rf"state\[0\]\['stats'\] expected shape \({len(STATS) + 6},\), found nothing"):
        opt.load_state_dict(old.state_dict())
