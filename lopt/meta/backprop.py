"""The meta-gradient by backpropagation through a whole inner run.

An inner run is a differentiable function of theta: gradients and losses that the optimizer sees, its state and the
parameters all follow from it. Reverse mode gives the exact gradient of the meta-loss, with the second derivatives of
the inner loss, for some ten times the cost of the run::

    state_{s+1} = segment_s(theta, state_s)                           forward: a state is kept for each segment
    gradient   += d/dtheta (meta-losses of segment_s + <adjoint, state_{s+1}>)      backward: segments run again
    adjoint     = the same, d/dstate_s

A pair of evolution strategies tells the slope along one direction, and in language models much of that is chaos;
one run of this tells all of them. Long runs are where it ends: the gradient of a chaotic run grows exponentially with
its length, and says nothing about what the mean over such runs would gain. A run whose loss is not finite has none.

Source: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2019 (arXiv:1810.10180, how the gradient explodes).
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lopt.average import decay_at
from lopt.meta import objective
from lopt.meta.config import MetaTrainConfig
from lopt.meta.objective import Losses
from lopt.meta.unroll import Run
from lopt.rule import ThetaSpec, unflatten
from lopt.rule.flat import Flat, FlatState
from lopt.rule.inputs import Shapes
from lopt.rule.tensor_lstm import Globals, Rows

#: Steps whose operations are in memory at once. Of a run, the states between so many steps are kept.
SEGMENT = 25


class Estimate(NamedTuple):
    """What a run gave."""

    gradient: Tensor  # [P], zeros where the run diverged
    meta_loss: float
    losses: Losses  # of one run


class Standing(NamedTuple):
    """Where a run stands."""

    params: Tensor  # [N]
    average: Tensor  # [N] of the iterates, where it is asked for; otherwise the first parameters
    state: FlatState

    def tensors(self) -> list[Tensor]:
        """All of it; the inverse of :meth:`of`."""
        state = self.state
        return [self.params, self.average, state.mom, state.rms, state.before, *state.globals, *state.rows]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "Standing":
        """From :meth:`tensors`."""
        split = 5 + len(Globals._fields)
        globals_, rows = Globals(*tensors[5:split]), Rows(*tensors[split:])
        return cls(tensors[0], tensors[1], FlatState(globals_, rows, *tensors[2:5]))


class _Unroll:
    """A run as a function of theta, piece by piece; the same as :func:`lopt.meta.unroll.unroll`."""

    def __init__(self, spec: ThetaSpec, like: Tensor, run: Run) -> None:
        self.spec, self.run = spec, run
        self.init = {name: value.to(like) for name, value in run.task.init(run.seed).items()}
        shapes = [tuple(value.shape) for value in self.init.values()]
        self.flat = Flat(spec, shapes, Shapes.of(spec, shapes, like, run.task.kinds))

    def start(self, theta: Tensor) -> Standing:
        params = self.flat.join(list(self.init.values()))
        return Standing(params, params, self.flat.init_state(unflatten(self.spec, theta)))

    def loss(self, params: Tensor, batch: Any) -> Tensor:
        return self.run.task.loss(dict(zip(self.init, self.flat.split(params), strict=True)), batch)

    def segment(
        self, theta: Tensor, now: Standing, first: int, last: int
    ) -> tuple[Standing, list[Tensor], list[Tensor]]:
        """Steps from ``first`` to before ``last``: where the run stands then, outer_valid and train losses.

        With gradients enabled, all of it can be differentiated; without, inner gradients are taken and forgotten.
        """
        run, flat, task = self.run, self.flat, self.run.task
        differentiable = torch.is_grad_enabled()
        weights, (params, average, state) = unflatten(self.spec, theta), now
        train, outer, every = task.batches(run.seed, "train", first), [], run.valid_every
        seen = -(-first // every) if every else 0
        inner_valid = task.batches(run.seed, "inner_valid", seen * run.valid_batches)
        train_losses = []
        for step in range(first, last):
            if every and step % every == 0:
                state = flat.observe_valid(state, self._mean_loss(params, inner_valid))
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
                leaf = params if params.requires_grad else params.detach().requires_grad_()
                loss = self.loss(leaf, next(train))
                (grad,) = torch.autograd.grad(loss, leaf, create_graph=differentiable)
            loss = loss if differentiable else loss.detach()
            params, state = flat.update(weights, state, leaf, grad, loss, float(run.total_steps))
            if run.averaged:
                average = torch.lerp(average, params, 1.0 if step == 0 else 1.0 - decay_at(step))
            train_losses.append(loss)
            if (step + 1) % run.loss_every == 0:
                batch = next(task.batches(run.seed, "outer_valid", step))
                outer.append(self.loss(average if run.averaged else params, batch))
        return Standing(params, average, state), outer, train_losses

    def _mean_loss(self, params: Tensor, batches: Iterator[Any]) -> Tensor:
        some = [self.loss(params, next(batches)) for _ in range(self.run.valid_batches)]
        return torch.stack(some).double().mean().to(some[0].dtype)


def estimate(spec: ThetaSpec, theta: Tensor, run: Run, config: MetaTrainConfig) -> Estimate:
    """Meta-loss of a run under ``theta`` ``[P]``, and its gradient.

    Memory is that of ``SEGMENT`` steps, and of a state for each segment of the run.

    Args:
        config: has what the meta-loss is.
    """
    unroll = _Unroll(spec, theta, run)
    length = run.loss_every * max(1, SEGMENT // run.loss_every)
    bounds = [*range(0, run.horizon, length), run.horizon]
    weights = objective.weights(config.weighting, run.horizon // run.loss_every).to(theta)

    def meta_loss(first: int, outer: list[Tensor], train: list[Tensor]) -> Tensor:
        losses = Losses(torch.stack(outer)[None], torch.stack(train)[None])
        points = objective.per_point(losses, config.objective, run.unit, config.loss_limit)[0]
        begin = first // run.loss_every
        return (points * weights[begin : begin + len(points)]).sum() / len(weights)

    kept, outer, train, total = [unroll.start(theta)], [], [], 0.0
    with torch.no_grad():
        for first, last in itertools.pairwise(bounds):
            now, *new = unroll.segment(theta, kept[-1], first, last)
            kept.append(now)
            total += float(meta_loss(first, *new))
            outer += new[0]
            train += new[1]
    losses = Losses(torch.stack(outer)[None], torch.stack(train)[None])
    gradient = torch.zeros_like(theta)
    if not (torch.isfinite(losses.outer).all() and torch.isfinite(losses.train).all() and math.isfinite(total)):
        return Estimate(gradient, total, losses)

    adjoint: list[Tensor | None] = [None for _ in kept[0].tensors()]
    for first, last, before in reversed(list(zip(bounds, bounds[1:], kept, strict=False))):
        leaf = theta.detach().requires_grad_()
        begun = unroll.start(leaf).tensors() if first == 0 else before.tensors()
        tensors = [x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_() for x in begun]
        inputs = [x for x in tensors if x.requires_grad]
        with torch.enable_grad():
            now, *new = unroll.segment(leaf, Standing.of(tensors), first, last)
            value = meta_loss(first, *new)
            for x, direction in zip(now.tensors(), adjoint, strict=True):
                if direction is not None and x.requires_grad:
                    value = value + (x * direction).sum()
        found, *slopes = torch.autograd.grad(value, [leaf, *inputs], allow_unused=True)
        gradient += found
        remaining = iter(slopes)
        adjoint = [next(remaining) if x.requires_grad else None for x in tensors]
    return Estimate(gradient, total, losses)


#: A gradient of this norm counts half as much as a long one.
TYPICAL = 0.05


def mean_direction(gradients: Tensor) -> Tensor:
    """Mean over runs ``[P]`` of ``g / (|g| + typical)``, of gradients ``[runs, P]``: all runs have about the same say.

    The norms have a long tail, since some runs are chaotic, and their gradients say least. One that is not finite
    counts as zero.

    Example:
        >>> mean_direction(torch.tensor([[3.0, 4.0], [torch.nan, 0.0]]))
        tensor([0.2970, 0.3960])
    """
    finite = torch.isfinite(gradients).all(dim=1, keepdim=True)
    gradients = torch.where(finite, gradients, 0.0)
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    return torch.mean(gradients / (norms + TYPICAL), dim=0)
