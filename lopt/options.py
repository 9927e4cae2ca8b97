"""Options of param groups: what they may hold, and how the learning rates that a training script writes are read."""

import math
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.kernels import Seen
from lopt.roles import check_roles
from lopt.warnings import warn

#: An ``lr`` up to here is a learning rate that a script wrote for another optimizer, no multiplier of a learned step.
LARGEST_RATE = 0.05

_LEARNED = "its momenta and their constants are part of theta"
_FUSED = "every step is one call for all tensors as it is"
#: Options of torch's optimizers, and why there is none here. None and False, which turn them off, are accepted.
FOREIGN = {
    **dict.fromkeys(("betas", "eps", "amsgrad", "momentum", "nesterov", "dampening", "centered"), _LEARNED),
    **dict.fromkeys(("foreach", "fused"), _FUSED),
    "capturable": "CUDA graphs can hold every step as it is",
    "differentiable": "steps are taken without autograd",
}


def check_foreign(options: Mapping[str, Any]) -> None:
    """Refuse options of other optimizers, unless they are turned off.

    Raises:
        ValueError: an option is set that has no meaning here.
    """
    for name, reason in FOREIGN.items():
        if options.get(name) not in (None, False):
            raise ValueError(f"{name}: LearnedOptimizer has no {name}: {reason}; leave it out (got {options[name]!r})")


def check_unknown(options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that are not LearnedOptimizer's.

    Raises:
        ValueError: one of another optimizer that is set.
        TypeError: any other.
    """
    check_foreign(options)
    unknown = set(options) - set(FOREIGN)
    if unknown:
        raise TypeError(f"LearnedOptimizer() got an unexpected keyword argument {min(unknown)!r}")


def check_total_steps(value: Any) -> None:
    """Refuse a number of steps below 1."""
    if value is not None and not (isinstance(value, numbers.Real) and 1.0 <= float(value) < math.inf):
        raise ValueError(f"total_steps: expected a number from 1 on or None, got {value!r}")


def check_group(group: Mapping[str, Any], total_steps: float | None) -> None:
    """Check the options of a new group of an optimizer with these ``total_steps``.

    Raises:
        ValueError: an option is out of range, of a wrong type, or one of another optimizer.
    """
    check_foreign(group)
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            good = value.numel() == 1 and not value.is_complex() and (value.is_meta or bool(value >= 0))
        else:
            good = isinstance(value, numbers.Real) and 0.0 <= float(value) < math.inf
        if not good:
            raise ValueError(f"{name}: expected a finite number >= 0 or a tensor of one element, got {value!r}")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize: expected True or False, got {group['maximize']!r}")
    peak = group["peak_lr"]
    if peak is not None and not (isinstance(peak, numbers.Real) and 0.0 <= float(peak) < math.inf):
        raise ValueError(f"peak_lr: expected None or a finite number >= 0, got {peak!r}")
    check_roles(group)
    if group.get("total_steps") not in (None, total_steps):
        raise ValueError(
            f"total_steps: got {group['total_steps']!r} in a group, but it belongs to all; "
            "write LearnedOptimizer(params, total_steps=...)"
        )


def read_rates(groups: Sequence[dict[str, Any]], before: Sequence[float]) -> list[float]:
    """Before a step: check the ``lr`` of all groups, and decide for new ones whether it is a script's learning rate.

    ``peak_lr`` of a group is None until its first step with an ``lr`` above 0. From then on it is 0 where ``lr`` is a
    multiplier, and otherwise the highest learning rate so far, to which :func:`effective_lr` relates the present one.
    A scheduler of torch's that started above :data:`LARGEST_RATE` says that ``lr`` is a multiplier, in a warm-up. A
    script that writes rates after its first step only shows in a fall from above .5 within a step.

    Args:
        groups: the optimizer's; ``peak_lr`` is written.
        before: what the last call returned.

    Returns:
        The ``lr`` of all groups, NaN for tensors.

    Raises:
        ValueError: an ``lr`` is negative or not finite.
    """
    now = [math.nan if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]
    if now == before:
        return now
    rates: dict[float, list[int]] = {}
    for i, (group, lr) in enumerate(zip(groups, now, strict=True)):
        if isinstance(group["lr"], Tensor):
            continue
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"param_groups[{i}]['lr']: expected a finite number >= 0, got {lr!r}; nothing was changed")
        if lr == 0.0:
            continue
        peak = group.get("peak_lr")
        fell = peak == 0.0 and lr <= LARGEST_RATE and i < len(before) and before[i] > 0.5
        if peak is None or fell:
            known = (float(group.get(name) or 0.0) for name in ("initial_lr", "max_lr"))  # of torch's schedulers
            highest = max(float(lr), *known)
            group["peak_lr"] = highest if highest <= LARGEST_RATE else 0.0
            if group["peak_lr"]:
                rates.setdefault(float(lr), []).append(i)
    if rates:
        places = "; ".join(f"lr={lr:g} in param_groups {indices}" for lr, indices in rates.items())
        warn(
            f"{places}: LearnedOptimizer has no learning rate, its lr is a multiplier that stays 1. So small a value "
            "is read as the learning rate of a script written for another optimizer: steps are multiplied by lr / "
            "(highest lr of the group so far), so that only the course of a schedule counts. Leave lr and its schedule "
            "out, or use multipliers around 1 (docs/porting.md)"
        )
    return now


def effective_lr(group: dict[str, Any]) -> float | Tensor:
    """The multiplier of a group's steps: ``lr``, or where it is a script's learning rate ``lr / peak_lr``.

    Raises ``peak_lr`` where ``lr`` is above it. Tensors are taken as they are, for their values are on the device.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr
    peak = group.get("peak_lr")
    if not peak:
        return float(lr)
    if lr > peak:
        group["peak_lr"] = peak = float(lr)
    return float(lr / peak)


def effective(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as a step uses them."""
    maximize = bool(group.get("maximize"))
    return {"lr": effective_lr(group), "weight_decay": group["weight_decay"], "maximize": maximize}


class Options:
    """What the options of all groups mean for a step, worked out anew where one is not the object it was.

    Attributes:
        maximize: whether any group climbs.
    """

    def __init__(self) -> None:
        self.maximize = False
        self._groups: Sequence[dict[str, Any]] | None = None
        self._seen = Seen()
        self._rates: list[float] = []
        self._values: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_rates": self._rates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def read(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """:func:`effective` of each group, the list of the last call where nothing changed; checks them before.

        Raises:
            ValueError: an ``lr`` is negative or not finite.
        """
        if groups is not self._groups or not self._seen.same():
            self._groups = None  # as long as they have not been checked
            self._rates = read_rates(groups, self._rates)
            self._values = list(map(effective, groups))
            self.maximize = any(group["maximize"] for group in self._values)
            self._groups, self._seen = groups, Seen()
            self._seen.all(groups)
            for group in groups:
                self._seen.items(group, "lr", "weight_decay", "maximize", "peak_lr")
        return self._values


def descending(grads: list[Tensor], group_of: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Gradients to descend along: those of groups with ``maximize`` are negated, in new memory of the same size."""
    ascending = [i for i, group in enumerate(group_of) if groups[group].get("maximize")]
    negated = torch._foreach_neg([grads[i] for i in ascending])
    grads = list(grads)
    for i, grad in zip(ascending, negated, strict=True):
        grads[i] = grad
    return grads


def describe(groups: Sequence[Mapping[str, Any]], hidden: set[str]) -> list[str]:
    """Lines that show the options of the groups."""
    lines = []
    for i, group in enumerate(groups):
        lines.append(f"Parameter Group {i}: {len(group['params'])} tensors")
        lines += [f"    {name}: {_in_short(group[name])}" for name in sorted(group.keys() - hidden)]
    return lines


def _in_short(value: Any) -> str:
    """An option of all parameters of a group; where each has its own, how many have which."""
    return ", ".join(f"{n} {x}" for x, n in Counter(value).items()) if isinstance(value, list) else str(value)
