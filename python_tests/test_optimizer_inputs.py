"""LearnedOptimizer: lr and its schedulers, losses and closures, NaN and Inf in gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import (
    IMPLS,
    PRESETS,
    assert_same_bits,
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
from torch.optim import lr_scheduler

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_preset = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


# ---- lr and schedulers -----------------------------------------------------------------------------------------------

EXTREME = [3e38, -3e38, 1e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1e20, math.inf, -math.inf, math.nan, 1.0]


@every_impl
@every_preset
@pytest.mark.parametrize("lr", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_lr_zero_changes_no_bit_of_any_parameter(impl: str, preset: str, lr: Any) -> None:
    values = torch.tensor(EXTREME)
    params = [Parameter(values), *(Parameter(v.clone()) for v in values), Parameter(values.bfloat16())]
    params += [*make_params(), Parameter(torch.randn(4, 3).mT)]
    before = [param.detach().clone() for param in params]
    opt = make_optimizer(params, impl, preset, lr=lr, weight_decay=0.5)
    run(opt, params, 3)
    assert_same_bits([param.detach() for param in params], before)
    assert int(opt.param_groups[0]["step"]) == 3


@every_impl
def test_lr_zero_in_one_group_only(impl: str) -> None:
    params, others = make_params(), make_params()
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.0, "weight_decay": 0.1}]
    opt, other = make_optimizer(groups, impl), make_optimizer(others, impl)
    run(opt, params, 1)
    run(other, others, 1)
    assert_same_bits(params[:3], others[:3])
    assert_same_bits(params[3:], make_params()[3:])
    assert_same_bits(opt.state_dict()["state"], other.state_dict()["state"])  # it still learns about its gradients


@every_impl
def test_lr_as_a_tensor(impl: str) -> None:
    everyone = [make_params() for _ in range(4)]
    rates: list[Any] = [0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64), torch.tensor(0.3)]
    optimizers = [make_optimizer(params, impl, lr=lr) for params, lr in zip(everyone[:3], rates, strict=False)]
    mixed = [{"params": everyone[3][:2]}, {"params": everyone[3][2:], "lr": 0.3}]
    for opt, params in zip([*optimizers, make_optimizer(mixed, impl, lr=rates[3])], everyone, strict=True):
        run(opt, params, 3)
    for params in everyone[1:]:
        assert_same_bits(params, everyone[0])


def _sequential(opt: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 5)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "lambda from zero": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(step / 4, 1.0)),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "sequential": _sequential,
    "warm restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 2.0, total_steps=9, cycle_momentum=False),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_scheduler(name: str, tensor_lr: bool) -> None:
    """The rates are those torch gives to SGD, and the parameters those of an optimizer whose lr is set by hand."""
    params, others, plain = make_params(), make_params(), make_params()
    lr: Any = torch.tensor(1.0) if tensor_lr else 1.0
    opt, other = make_optimizer(params, lr=lr), make_optimizer(others)
    sgd = torch.optim.SGD(plain, lr=1.0)
    scheduler, model = SCHEDULERS[name](opt), SCHEDULERS[name](sgd)
    rates = []
    for step in range(8):
        rate = sgd.param_groups[0]["lr"]
        assert float(opt.param_groups[0]["lr"]) == pytest.approx(rate, rel=1e-6)
        rates.append(rate)
        other.param_groups[0]["lr"] = float(opt.param_groups[0]["lr"])
        run(opt, params, 1, step)
        run(other, others, 1, step)
        sgd.step()
        for each in (scheduler, model):
            each.step(*([0.5] if name == "plateau" else []))
    assert_same_bits(params, others)
    assert len(set(rates)) > 2


# ---- Losses ----------------------------------------------------------------------------------------------------------

LOSSES = {
    "float": 2.0,
    "int": 2,
    "tensor": torch.tensor(2.0),
    "one element": torch.tensor([[2.0]]),
    "float64": torch.tensor(2.0, dtype=torch.float64),
    "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
    "int64": torch.tensor(2),
    "numpy": np.float32(2.0),
    "part of a graph": torch.tensor(1.0, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("way", ["loss", "observe", "closure"])
def test_forms_of_a_loss(kind: str, way: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    for step, scale in enumerate((1, 3)):
        set_grads(params, step)
        set_grads(others, step)
        loss = LOSSES[kind] * scale
        if way == "closure":
            assert opt.step(lambda loss=loss: loss) is loss
        elif way == "observe":
            opt.observe(train_loss=loss)
            opt.step()
        else:
            opt.step(loss=loss)
        other.step(loss=2.0 * scale)
    assert_same_bits(snapshot(opt), snapshot(other))
    assert other.param_groups[0]["train_loss"][2] == 2


NONFINITE = [math.nan, math.inf, -math.inf, 1e300, torch.tensor(math.nan), torch.tensor(math.inf).double()]


@every_impl
@every_preset
@pytest.mark.parametrize("loss", NONFINITE, ids=str)
def test_a_nonfinite_loss_counts_as_none(impl: str, preset: str, loss: Any) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl, preset), make_optimizer(others, impl, preset)
    for step in range(4):
        given = make_loss(step) if step % 2 else None  # also before any loss is known
        set_grads(params, step)
        set_grads(others, step)
        opt.observe(valid_loss=loss)
        opt.step(loss=loss if given is None else given)
        other.step(loss=given)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_observed_training_losses_are_averaged() -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    for step in range(3):
        for loss in (1.0, math.nan, 4.0 + step, torch.tensor(4.0)):
            opt.observe(train_loss=loss)
        set_grads(params, step)
        opt.step(loss=3.0 if step == 1 else None)
        set_grads(others, step)
        other.step(loss={0: 9.0 / 3, 1: 13.0 / 4, 2: 11.0 / 3}[step])
    torch.testing.assert_close(params, others, rtol=0, atol=1e-6)
    assert torch.equal(opt.param_groups[0]["pending_loss"], torch.zeros(2))


@pytest.mark.parametrize("before_the_first_step", [False, True])
def test_losses_computed_in_inference_mode(before_the_first_step: bool) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    if not before_the_first_step:
        run(opt, params, 1)
        run(other, others, 1)
    with torch.inference_mode():
        opt.observe(valid_loss=torch.tensor(1.0) * 2, train_loss=torch.tensor(1.0) * 3)
    other.observe(valid_loss=2.0, train_loss=3.0)
    run(opt, params, 2, 1)
    run(other, others, 2, 1)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_observe_may_get_both_losses_or_none() -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    opt.observe()
    opt.observe(train_loss=1.0, valid_loss=2.0)
    other.observe(valid_loss=2.0)
    other.observe(train_loss=1.0)
    set_grads(params, 0)
    set_grads(others, 0)
    opt.step()
    other.step()
    assert_same_bits(snapshot(opt), snapshot(other))


@every_impl
def test_closure(impl: str) -> None:
    """Evaluated once, with gradients enabled; its result is returned and its loss is used."""
    params, others = make_params([(4, 3), ()]), make_params([(4, 3), ()])
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (params[0].square().sum() - 1 + params[1]).square()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    for _ in range(3):
        with torch.no_grad():
            result = opt.step(closure)
        other.zero_grad()
        loss = (others[0].square().sum() - 1 + others[1]).square()
        loss.backward()
        other.step(loss=loss)
        assert same_bits(result, loss)
        assert result.requires_grad
    assert_same_bits(snapshot(opt), snapshot(other))
    assert calls == [True] * 3
    assert opt.step(lambda: None) is None


# ---- NaN and Inf in gradients ----------------------------------------------------------------------------------------


@every_impl
@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_gradients_are_counted_and_replaced(impl: str, preset: str, dtype: torch.dtype) -> None:
    params, others = make_params(), make_params()
    for param in params + others:
        param.grad_dtype = None
    opt, other = make_optimizer(params, impl, preset), make_optimizer(others, impl, preset)
    for step in range(4):
        for i, grad in enumerate(make_grads(params, step)):
            bad, good = grad.to(dtype), grad.to(dtype, copy=True)
            if step != 1 and i > 0:
                bad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
                good.view(-1)[:3] = torch.tensor([0.0, 1e4, -1e4])  # clipped
            params[i].grad, others[i].grad = bad, good
        opt.step(loss=make_loss(step))
        other.step(loss=make_loss(step))
        if step == 0:  # the first clip limit is 10
            decays = torch.tensor(opt.theta.spec.mom_decays)
            expected = torch.stack([0 * decays, 10 * (1 - decays), -10 * (1 - decays)], dim=1)
            torch.testing.assert_close(opt.state[params[1]]["mom"][:, :3], expected)
    assert int(opt.nonfinite_gradients) == 3 * 3 * 5
    assert int(other.nonfinite_gradients) == 0
    opt.nonfinite_gradients.zero_()
    after = snapshot(opt)
    assert_same_bits(after, snapshot(other))
    assert all(value.isfinite().all() for state in after["state"].values() for value in (state["mom"], state["rms"]))
    assert all(value.isfinite().all() for state in after["state"].values() for value in state["lstm"].values())


@every_impl
def test_gradients_of_nothing_but_nan(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    for param, zero in zip(params, others, strict=True):
        param.grad, zero.grad = torch.full_like(param, math.nan), torch.zeros_like(zero)
    opt.step(loss=1.0)
    other.step(loss=1.0)
    assert int(opt.nonfinite_gradients) == sum(param.numel() for param in params)
    assert_same_bits(params, others)


@every_impl
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_on_nonfinite_raise_changes_nothing(impl: str, value: float) -> None:
    params = make_params()
    opt = make_optimizer(params, impl, on_nonfinite="raise")
    run(opt, params, 2)
    opt.observe(train_loss=5.0)
    before = snapshot(opt)
    set_grads(params, 2)
    params[3].grad[0, 1, 2] = value
    with pytest.raises(FloatingPointError, match="1 NaN or Inf"):
        opt.step(loss=1.0)
    assert_same_bits(snapshot(opt), before)


@every_impl
def test_on_nonfinite_skip_leaves_the_step_out(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl, on_nonfinite="skip"), make_optimizer(others, impl, on_nonfinite="skip")
    run(opt, params, 2)
    run(other, others, 2)
    set_grads(params, 9)
    params[2].grad[:2] = math.nan
    assert opt.step(lambda: 7.0) == 7.0
    assert int(opt.nonfinite_gradients) == 6
    run(opt, params, 2, first=2)
    run(other, others, 2, first=2)
    opt.nonfinite_gradients.zero_()
    assert_same_bits(snapshot(opt), snapshot(other))
