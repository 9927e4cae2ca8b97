"""The outer optimizer: Adam, SGD or a learned one, in coordinates whose unit means about the same for every tensor.

``theta = theta_0 + scale z``. Perturbations are ``sigma scale eps``, the meta-gradient is that with respect to ``z``,
and Adam moves ``z``; the origin cancels, so theta itself is what is kept. ``scale`` is the standard deviation that
initialisation gives a weight. Components that a phase does not train have a scale of zero in it.

A learned optimizer depends on the size of what it trains: it is given theta's tensors as they are, and the gradient
with respect to them.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.meta.config import Groups, Scaling
from lopt.optimizer import LearnedOptimizer
from lopt.rule import AnySpec, Theta, unflatten

DIRECTION = ("skip", "mlp.")
LINEAR = ("skip", "step.", "gate.")
MLP = ("mlp.", *LINEAR)  # the other tensors belong to the LSTM
VECTOR = 0.3  # scale of what is no weight matrix
DIRECT = 0.25  # of skip, step control and gate, which change the meta-loss several times as much as other components


def scales(spec: AnySpec, scaling: Scaling, groups: Groups) -> Tensor:
    """Scale ``[P]`` of every component of theta; 0 for those that are not trained.

    ``prior``: ``1 / sqrt(fan_in)`` in matrices, .25 in skip, step control and gate, .3 elsewhere. ``none``: 1.
    """
    parts = []
    for name, shape in spec.shapes().items():
        scale = 1.0
        if scaling == "prior":
            direct = name.startswith(LINEAR)
            scale = 1 / math.sqrt(shape[-2]) if len(shape) >= 2 else DIRECT if direct else VECTOR
        trained = {
            "all": True,
            "direction": name.startswith(DIRECTION),
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


def signal(moments: Moments, trained: Tensor, betas: tuple[float, float]) -> float:
    """How much of the mean gradient is no noise: its squares over those of noise alone, 1 where there is nothing else.

    Of noise the mean of decay b, after k gradients, has (1 - b) (1 - b^2k) / (1 + b) of the variance of a single one.
    """
    begun = 1.0 - betas[0] ** (2.0 * moments.gradients)
    square = (begun * moments.square / (1.0 - betas[1] ** moments.gradients))[trained].sum()
    expected = square * (1.0 - betas[0]) / (1.0 + betas[0])
    return float(torch.square(moments.mean)[trained].sum() / expected) if expected > 0 else 1.0


def _follow(
    moments: Moments, gradient: Tensor, trained: Tensor, betas: tuple[float, float], warmup: int
) -> tuple[Moments, Tensor, Tensor, Tensor]:
    """New moments; mean and square of the gradients without the bias of their start; what moves."""
    mean = torch.where(trained, betas[0] * moments.mean + (1.0 - betas[0]) * gradient, moments.mean)
    square = torch.where(trained, betas[1] * moments.square + (1.0 - betas[1]) * gradient**2, moments.square)
    gradients = moments.gradients + trained
    unbiased, root = (
        moment / (1.0 - beta ** gradients.clamp(min=1.0)) for moment, beta in zip((mean, square), betas, strict=True)
    )
    return Moments(mean, square, gradients), unbiased, root, trained & (gradients > warmup)


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
    moments, mean, square, moves = _follow(moments, gradient, trained, betas, warmup)
    return moments, torch.where(moves, mean / (square.sqrt() + 1e-8), 0.0)


def sgd(
    moments: Moments, gradient: Tensor, trained: Tensor, betas: tuple[float, float], warmup: int = 0
) -> tuple[Moments, Tensor]:
    """One step along the mean of the gradients; arguments and result are those of :func:`adam`.

    Adam moves a component whose gradient is noise as far as one whose gradient never changes; this does not.
    """
    moments, mean, _, moves = _follow(moments, gradient, trained, betas, warmup)
    return moments, torch.where(moves, mean, 0.0)


#: Outer optimizers that need no theta.
PLAIN = {"adam": adam, "sgd": sgd}

_theta = lru_cache(maxsize=4)(Theta.load)


def learned(
    source: str,
    state: dict[str, Any],
    spec: AnySpec,
    theta: Tensor,
    gradient: Tensor,
    scale: Tensor,
    meta_loss: float,
) -> tuple[dict[str, Any], Tensor]:
    """One step of a :class:`LearnedOptimizer` on the tensors of theta.

    Its training loss is ``exp(meta_loss)``, the mean ratio of a loss to the initial one. It is told no validation loss,
    as nobody holds out tasks for it. In the paper the loss of the batch stands for that, too; but it is another batch
    in each iteration, and an optimizer that watches for overfitting takes the difference for it and nearly stops.

    Args:
        source: its own theta, a shipped name or a file.
        state: its state dict, empty before the first step.
        theta, gradient: ``[P]``; the gradient is that with respect to ``z``.
        scale: ``[P]``; tensors with a scale of 0 are left as they are.

    Returns:
        New state dict and theta.

    Source: arXiv:2009.11243, section 4.6.
    """
    tensors = {name: value.clone() for name, value in unflatten(spec, theta).items()}
    grads, scales_ = unflatten(spec, gradient), unflatten(spec, scale)
    for name, value in tensors.items():
        trained = bool(scales_[name].any())
        value.grad = grads[name] / scales_[name] if trained else None
    optimizer = LearnedOptimizer([{"params": list(tensors.values()), "transposed": True}], _theta(source))
    if state:
        optimizer.load_state_dict(state)
    optimizer.step(loss=math.exp(meta_loss))
    return optimizer.state_dict(), torch.cat([value.reshape(-1) for value in tensors.values()])
