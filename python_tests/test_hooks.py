"""What torch does around every step, lopt/hooks.py does too: hooks, profiles, and no autograd."""

from typing import Any

import pytest
import torch
from optimizer_cases import assert_same_bits, copies, make_optimizer, make_params, run, set_grads, snapshot
from torch.optim import Optimizer, optimizer

from lopt import LearnedOptimizer, hooks

NAME = "Optimizer.step#LearnedOptimizer.step"


def hooks_of(opt: Optimizer, everywhere: bool) -> tuple[Any, Any]:
    if everywhere:
        return optimizer.register_optimizer_step_pre_hook, optimizer.register_optimizer_step_post_hook
    return opt.register_step_pre_hook, opt.register_step_post_hook


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_may_replace_arguments(everywhere: bool) -> None:
    """As in torch: a hook before the step returns new ones; after it was removed, it is not called any more."""
    params = make_params()
    others = copies(params)
    opt, other = make_optimizer(params), make_optimizer(others)
    before, after = hooks_of(opt, everywhere)
    seen: list[Any] = []
    handles = [
        before(lambda self, args, kwargs: (args, {"loss": 2.0})),
        after(lambda self, args, kwargs: seen.append((self, kwargs))),
    ]
    set_grads(params, 0)
    opt.step(loss=1.0)
    for handle in handles:
        handle.remove()
    set_grads(others, 0)
    other.step(loss=2.0)
    for one, tensors in ((opt, params), (other, others)):
        set_grads(tensors, 1)
        one.step(loss=3.0)
    assert_same_bits(snapshot(opt), snapshot(other))
    assert len(seen) == 1
    assert seen[0][0] is opt
    assert seen[0][1] == {"loss": 2.0}


def test_a_hook_that_returns_something_else_is_refused() -> None:
    params = make_params()
    opt = make_optimizer(params)
    opt.register_step_pre_hook(lambda *_: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        run(opt, params, 1)


@pytest.mark.parametrize("own", [False, True])
def test_a_class_derived_calls_hooks_once(own: bool) -> None:
    class Derived(LearnedOptimizer):
        pass

    if own:
        Derived.step = lambda self, closure=None, **options: None  # type: ignore[assignment,method-assign]
    params = make_params()
    opt, calls = Derived(params), list[int]()
    opt.register_step_post_hook(lambda *_: calls.append(1))
    run(opt, params, 2)
    assert len(calls) == 2


@pytest.mark.parametrize("hooked", [False, True])
def test_profiles_name_the_step(hooked: bool) -> None:
    """Once for each step, as for torch's optimizers."""
    params = make_params()
    opt = make_optimizer(params)
    if hooked:
        opt.register_step_post_hook(lambda *_: None)
    run(opt, params, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(opt, params, 2, first=1)
    with torch.autograd.profiler.profile() as older:
        run(opt, params, 2, first=3)
    run(opt, params, 1, first=5)
    for events in (profile.events(), older.function_events):
        assert [event.name for event in events].count(NAME) == 2


def test_every_step_goes_through_torch_where_names_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says whether somebody watches is no public part of torch."""
    params = make_params()
    opt = make_optimizer(params)
    assert not hooks._watched(opt)
    calls: list[int] = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    monkeypatch.delattr(optimizer, "_global_optimizer_pre_hooks")
    opt._optimizer_step_pre_hooks.clear()
    assert hooks._watched(opt)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_mode_of_autograd_is_left_as_it_was(impl: str, enabled: bool) -> None:
    params = make_params()
    opt = make_optimizer(params, impl)
    with torch.set_grad_enabled(enabled):
        run(opt, params, 2)
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ValueError, match="loss"):
            opt.step(loss="much")  # type: ignore[call-overload]
        assert torch.is_grad_enabled() == enabled
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert not any(value.requires_grad for state in opt.state.values() for value in state["lstm"].values())
