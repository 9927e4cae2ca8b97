"""Steps of an optimizer by a rule that others published (:mod:`lopt.rule.published`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lopt.rule import Rule, Theta
from lopt.rule.matrices import matrices_of
from lopt.rule.published import step as published
from lopt.state import Groups, sample
from lopt.steppers import Decided, Tensors, one_thread


def check_options(
    rule: Rule, *, state_dtype: torch.dtype = torch.float32, sharded_state: bool = False, sharded: bool = False
) -> None:
    """Refuse what is not there for rules of others.

    Raises:
        ValueError, TypeError: with what to do.
    """
    if state_dtype != torch.float32:
        raise ValueError(f"state_dtype: rule {rule.name!r} has its state in float32, got {state_dtype}; leave it out")
    if sharded_state:
        raise ValueError(f"sharded_state: rule {rule.name!r} keeps whole states on every rank; leave it out")
    if sharded:
        raise TypeError(
            f"params: rule {rule.name!r} steps whole tensors, got DTensors; train with DistributedDataParallel"
        )


def check_total_steps_of(rule: Rule, total_steps: float | None) -> None:
    """Refuse to step without the number of steps, where the rule needs it.

    Raises:
        ValueError: nobody said it.
    """
    if rule.needs_total_steps and not total_steps:
        raise ValueError(
            f"total_steps: rule {rule.name!r} has a schedule over the whole run; "
            "write LearnedOptimizer(..., total_steps=...)"
        )


class RuleStepper:
    """Steps by lopt/rule/published."""

    def __init__(self, tensors: Tensors, theta: Theta[Any]) -> None:
        self.tensors, self.rule = tensors, theta.spec
        self.matrices = matrices_of([tuple(param.shape) for param in tensors.params], tensors.kinds)
        self.decided: Decided = [], []

    def select(self) -> None:
        """Take the tensors that have a gradient now."""
        self.tensors.select()

    def step(
        self, params: list[Tensor], grads: list[Tensor], groups: Groups, shared: Mapping[str, Tensor], total_steps: int
    ) -> None:
        """One step; ``shared`` is the state of all tensors, written, with the losses since the last step in it."""
        tensors, rule, states = self.tensors, self.rule, self.tensors.selected_states
        device = sample(tensors.weights).device
        total, count = shared["pending_loss"]
        own = {name: shared[name] for name in (*published.SHARED, *rule.shared)}
        with one_thread(device):
            step = published.update(
                rule,
                tensors.weights,
                published.State(own, states),
                params,
                grads,
                torch.where(count > 0, total / count, torch.full_like(total, torch.nan)),
                kinds=[tensors.kinds[row] for row in tensors.selected],
                total_steps=total_steps,
                lr=tensors.option("lr", groups),
                weight_decay=tensors.option("weight_decay", groups),
            )
        for param, new in zip(params, step.params, strict=True):
            param.copy_(new)
        for old, state in zip(states, step.state.tensors, strict=True):
            for name, value in state.items():
                old[name].copy_(value)
        for name, value in step.state.shared.items():
            shared[name].copy_(value)
        self.decided = list(step.trace["step_size"].unbind()), [None] * len(params)
        shared["pending_loss"].zero_()
        shared["nonfinite"].add_(step.trace["nonfinite"])
