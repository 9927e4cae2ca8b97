"""The LearnedOptimizer inside what a trainer makes of it."""

import math
from typing import Any

from lopt.optimizer import LearnedOptimizer


def unwrap(optimizer: Any) -> LearnedOptimizer | None:
    """The LearnedOptimizer inside the wrappers of Accelerate, Lightning and Fabric; None for any other optimizer.

    Example:
        >>> import torch
        >>> optimizer = LearnedOptimizer([torch.nn.Parameter(torch.ones(3))])
        >>> unwrap(optimizer) is optimizer
        True
    """
    inner = innermost(optimizer)
    return inner if isinstance(inner, LearnedOptimizer) else None


def innermost(optimizer: Any) -> Any:
    """The optimizer that a trainer wrapped; itself, if none did.

    Lightning's wrappers are instances of the optimizer's class too, with none of its attributes: so this comes before
    any question of type.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def need(optimizer: Any, who: str, remedy: str) -> LearnedOptimizer:
    """:func:`unwrap`.

    Raises:
        TypeError: there is none.
    """
    found = unwrap(optimizer)
    if found is None:
        raise TypeError(f"{who}: expected a LearnedOptimizer, got {type(innermost(optimizer)).__name__}; {remedy}")
    return found


def tell_steps(optimizer: LearnedOptimizer, steps: float) -> None:
    """The number of steps that a trainer plans, if it knows one; what a script told the optimizer itself stays.

    It takes the place of what a checkpoint holds, which is the same unless a run is made longer.
    """
    if not optimizer._told and 0 < steps < math.inf:
        optimizer.total_steps = int(steps)
        optimizer._told = False
