"""The meta-loss: what an inner run is worth.

With losses ``L_1 ... L_n`` along a run (of outer_valid minibatches after updates, or of train minibatches before them),
``L_init`` the loss of the initial parameters, and a floor below which losses do not fall::

    meta_loss_j = log(clip((L_j - floor) / (L_init - floor), 0, limit) + .01)    a non-finite L_j counts as limit
    meta-loss   = mean over j of weight_j meta_loss_j                            the weights of a run have mean 1

The logarithm makes a reduction by a tenth worth the same on every task; .01 stops the pursuit of the floor.

The floor is the task's where it is known, and 0 for others whose losses begin above 0. Below 0 it is ``2 L_init``: the
ratio is then ``1 + (L_j - L_init) / |L_init|``, as it is with a floor of 0 for positive losses.

Source: Metz et al. 2022 (arXiv:2211.09760, the logarithm and the clip); arXiv:2009.11243 (the normalisation).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.meta.config import Objective, Weighting

FLOOR = 0.01
LOSSES_PER_RUN = 100  # about so many outer_valid losses are taken
FEWER = 20  # the same where each of them is differentiated


class Losses(NamedTuple):
    """Raw losses of a window, NaN from where a run diverged."""

    outer: Tensor  # [runs, steps / loss_every] of outer_valid minibatches, after updates
    train: Tensor  # [runs, steps] of train minibatches, before updates


class Unit(NamedTuple):
    """By what the losses of a run are normalised."""

    floor: float
    above: float  # the initial loss above the floor

    @classmethod
    def of(cls, initial_loss: float, floor: float | None) -> "Unit":
        """From the initial loss and the task's floor, if it is known."""
        if not math.isfinite(initial_loss):
            return cls(0.0, math.nan)  # every loss counts as the limit
        if floor is None or not floor < initial_loss:
            floor = min(0.0, 2.0 * initial_loss)
        return cls(floor, max(initial_loss - floor, 1e-6))


def normalise(loss: Tensor, unit: Unit, limit: float) -> Tensor:
    """``log(clip((loss - floor) / above, 0, limit) + .01)``, always finite."""
    ratio = (loss - unit.floor) / unit.above
    clipped = torch.clamp(ratio, 0.0, limit)
    return torch.log(torch.where(torch.isfinite(ratio), clipped, torch.full_like(ratio, limit)) + FLOOR)


def per_point(losses: Losses, objective: Objective, unit: Unit, limit: float) -> Tensor:
    """``[runs, steps / loss_every]`` meta-losses; those of train losses are means over ``loss_every`` steps."""
    if objective == "held_out":
        return normalise(losses.outer, unit, limit)
    values = normalise(losses.train, unit, limit)
    return values.reshape(*losses.outer.shape, -1).mean(dim=2)


def weights(weighting: Weighting, points: int) -> Tensor:
    """``[points]`` weights of a whole run, with mean 1.

    Example:
        >>> weights("linear", 3)
        tensor([0.5000, 1.0000, 1.5000])
    """
    if weighting == "mean":
        return torch.ones(points)
    if weighting == "linear":
        return torch.arange(1, points + 1) * (2.0 / (points + 1))
    counted = math.ceil(points / 4)
    return torch.cat([torch.zeros(points - counted), torch.full((counted,), points / counted)])


def diverged(losses: Losses) -> Tensor:
    """``[runs]`` whether a loss was not finite; a run that diverged stays so."""
    return torch.logical_not(torch.isfinite(losses.outer[:, -1]))


def spacing(horizon: int, window: int, points: int = LOSSES_PER_RUN) -> int:
    """Steps between outer_valid losses: the largest divisor of ``window`` that gives at least ``points`` in a run."""
    return max(step for step in range(1, max(1, horizon // points) + 1) if window % step == 0)
