"""Unroll: inner training runs of one task under a batch of thetas at once, in PyTorch.

All runs of an unroll share task, initial parameters and minibatches (common random numbers); they differ only in theta.
One inner step of one run is a pure function of tensors, vmapped over the runs::

    every valid_every steps:  the optimizer observes the loss of an inner_valid minibatch
    loss, grad = value and gradient of the task's loss on a train minibatch
    params     = update of lopt.reference
    every loss_every steps:   the loss of an outer_valid minibatch is recorded

A run ends at its first train or outer_valid loss that is not finite: its later losses are NaN, and so are its
parameters after the window. This runs any task; perceptrons have a faster engine of the same meaning.

Source: arXiv:2009.11243, section 3.2 (what each split is for).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt import reference
from lopt.meta.objective import Losses
from lopt.tasks.task import Batch, Task
from lopt.tensor_lstm import Globals, Rows
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
        loss_every: steps between two outer_valid losses; divides every window.
    """

    task: Task
    seed: int
    horizon: int
    total_steps: int = 0
    valid_every: int = 10
    loss_every: int = 1

    @cached_property
    def initial_loss(self) -> float:
        """``L_init``, by which the losses are normalised."""
        return max(self.task.initial_loss(self.seed), 1e-6)


class RunState(NamedTuple):
    """Where a batch of runs stands; every tensor has a leading dimension of runs."""

    step: int
    params: dict[str, Tensor]
    optimizer: reference.State

    def pack(self) -> dict[str, Any]:
        """Parameters and optimizer state as dicts and lists of tensors."""
        plain = {name: getattr(self.optimizer, name)._asdict() for name in ("globals", "rows")}
        return {"params": self.params, **plain, "mom": self.optimizer.mom, "rms": self.optimizer.rms}

    @classmethod
    def unpack(cls, step: int, packed: Mapping[str, Any]) -> "RunState":
        """The inverse of :meth:`pack`."""
        globals_, rows = Globals(**packed["globals"]), Rows(**packed["rows"])
        return cls(step, packed["params"], reference.State(globals_, rows, packed["mom"], packed["rms"]))


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
    spec: ThetaSpec, weights: Mapping[str, Tensor], run: Run, state: RunState, steps: int
) -> tuple[RunState, Losses]:
    """Continue the runs of ``state`` by ``steps`` steps.

    Args:
        weights: tensors of theta with a leading dimension of runs, as :func:`lopt.theta.unflatten` makes them.

    Raises:
        ValueError: the window passes the horizon of the run, or is no multiple of ``loss_every``.
    """
    if not 0 < steps <= run.horizon - state.step:
        raise ValueError(
            f"steps: expected 1 to {run.horizon - state.step}, at step {state.step} of {run.horizon}, got {steps}"
        )
    if steps % run.loss_every:
        raise ValueError(f"steps: expected a multiple of loss_every={run.loss_every}, got {steps}")
    task, names = run.task, list(state.params)

    def inner_step(
        weights: Mapping[str, Tensor], params: dict[str, Tensor], optimizer: reference.State, batches: dict[str, Batch]
    ) -> tuple[dict[str, Tensor], reference.State, Tensor]:
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
        return dict(zip(names, values, strict=True)), optimizer, loss

    vmapped: Any = torch.vmap(inner_step, in_dims=(0, 0, 0, None))
    loss_of: Any = torch.vmap(task.loss, in_dims=(0, None))
    train = task.batches(run.seed, "train", state.step)
    outer_valid = task.batches(run.seed, "outer_valid", state.step)
    valid_every = run.valid_every or run.horizon + 1
    inner_valid = task.batches(run.seed, "inner_valid", -(-state.step // valid_every))
    params, optimizer = state.params, state.optimizer
    train_losses, outer_losses = [], []
    ended = torch.zeros(len(weights["initial_h"]), dtype=torch.bool)
    nan = weights["initial_h"].new_full((), torch.nan)
    with torch.no_grad():
        for step in range(state.step, state.step + steps):
            batches = {"train": next(train)}
            if run.valid_every and step % run.valid_every == 0:
                batches["inner_valid"] = next(inner_valid)
            params, optimizer, loss = vmapped(weights, params, optimizer, batches)
            train_losses.append(torch.where(ended, nan, loss))
            ended = ended | ~torch.isfinite(loss)
            outer_batch = next(outer_valid)
            if (step + 1) % run.loss_every == 0:
                loss = loss_of(params, outer_batch)
                outer_losses.append(torch.where(ended, nan, loss))
                ended = ended | ~torch.isfinite(loss)
    if bool(ended.any()):
        params = {
            name: torch.where(ended.reshape(-1, *[1] * (value.dim() - 1)), nan, value) for name, value in params.items()
        }
    losses = Losses(torch.stack(outer_losses, dim=1), torch.stack(train_losses, dim=1))
    return RunState(state.step + steps, params, optimizer), losses
