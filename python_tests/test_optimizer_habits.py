"""LearnedOptimizer in scripts written for others: learning rates, closures, losses of micro-batches, no silent harm."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    IMPLS,
    assert_same_bits,
    copies,
    make_loss,
    make_optimizer,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.optim import lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

from lopt.optimizer import LearnedOptimizer
from lopt.options import effective_lr
from lopt.rule import Theta

every_impl = pytest.mark.parametrize("impl", IMPLS)
a_rate = pytest.warns(UserWarning, match="LearnedOptimizer has no learning rate, its lr is a multiplier")


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


def without_peaks(state: Any) -> Any:
    """A snapshot without what differs between a rate and the multiplier it is read as."""
    groups = [{k: v for k, v in g.items() if k not in ("lr", "peak_lr", "initial_lr")} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def warmup_and_cosine(step: int, peak: float = 1e-3, warmup: int = 3, steps: int = 10) -> float:
    """As training loops write it into the groups."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / (steps - warmup)
    return 0.1 * peak + 0.45 * peak * (1.0 + math.cos(math.pi * share))


# ---- Learning rates --------------------------------------------------------------------------------------------------


@every_impl
def test_a_constant_rate_is_no_rate(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl, lr=1e-3), make_optimizer(others, impl)
    with a_rate as record:
        run(opt, params, 3)
    run(other, others, 3)
    assert_same_bits(without_peaks(snapshot(opt)), without_peaks(snapshot(other)))
    assert len(record) == 1
    assert record[0].filename.endswith("optimizer_cases.py")  # the line that called step
    assert "lr=0.001 in param_groups [0]" in str(record[0].message)


@every_impl
def test_a_schedule_of_rates_is_one_of_multipliers(impl: str) -> None:
    """Relative to the highest so far, in each group: a warm-up is as good as none, a decline is one."""
    params, others = make_params(), make_params()
    opt = make_optimizer([{"params": params[:2]}, {"params": params[2:]}], impl)
    other = make_optimizer([{"params": others[:2]}, {"params": others[2:]}], impl)
    highest = 0.0
    with a_rate as record:
        for step in range(10):
            rate = warmup_and_cosine(step)
            highest = max(highest, rate)
            opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = rate, 0.5 * rate
            for group in other.param_groups:
                group["lr"] = rate / highest
            run(opt, params, 1, step)
            run(other, others, 1, step)
    assert len(record) == 1  # for both groups
    assert "lr=0.00025 in param_groups [0]; lr=0.000125 in param_groups [1]" in str(record[0].message)
    assert [group["peak_lr"] for group in opt.param_groups] == [highest, 0.5 * highest]
    assert other.param_groups[0]["peak_lr"] == 0.0
    assert effective_lr(opt.param_groups[0]) < 0.2
    assert_same_bits(without_peaks(snapshot(opt)), without_peaks(snapshot(other)))


def test_a_schedule_of_rates_resumes_where_it_was() -> None:
    params = make_params()
    opt = make_optimizer(params)
    with a_rate:
        for step in range(8):
            opt.param_groups[0]["lr"] = warmup_and_cosine(step)
            run(opt, params, 1, step)
            if step == 5:
                others = copies(params)
                saved = opt.state_dict()
                other = make_optimizer(others)
                other.load_state_dict(saved)
    for step in (6, 7):
        other.param_groups[0]["lr"] = warmup_and_cosine(step)
        run(other, others, 1, step)  # and no second warning
    assert_same_bits(snapshot(other), snapshot(opt))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer, float], Any]] = {
    "cosine": lambda opt, lr: lr_scheduler.CosineAnnealingLR(opt, 8),
    "warm-up": lambda opt, lr: lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / 5, 1.0)),
    "from zero": lambda opt, lr: lr_scheduler.LambdaLR(opt, lambda step: min(step / 4, 1.0)),
    "linear": lambda opt, lr: lr_scheduler.LinearLR(opt, 0.01, total_iters=4),
    "one cycle": lambda opt, lr: lr_scheduler.OneCycleLR(opt, lr, total_steps=9, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [1.0, 1e-3])
def test_schedulers_say_what_their_peak_is(name: str, lr: float) -> None:
    """A scheduler of torch's names the rate it started from: multipliers near 0 stay, rates are relative to it."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, lr=lr), make_optimizer(others)
    scheduler = SCHEDULERS[name](opt, lr)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for step in range(8):
            before = other.param_groups[0]["lr"] = opt.param_groups[0]["lr"] / lr
            if before <= 0.05:
                other.param_groups[0]["lr"] = torch.tensor(before)  # taken as it is
            run(opt, params, 1, step)
            run(other, others, 1, step)
            scheduler.step()
    torch.testing.assert_close(params, others, rtol=0, atol=1e-6)
    assert len(record) == int(lr == 1e-3)


@every_impl
def test_what_counts_is_the_first_rate_above_zero(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl, lr=0.0), make_optimizer(others, impl, lr=0.0)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(params, make_params())
    assert opt.param_groups[0]["peak_lr"] is None
    opt.param_groups[0]["lr"], other.param_groups[0]["lr"] = 1e-3, 1.0
    with a_rate:
        run(opt, params, 1, 2)
    run(other, others, 1, 2)
    assert_same_bits(params, others)


@pytest.mark.parametrize("lr", [0.050001, 0.1, 1.0, 3.0])
def test_multipliers_are_taken_as_they_are(lr: float) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, lr=lr), make_optimizer(others, lr=torch.tensor(lr))
    run(opt, params, 1)
    run(other, others, 1)
    for step, rate in enumerate((0.4, 1e-3), 1):  # the end of a schedule
        opt.param_groups[0]["lr"] = rate
        other.param_groups[0]["lr"].fill_(rate)
        run(opt, params, 1, step)
        run(other, others, 1, step)
    assert_same_bits(params, others)
    assert opt.param_groups[0]["peak_lr"] == 0.0
    assert other.param_groups[0]["peak_lr"] is None


@every_impl
def test_rates_that_come_after_the_first_step(impl: str) -> None:
    """The loop writes them at its end: a fall by so much within a step is no schedule of multipliers."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    run(opt, params, 1)
    opt.param_groups[0]["lr"] = 1e-3
    with a_rate:
        run(opt, params, 1, 1)
    run(other, others, 2)
    opt.param_groups[0]["lr"], other.param_groups[0]["lr"] = 5e-4, 0.5
    run(opt, params, 1, 2)
    run(other, others, 1, 2)
    assert_same_bits(without_peaks(snapshot(opt)), without_peaks(snapshot(other)))


def test_a_given_peak_needs_no_warning() -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer([{"params": params, "lr": 1e-3, "peak_lr": 2e-3}]), make_optimizer(others, lr=0.5)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(params, others)
    with pytest.raises(ValueError, match="peak_lr: expected None or a finite number >= 0, got -1"):
        make_optimizer([{"params": make_params(), "peak_lr": -1}])


@every_impl
@pytest.mark.parametrize("lr", [-1e-3, math.nan, math.inf])
def test_a_rate_that_is_none_changes_nothing(impl: str, lr: float) -> None:
    params = make_params()
    opt = make_optimizer([{"params": params[:2]}, {"params": params[2:]}], impl)
    run(opt, params, 2)
    set_grads(params, 2)
    opt.param_groups[1]["lr"] = lr
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['lr'\]: expected a finite number >= 0, got"):
        opt.step(loss=1.0)
    after = snapshot(opt)
    for tree in (before, after):
        tree["param_groups"][1].pop("lr")  # NaN is not equal to itself
    assert_same_bits(after, before)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_negative_tensor_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .* got tensor\(-0.5000\)"):
        make_optimizer([{"params": make_params(), name: torch.tensor(-0.5)}])


# ---- Weight decay ----------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_weight_decay_means_what_it_means_for_adamw(impl: str, decay: float) -> None:
    """A step of s for every element, as Adam's first one is, comes with a decay of s * decay, as AdamW's lr * decay."""
    theta = Theta.init_adam("compact")
    everyone = [make_params([(40, 3), (5,), ()]) for _ in range(2)]
    start = [param.detach().clone() for param in everyone[0]]
    for params, value in zip(everyone, (0.0, decay), strict=True):
        opt = LearnedOptimizer([{"params": params, "weight_decay": value, "lr": 0.5}], theta, impl=impl)
        set_grads(params, 0)
        opt.step()
    adamw = copies(start)
    for old, plain, decayed, param in zip(start, *everyone, adamw, strict=True):
        param.grad, plain, decayed = plain.grad, plain.detach(), decayed.detach()
        step = (plain - old).abs().mean()
        torch.testing.assert_close((plain - old).abs(), step.expand_as(old), rtol=1e-3, atol=1e-7)
        assert float(step) > 1e-5
        torch.optim.AdamW([param], lr=float(step), weight_decay=decay).step()
        torch.testing.assert_close(decayed, param, rtol=0, atol=1e-3 * float(step) * decay + 2e-7)


# ---- Losses ----------------------------------------------------------------------------------------------------------


@every_impl
def test_a_loss_beside_a_closure_without_one(impl: str) -> None:
    """Lightning's manual optimization hands a closure that does nothing to every step."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    for step in range(3):
        set_grads(params, step)
        assert opt.step(lambda: None, loss=make_loss(step)) is None
        run(other, others, 1, step)
    assert_same_bits(snapshot(opt), snapshot(other))


@every_impl
def test_weights_of_losses(impl: str) -> None:
    """The mean of micro-batches of different size, and nothing for those without weight."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        opt.observe(1.0 + step, weight=3)
        opt.observe(torch.tensor([5.0 + step]), weight=torch.tensor(1.0))
        for weight in (0, 0.0, torch.tensor(math.nan)):
            opt.observe(1e9, weight=weight)
        opt.observe(math.nan, weight=7)
        opt.step()
        other.step(loss=2.0 + step)
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf, "1", torch.ones(2)], ids=str)
def test_weights_that_are_none(weight: Any) -> None:
    opt = make_optimizer(make_params())
    with pytest.raises(ValueError, match="weight: expected"):
        opt.observe(1.0, weight=weight)


@every_impl
@pytest.mark.parametrize("way", ["loss", "closure"])
@pytest.mark.parametrize("resumed", [False, True])
def test_an_observed_loss_wins(impl: str, way: str, resumed: bool) -> None:
    """A trainer's closure returns the loss of the last micro-batch, divided by their number."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    for step in range(3):
        if step != 1:  # then nothing was observed, and the step's own loss counts
            opt.observe(1.0)
            opt.observe(3.0)
        if resumed:
            opt.load_state_dict(opt.state_dict())
        set_grads(params, step)
        set_grads(others, step)
        if way == "loss":
            opt.step(loss=0.25)
        else:
            assert opt.step(lambda: 0.25) == 0.25
        other.step(loss=0.25 if step == 1 else 2.0)
    assert_same_bits(snapshot(opt), snapshot(other))


@every_impl
def test_validation_losses_alone_say_that_they_do_nothing(impl: str) -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    for step in range(4):
        opt.observe(valid_loss=1.0 + step)
        set_grads(params, step)
        if step == 0:
            with pytest.warns(UserWarning, match="validation losses were observed, and no training loss"):
                opt.step()
        else:
            opt.step()  # says nothing more
        set_grads(others, step)
        other.step()
    assert_same_bits(params, others)


def test_validation_losses_before_or_after_training_losses_are_no_cause_for_warning() -> None:
    params = make_params()
    opt = make_optimizer(params)
    opt.observe(valid_loss=1.0)
    run(opt, params, 2)
    opt.observe(valid_loss=1.0)
    set_grads(params, 2)
    opt.step()
    others = copies(params)
    other = make_optimizer(others)
    other.load_state_dict(opt.state_dict())
    other.observe(valid_loss=1.0)
    set_grads(others, 2)
    other.step()


@pytest.mark.parametrize("way", ["loss", "closure", "train_loss", "valid_loss"])
def test_a_loss_that_wraps_others_is_refused(way: str) -> None:
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 1)
    set_grads(params, 1)
    before = snapshot(opt)
    loss = TwoTensor(torch.tensor(1.0), torch.tensor(1.0))
    calls = {"loss": lambda: opt.step(loss=loss), "closure": lambda: opt.step(lambda: loss)}
    with pytest.raises(TypeError, match="expected a number or a plain tensor, got a TwoTensor"):
        calls.get(way, lambda: opt.observe(**{way: loss}))()
    assert_same_bits(snapshot(opt), before)


# ---- Options of other optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"betas": (0.9, 0.95)},
            "betas: LearnedOptimizer has no betas: its momenta and their constants are part of theta",
        ),
        ({"eps": 1e-8}, "eps: LearnedOptimizer has no eps"),
        ({"momentum": 0.9}, "momentum: LearnedOptimizer has no momentum"),
        ({"amsgrad": True}, "amsgrad: .*leave it out"),
        ({"fused": True}, "fused: .*every step is one call for all tensors as it is; leave it out"),
        ({"capturable": True}, "capturable: .*CUDA graphs can hold every step as it is"),
        ({"maximize": 1}, "maximize: expected True or False, got 1"),
    ],
)
def test_options_of_other_optimizers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_params(), **options)
    with pytest.raises(ValueError, match=message):
        make_optimizer([{"params": make_params(), **options}])


def test_options_that_are_turned_off() -> None:
    params, others = make_params(), make_params()
    off = {
        "foreach": None,
        "fused": False,
        "capturable": False,
        "differentiable": False,
        "amsgrad": False,
        "betas": None,
    }
    opt, other = make_optimizer(params, **off), make_optimizer(others)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(snapshot(opt), snapshot(other))
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        make_optimizer(make_params(), learning_rate=1e-3)


@pytest.mark.parametrize("rate", [1e-3, 1, torch.tensor(1e-3)], ids=str)
def test_a_rate_in_second_place(rate: Any) -> None:
    with pytest.raises(
        TypeError, match=r"theta: .*there is no learning rate: write LearnedOptimizer\(params\), or lr="
    ):
        LearnedOptimizer(make_params(), rate)


# ---- maximize --------------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("way", ["loss", "closure", "observe"])
def test_maximize_is_to_minimise_the_negative(impl: str, way: str) -> None:
    """Gradients and losses change sign; with bits that only differ by it, every step is the same."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl, maximize=True), make_optimizer(others, impl)
    for step in range(4):
        set_grads(others, step)
        set_grads(params, step)
        given = [param.grad.neg_() for param in params]
        before = [grad.clone() for grad in given]
        loss: Tensor = torch.tensor(make_loss(step))
        opt.observe(valid_loss=-loss)
        other.observe(valid_loss=loss)
        if way == "observe":
            opt.observe(-loss, weight=2)
            other.observe(loss, weight=2)
            opt.step()
            other.step()
        elif way == "closure":
            assert float(opt.step(lambda loss=loss: -loss)) == -float(loss)
            other.step(loss=loss)
        else:
            opt.step(loss=-loss)
            other.step(loss=loss)
        assert_same_bits([param.grad for param in params], before)
    one, two = snapshot(opt), snapshot(other)
    assert all(
        group.pop("maximize") != group_.pop("maximize")
        for group, group_ in zip(*(s["param_groups"] for s in (one, two)), strict=True)
    )
    assert_same_bits(one, two)


@every_impl
def test_maximize_in_one_group(impl: str) -> None:
    params, others = make_params(), make_params()
    groups = [{"params": params[:3]}, {"params": params[3:], "maximize": True}]
    opt, other = make_optimizer(groups, impl), make_optimizer(others, impl)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        for param in params[3:]:
            param.grad.neg_()
        params[4].grad = others[4].grad = None
        opt.step(loss=make_loss(step))  # that of the group that descends
        other.step(loss=make_loss(step))
    assert_same_bits(params, others)
