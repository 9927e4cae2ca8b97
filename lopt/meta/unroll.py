"""Unroll: inner training runs of one task under a batch of thetas at once.

All runs of an unroll share task, initial parameters and minibatches (common random numbers); they differ only in theta.
One inner step of one run is a pure function of tensors, vmapped over the runs::

    every valid_every steps:  the optimizer observes the loss of an inner_valid minibatch
    loss, grad = value and gradient of the task's loss on a train minibatch
    params     = update of lopt.reference
    meta-loss of the step = clip(L / L_init, 0, loss_limit)     L on an outer_valid minibatch, after the update

``L_init`` is the task's initial loss. A non-finite ``L`` counts as ``loss_limit``, the worst value, and its run is
reported as diverged; the meta-loss of a window is the mean over its steps.

Source: arXiv:2009.11243, section 3.2 (what each split is for).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt import reference
from lopt.tasks.task import Batch, Task
from lopt.theta import ThetaSpec


@dataclass(frozen=True)
class Run:
    """What an inner run is, apart from theta and from how far it has come.

    Args:
        task: the inner problem.
        seed: of initial parameters and minibatches.
        horizon: length of the whole run in steps.
        total_steps: the length the optimizer is told, 0 for none.
        valid_every: steps between two validation losses the optimizer sees, the first before step 0; 0 for none.
    """

    task: Task
    seed: int
    horizon: int
    total_steps: int = 0
    valid_every: int = 10

    @cached_property
    def initial_loss(self) -> float:
        """``L_init``, by which the meta-loss is normalised."""
        return max(self.task.initial_loss(self.seed), 1e-6)


class RunState(NamedTuple):
    """Where a batch of runs stands; every tensor has a leading dimension of runs."""

    step: int
    params: dict[str, Tensor]
    optimizer: reference.State

    def select(self, rows: Tensor) -> "RunState":
        """The state of the runs ``rows``, in that order; a run may be taken twice."""
        params, optimizer = map_tensors(lambda x: x[rows], (self.params, self.optimizer))
        return RunState(self.step, params, optimizer)


class Losses(NamedTuple):
    """What a window of steps gave."""

    meta: Tensor  # [steps, runs] normalised and clipped outer_valid losses, always finite
    train: Tensor  # [steps, runs] raw train losses before each update
    diverged: Tensor  # [runs] whether any outer_valid loss was not finite


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` (tensors in dicts, lists and tuples, named or not) with ``function`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: map_tensors(function, value) for name, value in tree.items()}
    values = [map_tensors(function, value) for value in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def start(spec: ThetaSpec, weights: Mapping[str, Tensor], run: Run) -> RunState:
    """State before the first step of ``run``, for every theta of ``weights`` (tensors ``[runs, ...]``)."""
    num_runs = weights["initial_h"].shape[0]
    params = {
        name: value.to(weights["initial_h"]).expand(num_runs, *value.shape)
        for name, value in run.task.init(run.seed).items()
    }
    optimizer = torch.vmap(lambda w, p: reference.init_state(spec, w, list(p.values())))(weights, params)
    return RunState(0, params, optimizer)


def unroll(
    spec: ThetaSpec,
    weights: Mapping[str, Tensor],
    run: Run,
    state: RunState,
    steps: int,
    loss_limit: float,
) -> tuple[RunState, Losses]:
    """Continue the runs of ``state`` by ``steps`` steps.

    Args:
        weights: tensors of theta with a leading dimension of runs, as :func:`lopt.theta.unflatten` makes them.
        loss_limit: largest normalised loss.

    Raises:
        ValueError: the window passes the horizon of the run.
    """
    if not 0 < steps <= run.horizon - state.step:
        raise ValueError(
            f"steps: expected 1 to {run.horizon - state.step}, at step {state.step} of {run.horizon}, got {steps}"
        )
    task, names = run.task, list(state.params)

    def inner_step(
        weights: Mapping[str, Tensor], params: dict[str, Tensor], optimizer: reference.State, batches: dict[str, Batch]
    ) -> tuple[dict[str, Tensor], reference.State, Tensor, Tensor]:
        if "inner_valid" in batches:
            optimizer = reference.observe_valid(spec, optimizer, task.loss(params, batches["inner_valid"]))
        grads, loss = torch.func.grad_and_value(task.loss)(params, batches["train"])
        values, optimizer, _ = reference.update(
            spec,
            weights,
            optimizer,
            [params[name] for name in names],
            [grads[name] for name in names],
            loss,
            total_steps=float(run.total_steps),
        )
        params = dict(zip(names, values, strict=True))
        return params, optimizer, loss, task.loss(params, batches["outer_valid"])

    vmapped: Any = torch.vmap(inner_step, in_dims=(0, 0, 0, None))
    train = task.batches(run.seed, "train", state.step)
    outer_valid = task.batches(run.seed, "outer_valid", state.step)
    valid_every = run.valid_every or run.horizon + 1
    inner_valid = task.batches(run.seed, "inner_valid", -(-state.step // valid_every))
    params, optimizer = state.params, state.optimizer
    train_losses, outer_losses = [], []
    with torch.no_grad():
        for step in range(state.step, state.step + steps):
            batches = {"train": next(train), "outer_valid": next(outer_valid)}
            if run.valid_every and step % run.valid_every == 0:
                batches["inner_valid"] = next(inner_valid)
            params, optimizer, train_loss, outer_loss = vmapped(weights, params, optimizer, batches)
            train_losses.append(train_loss)
            outer_losses.append(outer_loss)
    outer = torch.stack(outer_losses)
    losses = Losses(
        meta=normalise(outer, run.initial_loss, loss_limit),
        train=torch.stack(train_losses),
        diverged=torch.logical_not(torch.isfinite(outer)).any(dim=0),
    )
    return RunState(state.step + steps, params, optimizer), losses


def normalise(loss: Tensor, initial_loss: float, loss_limit: float) -> Tensor:
    """``clip(loss / initial_loss, 0, loss_limit)``; a non-finite loss becomes ``loss_limit``."""
    ratio = torch.clamp(loss / initial_loss, 0.0, loss_limit)
    return torch.where(torch.isfinite(loss), ratio, torch.full_like(ratio, loss_limit))
