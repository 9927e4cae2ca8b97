"""LearnedOptimizer: what a step does, on numbers. See also _inputs, _state, _errors and _models."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    IMPLS,
    PRESETS,
    Float64,
    assert_same_bits,
    copies,
    make_grads,
    make_loss,
    make_optimizer,
    make_params,
    run,
    same_bits,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

from lopt import kernels
from lopt.rule.features import RESTING

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_preset = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


# ---- Against the float64 reference and closed forms ------------------------------------------------------------------


@every_impl
@every_preset
def test_groups_with_their_own_lr_and_weight_decay(impl: str, preset: str) -> None:
    params = make_params()
    groups = [{"params": params[:2], "lr": 0.5, "weight_decay": 0.1}, {"params": params[2:5]}, {"params": params[5:]}]
    groups[2]["weight_decay"] = 0.3
    opt = make_optimizer(groups, impl, preset, lr=1.5)
    expected = Float64(preset, params)
    for step in range(6):
        set_grads(params, step)
        loss = make_loss(step) if step != 2 else None
        opt.step(loss=loss)
        expected.step(make_grads(params, step), loss, [0.5] * 2 + [1.5] * 4, [0.1] * 2 + [0.0] * 3 + [0.3])
    expected.assert_close(params)


@every_impl
def test_lr_in_closed_form(impl: str) -> None:
    """Two roundings of a parameter between 1 and 2 and a quarter of a third: at most 2.25 times 2^-24."""
    start, lr = make_params(), 0.25
    plain, scaled = copies(start), copies(start)
    run(make_optimizer(plain, impl), plain, 1)
    run(make_optimizer(scaled, impl, lr=lr), scaled, 1)
    for before, one, other in zip(start, plain, scaled, strict=True):
        torch.testing.assert_close(other.double(), before.double() - lr * (before.double() - one), rtol=0, atol=1.5e-7)


@every_impl
@every_preset
def test_add_param_group_later(impl: str, preset: str) -> None:
    params = make_params()
    opt, expected = make_optimizer(params[:3], impl, preset), Float64(preset, params[:3])
    for step in range(3):
        set_grads(params[:3], step)
        opt.step(loss=make_loss(step))
        expected.step(make_grads(params[:3], step), make_loss(step))
    before = snapshot(opt)["state"]
    opt.add_param_group({"params": params[3:], "lr": 0.5})
    assert_same_bits({index: opt.state_dict()["state"][index] for index in before}, before)
    expected.add(params[3:])
    for step in range(3, 6):
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        expected.step(make_grads(params, step), make_loss(step), [1.0] * 3 + [0.5] * 3)
    expected.assert_close(params)
    assert set(opt.state) == set(params)


def test_a_parameter_may_change_its_group() -> None:
    params = make_params()
    opt, expected = (
        make_optimizer([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}]),
        Float64("compact", params),
    )
    for step in range(4):
        if step == 2:
            first, second = (group["params"] for group in opt.param_groups)
            second.insert(0, first.pop())
        set_grads(params, step)
        opt.step()
        expected.step(make_grads(params, step), None, [1.0, 1.0, 1.0 if step < 2 else 0.5, 0.5, 0.5, 0.5])
    expected.assert_close(params)


@every_impl
@every_preset
def test_no_loss_ever(impl: str, preset: str) -> None:
    params = make_params()
    opt, expected = make_optimizer(params, impl, preset), Float64(preset, params)
    for step in range(4):
        set_grads(params, step)
        assert opt.step() is None
        expected.step(make_grads(params, step))
    expected.assert_close(params)


@every_impl
@every_preset
def test_validation_losses(impl: str, preset: str) -> None:
    params = make_params()
    opt, expected = make_optimizer(params, impl, preset), Float64(preset, params)
    for step in range(6):
        if step in (0, 3, 4):
            opt.observe(valid_loss=make_loss(step) + 0.4)
            expected.observe_valid(make_loss(step) + 0.4)
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        expected.step(make_grads(params, step), make_loss(step))
    expected.assert_close(params)
    assert int(opt.param_groups[0]["step"]) == (9 if preset == "paper" else 6)  # the port counts a validation as a step
    other = copies(make_params())
    run(make_optimizer(other, impl, preset), other, 6)
    assert not same_bits(other[2], params[2])


def test_precision_is_that_of_the_cuda_kernels() -> None:
    """Steps of 512 parameters, which tensor cores take, warm-up included; those of the CPU are the same in both."""
    updates = {}
    for impl, precision in itertools.product(("cpu", "sim"), ("high", "fast")):
        param = Parameter(torch.linspace(-1.0, 1.0, 512))
        opt = make_optimizer([param], impl=impl, precision=precision)
        for step in range(1, 13):
            param.grad = torch.sin(step * torch.arange(512.0))
            opt.step()
        updates[impl, precision] = param.detach() - torch.linspace(-1.0, 1.0, 512)
    assert torch.equal(updates["cpu", "high"], updates["cpu", "fast"])
    largest = updates["cpu", "high"].abs().max()
    off = {
        precision: (updates["sim", precision] - updates["cpu", "high"]).abs().max() for precision in ("high", "fast")
    }
    assert off["high"] < 1e-5 * largest < off["fast"] < 1e-2 * largest


def test_total_steps_reaches_a_theta_with_horizon_input() -> None:
    params, others, paper = make_params(), make_params(), make_params()
    run(make_optimizer(params, total_steps=4), params, 2)
    run(make_optimizer(others), others, 2)
    assert not same_bits(params[2], others[2])
    run(make_optimizer(paper, preset="paper", total_steps=4), paper, 2)
    others = make_params()
    run(make_optimizer(others, preset="paper"), others, 2)
    assert_same_bits(paper, others)  # no horizon input: the hint is ignored


@pytest.mark.parametrize("preset", PRESETS)
def test_float64_is_the_reference(preset: str) -> None:
    params = [Parameter(param.detach().double()) for param in make_params()]
    opt, expected = make_optimizer(params, "reference", preset, lr=0.3), Float64(preset, params)
    for step in range(4):
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        expected.step(make_grads(params, step), make_loss(step), 0.3)
    expected.assert_close(params, 1e-14)
    assert opt.state[params[0]]["mom"].dtype == torch.float64


# ---- Which tensors take part -----------------------------------------------------------------------------------------


@every_impl
def test_missing_gradients_empty_and_frozen_parameters_are_left_out(impl: str) -> None:
    params = make_params()
    kept, missing = [params[0], params[2], params[4]], [params[1], params[3]]
    empty = [Parameter(torch.empty(0)), Parameter(torch.empty(3, 0, 2))]
    frozen = Parameter(torch.ones(4), requires_grad=False)
    opt = make_optimizer([params[0], empty[0], params[1], params[2], frozen, params[3], empty[1], params[4]], impl)
    alone = copies(kept)
    other = make_optimizer(alone, impl)
    before = [param.detach().clone() for param in missing]
    for step in range(3):
        set_grads(kept, step)
        for param in empty:
            param.grad = torch.zeros_like(param)
        opt.step(loss=make_loss(step))
    run(other, alone, 3)
    assert_same_bits(kept, alone)
    assert_same_bits([param.detach() for param in missing], before)
    assert set(opt.state) == {*kept, *empty}  # distributed checkpoints want a state for whatever has a gradient
    assert [tuple(opt.state[param]["mom"].shape[1:]) for param in empty] == [(0,), (3, 0, 2)]


@every_impl
def test_a_gradient_that_pauses_leaves_its_state_alone(impl: str) -> None:
    params = make_params()
    opt = make_optimizer(params, impl)
    run(opt, params, 2)
    before = snapshot(opt)
    set_grads(params, 2)
    params[1].grad = params[4].grad = None
    opt.step()
    after = snapshot(opt)
    for index in (1, 4):
        assert_same_bits(after["state"][index], before["state"][index])
        assert same_bits(after["params"][index], before["params"][index])
    run(opt, params, 1, first=3)
    updates = [int(opt.state[param]["lstm"]["updates"]) for param in params]
    assert updates == [4, 3, 4, 4, 3, 4]


@every_impl
def test_a_tensor_without_gradient_does_not_drift(impl: str) -> None:
    """Gradients of zeros, as of dead units: in the first step, or after others, and whatever the momenta are."""
    params = make_params()
    opt = make_optimizer(params, impl)
    for step in range(4):
        before = [param.detach().clone() for param in params]
        set_grads(params, step)
        still = {0: {0, 2}, 2: {1, 2}}.get(step, set())
        for index in still:
            params[index].grad = torch.zeros_like(params[index])
        opt.step(loss=make_loss(step))
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            assert same_bits(param.detach(), old) == (index in still), (step, index)


@every_impl
def test_a_parameter_without_gradient_rests(impl: str) -> None:
    """Rows of an embedding: one used always, one in the first step, one in the first and again later, one never."""
    table = torch.nn.Parameter(make_params()[0].detach().new_full((4, 40), 0.1))
    opt = make_optimizer([table], impl)
    moved = []
    for step in range(280):
        table.grad = torch.zeros_like(table)
        used = [0] + [1] * (step == 0) + [2] * (step in (0, 270))
        table.grad[used] = torch.linspace(0.5, -0.4, 40, dtype=table.dtype)
        before = table.detach().clone()
        opt.step(loss=make_loss(step))
        moved.append((table.detach() != before).any(dim=1).tolist())
    always, once, twice, never = zip(*moved, strict=True)
    awake = [0.05 / 0.001 * (0.95 / 0.999) ** step > RESTING for step in range(280)]  # shares of one gradient
    assert awake.index(False) == 261
    assert all(always)
    assert not any(never)
    assert list(once) == awake
    assert list(twice) == [*awake[:270], *[True] * 10]


@every_impl
def test_a_step_without_any_gradient_changes_nothing_and_keeps_the_loss(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    before = [param.detach().clone() for param in params]
    opt.step(loss=3.0)
    assert_same_bits([param.detach() for param in params], before)
    assert int(opt.param_groups[0]["step"]) == 0
    set_grads(params, 0)
    opt.step(loss=1.0)
    set_grads(others, 0)
    other.step(loss=2.0)  # the mean of 3 and 1
    assert_same_bits(snapshot(opt), snapshot(other))


def _buffer(param: Tensor) -> Tensor:
    """The same values as an unaligned slice of a larger buffer."""
    return torch.nn.functional.pad(param.reshape(-1), (3, 2))[3:-2].view_as(param)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "reversed": lambda x: x.permute(tuple(range(x.dim()))[::-1]).contiguous().permute(tuple(range(x.dim()))[::-1]),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone(),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x.clone(),
    "slice": _buffer,
    "negative view": lambda x: torch._neg_view(-x),
}


@every_impl
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["param", "grad", "both"])
def test_layout_of_memory_does_not_matter(impl: str, layout: str, of: str) -> None:
    plain = make_params()
    if layout == "negative view":  # which parameters never are
        of = "grad"
    arrange = LAYOUTS[layout]
    params = [Parameter(arrange(param.detach())) if of != "grad" else param for param in copies(plain)]
    opt, other = make_optimizer(params, impl), make_optimizer(plain, impl)
    strides = [param.stride() for param in params]
    for step in range(3):
        set_grads(plain, step)
        for param, grad in zip(params, make_grads(plain, step), strict=True):
            param.grad = arrange(grad) if of != "param" else grad
        opt.step(loss=make_loss(step))
        other.step(loss=make_loss(step))
    assert_same_bits(snapshot(opt), snapshot(other))
    assert [param.stride() for param in params] == strides


@every_impl
def test_expanded_gradient(impl: str) -> None:
    params, others = make_params([(4, 6)]), make_params([(4, 6)])
    params[0].grad = torch.tensor(0.5).expand(4, 6)
    others[0].grad = torch.full((4, 6), 0.5)
    make_optimizer(params, impl).step()
    make_optimizer(others, impl).step()
    assert_same_bits(params, others)


@every_impl
def test_memory_may_move_and_change_its_format_between_steps(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    layouts = [torch.clone, LAYOUTS["channels_last"], LAYOUTS["strided"], torch.clone]
    for step, arrange in enumerate(layouts):
        for param in params:
            param.data = arrange(param.data)
        set_grads(params, step)
        opt.step(loss=make_loss(step))
    run(other, others, 4)
    assert_same_bits(params, others)


# ---- Dtypes ----------------------------------------------------------------------------------------------------------


@every_impl
@every_preset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_16_bits_are_computed_in_float32(impl: str, preset: str, dtype: torch.dtype) -> None:
    half = [Parameter(param.detach().to(dtype)) for param in make_params()]
    single = [Parameter(param.detach().float()) for param in half]
    opt, other = make_optimizer(half, impl, preset), make_optimizer(single, impl, preset)
    for step in range(4):
        set_grads(half, step)
        for param, exact in zip(half, single, strict=True):
            exact.data, exact.grad = param.detach().float(), param.grad.float()
        opt.step(loss=make_loss(step))
        other.step(loss=make_loss(step))
        assert_same_bits(half, [param.detach().to(dtype) for param in single])
    assert all(opt.state[param]["mom"].dtype == torch.float32 for param in half)


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_and_parameter_may_differ_in_dtype_and_between_steps(impl: str, dtype: torch.dtype) -> None:
    half = [Parameter(param.detach().to(dtype)) for param in make_params()]
    mixed = [Parameter(param.detach().clone()) for param in half]
    single, coarse = make_params(), make_params()
    optimizers = [make_optimizer(params, impl) for params in (half, mixed, single, coarse)]
    for step in range(4):
        for i, grad in enumerate(make_grads(single, step)):
            rounded = grad.to(dtype)
            half[i].grad, single[i].grad = rounded, rounded.float()
            mixed[i].grad_dtype = coarse[i].grad_dtype = None  # any
            mixed[i].grad = rounded.float() if step % 2 == 0 else rounded
            coarse[i].grad = rounded if step < 2 else rounded.float()
        for opt in optimizers:
            opt.step(loss=make_loss(step))
    assert_same_bits(mixed, half)
    assert_same_bits(coarse, single)


@every_impl
def test_default_dtype_and_autocast_do_not_matter(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl, lr=0.3)
    opt.param_groups[0]["lr"] = 0.3
    run(other, others, 3)
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        set_grads(params, step)
        torch.set_default_dtype(dtype)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                opt.step(loss=make_loss(step))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same_bits(params, others)


# ---- The machine under it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3000])
def test_one_call_whatever_the_number_of_tensors(number: int, monkeypatch: Any) -> None:
    calls, original = [], kernels._C.step

    def call(*arguments: Any, **place: Any) -> Any:
        calls.append(arguments[0])
        return original(*arguments, **place)

    monkeypatch.setattr(kernels._C, "step", call)
    params = make_params([(2,)] * number)
    opt = make_optimizer(params)
    run(opt, params, 2)
    assert calls == ["cpu"] * 2


def test_two_optimizers_are_independent() -> None:
    params, others = make_params(), make_params(seed=5)
    alone, alone_too = copies(params), copies(others)
    opt, other = make_optimizer(params), make_optimizer(others)
    for step in range(3):
        run(opt, params, 1, step)
        run(other, others, 1, step + 50)
    run(make_optimizer(alone), alone, 3)
    run(make_optimizer(alone_too), alone_too, 3, 50)
    assert_same_bits(params, alone)
    assert_same_bits(others, alone_too)


@every_impl
def test_autograd_notices_that_parameters_changed(impl: str) -> None:
    params = make_params([(3, 4)])
    opt = make_optimizer(params, impl)
    loss = params[0].square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_impl
def test_gradients_are_not_kept_alive(impl: str) -> None:
    params = make_params()
    opt = make_optimizer(params, impl)
    set_grads(params, 0)
    references = [weakref.ref(param.grad) for param in params]
    opt.step()
    opt.zero_grad()
    assert all(reference() is None for reference in references)
