"""The outer optimizer: Adam on theta, in coordinates in which a unit means about the same for every tensor.

``theta = theta_0 + scale z``. Perturbations are ``sigma scale eps``, the meta-gradient is that with respect to ``z``,
and Adam moves ``z``; the origin cancels, so theta itself is what is kept. ``scale`` is the standard deviation that
initialisation gives a weight. Components that a phase does not train have a scale of zero in it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.meta.config import Groups, Scaling
from lopt.theta import ThetaSpec

LINEAR = ("skip", "step.")
MLP = ("mlp.", *LINEAR)  # the other tensors belong to the LSTM
VECTOR = 0.3  # scale of what is no weight matrix
DIRECT = 0.1  # of skip and step control, which change the meta-loss ten times as much as other components


def scales(spec: ThetaSpec, scaling: Scaling, groups: Groups) -> Tensor:
    """Scale ``[P]`` of every component of theta; 0 for those that are not trained.

    ``prior``: ``1 / sqrt(fan_in)`` in matrices, .1 in skip and step control, .3 elsewhere. ``none``: 1.
    """
    parts = []
    for name, shape in spec.shapes().items():
        scale = 1.0
        if scaling == "prior":
            direct = name.startswith(LINEAR)
            scale = 1 / math.sqrt(shape[0]) if len(shape) == 2 else DIRECT if direct else VECTOR
        trained = {
            "all": True,
            "linear": name.startswith(LINEAR),
            "mlp": name.startswith(MLP),
            "lstm": not name.startswith(MLP),
        }[groups]
        parts.append(torch.full((math.prod(shape),), scale if trained else 0.0))
    return torch.cat(parts)


class Moments(NamedTuple):
    """Adam's state; a component that is not trained keeps its own."""

    mean: Tensor  # [P]
    square: Tensor  # [P]
    gradients: Tensor  # [P] how many so far

    @classmethod
    def zeros(cls, num_floats: int) -> "Moments":
        """State before the first gradient."""
        return cls(torch.zeros(num_floats), torch.zeros(num_floats), torch.zeros(num_floats))


def adam(
    moments: Moments, gradient: Tensor, trained: Tensor, betas: tuple[float, float], warmup: int = 0
) -> tuple[Moments, Tensor]:
    """One step of Adam, each component with a count of its own.

    Args:
        gradient: ``[P]``.
        trained: ``[P]`` bool; elsewhere nothing happens.
        warmup: gradients of a component that only go into its moments.

    Returns:
        New moments, and the direction ``[P]`` to subtract, 0 for components that do not move.

    Source: arXiv:1412.6980.
    """
    mean = torch.where(trained, betas[0] * moments.mean + (1.0 - betas[0]) * gradient, moments.mean)
    square = torch.where(trained, betas[1] * moments.square + (1.0 - betas[1]) * gradient**2, moments.square)
    gradients = moments.gradients + trained
    moves = trained & (gradients > warmup)
    corrected = [m / (1.0 - beta ** gradients.clamp(min=1.0)) for m, beta in zip((mean, square), betas, strict=True)]
    direction = corrected[0] / (corrected[1].sqrt() + 1e-8)
    return Moments(mean, square, gradients), torch.where(moves, direction, torch.zeros_like(direction))
