"""What torch does around a step of an optimizer, at less cost: hooks, a name in profiles, no autograd."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer, optimizer

_set_grad_enabled: Callable[[bool], Any] = getattr(torch._C, "_set_grad_enabled", torch.set_grad_enabled)


def without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.no_grad()`` around a method, which makes objects for each call."""

    @wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return function(self, *args, **kwargs)
        finally:
            _set_grad_enabled(before)

    return wrapper


def _watched(self: Optimizer) -> bool:
    """Whether there are hooks to be called, or a profile is being taken."""
    try:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )
    except AttributeError:  # these names are torch's own business
        return True


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    watched = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (watched if _watched(self) else step)(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # says to torch that it has been here
    return wrapper


def hook(optimizer: type[Optimizer]) -> None:
    """Put ``Optimizer.profile_hook_step`` around the steps of a class, used where it has something to do.

    The constructor of ``Optimizer`` puts it there for good, unless it is there already: so this comes before. It takes
    longer than all else that a step of a small model does in Python.
    """
    if not hasattr(optimizer.step, "hooked"):
        optimizer.step = _hooked(optimizer.step)  # type: ignore[method-assign]
