"""float16 parameters and gradients: conversions bit by bit, mixed dtypes, overflow, GradScaler."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_cases import ALIGNED, BF16, F16, F32, GUARD, Backend, Run, problem_of
from optimizer_cases import (
    assert_same_bits,
    make_grads,
    make_loss,
    make_optimizer,
    make_params,
    run,
    same_bits,
    snapshot,
)
from torch import Tensor, nn
from torch.nn import Parameter

from lopt import kernels

every_impl = pytest.mark.parametrize("impl", ["cpu", "sim", "reference"])
LARGEST = 65504.0

# ---- Conversions ----------------------------------------------------------------------------------------------------


def float32_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(F32)


def hard_floats() -> Tensor:
    """Every float16, the middle of every two neighbours, the floats beside both, and random bits; finite."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(F16).float()
    middles = (halves[:-1].double() + halves[1:].double()).div(2).float()  # exact: 12 bits
    around = torch.cat([halves, middles, torch.tensor([65519.0, 65520.0, 65536.0, 1e6, 3e38, 2.0**-25, 1e-45, 1e-40])])
    bits = around.view(torch.int32).long()
    bits = torch.cat([bits - 1, bits, bits + 1]).clamp(min=0)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randint(0x33000000, 0x47800000, (60_000,), generator=generator)  # 2^-25 to 65536
    any_bits = torch.randint(0, 0x7F800000, (20_000,), generator=generator)
    found = float32_of(torch.cat([bits, normal, any_bits]))
    assert bool(found.isfinite().all())
    return torch.cat([found, -found])


@pytest.mark.parametrize("guard", [GUARD, ALIGNED])
def test_every_float16_is_read_as_the_float_it_is(backend: Backend, guard: int) -> None:
    """As a gradient: momenta that forget everything are the gradient, without NaN and with Inf as the clip limit."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    one = problem_of("compact", 8, ((len(values),),))
    problem = dataclasses.replace(
        one, grads=[values], params=[values.clone()], mom=[torch.zeros_like(one.mom[0])], clip_limit=torch.tensor([1e9])
    )
    run_ = Run(problem, backend, guard=guard)
    clip_limit = problem.clip_limit.to(backend.device)
    run_.plan.accumulate(clip_limit, [0.0] * len(one.spec.mom_decays), one.spec.rms_decays)
    run_.check_guards()
    expected = values.float().nan_to_num(nan=0.0, posinf=1e9, neginf=-1e9)
    for mom in run_.mom[0].cpu():
        assert torch.equal(mom, expected)


def writing(values: Tensor, param: Tensor) -> Any:
    """A problem in which ``apply`` makes the first momentum the parameter, and changes nothing else."""
    one = problem_of("paper", 8, ((len(values),),))
    spec = dataclasses.replace(one.spec, linear_skip=True, feature_clip=None)
    zeros = {name: torch.zeros(shape) for name, shape in spec.shapes().items()}
    zeros["skip"][spec.features.column_index("mom0")] = 1.0
    scale = torch.ones_like(one.conditioning.scale)
    return dataclasses.replace(
        one,
        spec=spec,
        weights=zeros,
        params=[param],
        grads=[torch.zeros(len(values))],
        mom=[torch.cat([values[None], torch.zeros(len(spec.mom_decays) - 1, len(values))])],
        rms=[torch.ones(len(spec.rms_decays), len(values))],
        conditioning=one.conditioning._replace(scale=scale, shift=torch.zeros_like(scale)),
        bias=torch.zeros_like(one.bias),
        step_size=-torch.ones(1),
        keep=torch.zeros(1),
    )


@pytest.mark.parametrize("guard", [GUARD, ALIGNED])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_values_are_written_as_torch_rounds_them(backend: Backend, dtype: torch.dtype, guard: int) -> None:
    """To nearest, ties to even, with subnormal numbers, and float16 from 65520 on to infinity."""
    values = hard_floats()
    one = Run(writing(values, torch.zeros(len(values), dtype=dtype)), backend, guard=guard, precision="exact")
    one.apply()
    one.check_guards()
    kept = values.abs() <= 3.3895313892515355e38  # what is beyond is not made
    expected = torch.where(kept, values, 0.0).to(dtype)
    found = one.params[0].cpu()
    # 0 added to -0 is 0: the sign of a zero is that of a sum.
    assert same_bits(found + 0.0, expected + 0.0)


@pytest.mark.parametrize("flush", [False, True])
def test_flushing_subnormal_numbers_changes_no_float16(backend: Backend, flush: bool) -> None:
    """``torch.set_flush_denormal`` is about float32, in which no float16 is subnormal."""
    values = torch.tensor([2.0**-24, 3 * 2.0**-24, -(2.0**-20), 2.0**-14, 1.0])
    problem = writing(values, torch.zeros(5, dtype=F16))
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot flush")
    try:
        one = Run(problem, backend)
        one.apply()
    finally:
        torch.set_flush_denormal(False)
    assert one.params[0].cpu().tolist() == values.tolist()


# ---- Mixed dtypes ---------------------------------------------------------------------------------------------------

MIXED = (F16, BF16, F32, F16, F32, BF16)


def mixed_params() -> list[Parameter]:
    return [Parameter(param.detach().to(dtype)) for param, dtype in zip(make_params(), MIXED, strict=True)]


def set_mixed_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """A gradient of another dtype for each second parameter; returns all of them."""
    grads = make_grads(params, step)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        grads[i] = grad.to(MIXED[(i + step) % len(MIXED)] if i % 2 else MIXED[i])
        param.grad_dtype = None  # type: ignore[attr-defined]
        param.grad = grads[i]
    return grads


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("stats", ["current", "lagged"])
@pytest.mark.parametrize("preset", ["compact", "spectral", "paper"])
def test_mixed_dtypes_are_the_reference(preset: str, stats: Any, average: bool) -> None:
    """Each step from the same start: the same number of float16 or bfloat16, or a neighbour where a tie was near."""
    for step in range(3):
        found = []
        for impl in ("reference", "cpu", "sim"):
            params = mixed_params()
            opt = make_optimizer(params, "reference", preset, average=average)
            opt.theta = opt.theta.with_spec(stats=stats)
            for before in range(step):
                set_mixed_grads(params, before)
                opt.step(loss=make_loss(before))
            other = make_optimizer(params, impl, preset, average=average)
            other.theta = opt.theta
            other.load_state_dict(opt.state_dict())
            set_mixed_grads(params, step)
            other.step(loss=make_loss(step))
            found.append([param.detach().clone() for param in params])
            if average:
                for param in params:
                    assert other.state[param]["average"].dtype == F32
        for kernel in found[1:]:
            for param, expected in zip(kernel, found[0], strict=True):
                assert param.dtype == expected.dtype
                eps = torch.finfo(param.dtype).eps
                bound = 2e-6 + (0.0 if param.dtype == F32 else eps * expected.double().abs())
                assert bool(((param.double() - expected.double()).abs() <= bound).all())
                if param.dtype != F32:  # a tie is rare
                    assert float((param != expected).double().mean()) < 0.02


@every_impl
def test_resumes_bit_for_bit(impl: str) -> None:
    params, others = mixed_params(), mixed_params()
    opt, other = make_optimizer(params, impl, average=True), make_optimizer(others, impl, average=True)
    for step in range(3):
        set_mixed_grads(params, step)
        opt.step(loss=make_loss(step))
    for param, twin in zip(params, others, strict=True):
        twin.data.copy_(param.detach())
    other.load_state_dict(opt.state_dict())
    for each, its in ((opt, params), (other, others)):
        for step in range(3, 6):
            set_mixed_grads(its, step)
            each.step(loss=make_loss(step))
    assert_same_bits(snapshot(other), snapshot(opt))
    with opt.averaged():
        for param in params:
            assert same_bits(param.detach(), opt.state[param]["average"].to(param.dtype))


# ---- Overflow -------------------------------------------------------------------------------------------------------


@every_impl
def test_an_update_beyond_the_range_makes_infinity_and_the_tensor_rests(impl: str) -> None:
    """As in torch's optimizers; no other tensor notices, and float32 and bfloat16 go on."""
    start = torch.tensor([60000.0, -60000.0, 1.0, 0.0])
    params = [Parameter(start.to(dtype)) for dtype in (F16, F32, BF16)]
    opt = make_optimizer(params, impl, "paper", lr=1e6)
    for param in params:
        param.grad = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=param.dtype)
    opt.step(loss=1.0)
    half, single, brain = (param.detach().clone() for param in params)
    assert float(single.abs().max()) > 65520.0
    assert_same_bits(half, single.half())
    assert bool(half.isinf().any())
    assert bool(brain.isfinite().all())
    assert int(opt.nonfinite_parameters) == 0
    run(opt, params, 2)
    assert_same_bits(params[0].detach(), half)
    assert int(opt.nonfinite_parameters) == 2
    assert bool((params[1] != single).all())
    for state in opt.state_dict()["state"].values():
        assert all(bool(value.isfinite().all()) for value in (state["mom"], state["rms"]))


# ---- GradScaler -----------------------------------------------------------------------------------------------------


def model_in(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def loss_of(model: nn.Module, i: int) -> Tensor:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(i))
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), (x[:, :3].sum(dim=1) > 0).long())


@every_impl
def test_a_scaled_loop_is_the_plain_one(impl: str) -> None:
    """To rounding: scaled by 2^10, small gradients keep bits that float16 has not for them otherwise."""
    results = []
    for scale in (None, 1024.0):
        model = model_in(F16)
        opt = make_optimizer(model.parameters(), impl, maximize=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for i in range(8):
            opt.zero_grad()
            loss = loss_of(model, i)
            scaler.scale(loss).backward()
            scaler.step(opt, loss=loss)
            scaler.update()
        assert not hasattr(opt, "grad_scale")
        results.append(torch.cat([param.detach().double().reshape(-1) for param in model.parameters()]))
    start = torch.cat([param.detach().double().reshape(-1) for param in model_in(F16).parameters()])
    plain, scaled = results[0] - start, results[1] - start
    assert float((scaled - plain).norm()) <= 0.01 * float(plain.norm())


def copies_in(model: nn.Module, dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(param.detach().to(dtype)) for param in model.parameters()]


@every_impl
def test_the_step_divides_float16_gradients_into_float32(impl: str) -> None:
    """Gradients below the smallest float16 arrive: bits of the same step with them in float32."""
    generator = torch.Generator().manual_seed(3)
    halves = [Parameter((0.3 * torch.randn(s, generator=generator)).half()) for s in ((5, 4), (4,))]
    others = [Parameter(param.detach().clone()) for param in halves]
    opt, other = make_optimizer(halves, impl), make_optimizer(others, impl)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)
    scaler.scale(torch.ones(()))
    for step in range(5):
        for param, twin in zip(halves, others, strict=True):
            grad = (1e-2 * torch.randn(param.shape, generator=generator)).half()
            twin.grad_dtype = None  # type: ignore[attr-defined]
            param.grad, twin.grad = grad, grad.float() / 2**16
            assert float(twin.grad.half().float().sub(twin.grad).abs().max()) > 0
        assert scaler.step(opt, loss=make_loss(step)) is None
        scaler.update()
        other.step(loss=make_loss(step))
        if step == 2:  # and a step without the scaler between two with it
            for each, params in ((opt, halves), (other, others)):
                for param in params:
                    param.grad = torch.full_like(param, 0.25)
                each.step(loss=1.0)
    assert_same_bits(snapshot(opt), snapshot(other))


@every_impl
def test_a_step_with_inf_is_left_out_and_the_scale_falls(impl: str) -> None:
    model = model_in(F16)
    opt = make_optimizer(model.parameters(), impl)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (math.inf, math.nan):
        opt.zero_grad()
        loss = loss_of(model, 0)
        scaler.scale(loss).backward()
        first = next(model.parameters()).grad
        assert first is not None
        first[0] = bad
        before, scale = snapshot(opt), scaler.get_scale()
        assert scaler.step(opt, loss=loss) is None
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert_same_bits(snapshot(opt), before)


def test_other_gradients_are_unscaled_by_the_scaler() -> None:
    """In place, as for any optimizer; and so they can be clipped before the step."""
    model = model_in(F32)
    opt = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaled = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    scaler.unscale_(opt)
    for param, grad in zip(model.parameters(), scaled, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad / 1024)


def test_maximize_with_scaled_float16_gradients() -> None:
    model, other = model_in(F16), model_in(F16)
    for each, sign in ((model, 1.0), (other, -1.0)):
        opt = make_optimizer(each.parameters(), maximize=sign < 0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(3):
            opt.zero_grad()
            scaler.scale(sign * loss_of(each, i)).backward()
            scaler.step(opt)
            scaler.update()
    assert_same_bits([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])


# ---- Refused --------------------------------------------------------------------------------------------------------


def test_a_state_is_never_float16() -> None:
    params, states = [torch.zeros(4)], ([torch.zeros(3, 4).half()], [torch.zeros(2, 4).half()])
    with pytest.raises(
        TypeError, match=r"mom\[0\]: expected torch.float32 or torch.bfloat16 or torch.int8, got torch.float16"
    ):
        kernels.Plan("cpu", "compact", params, *states)
