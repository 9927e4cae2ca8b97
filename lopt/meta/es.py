"""Evolution-strategies estimates of the gradient of the meta-loss with respect to theta.

Pure functions of losses and perturbations. ``eps`` ``[pairs, P]`` is unit normal, one row per antithetic pair: an inner
run under ``theta + sigma eps`` and one under ``theta - sigma eps``, with the same task, initial parameters and
minibatches.

With ``delta = L(theta + sigma eps) - L(theta - sigma eps)``, one number per pair::

    ES:   gradient = mean over pairs of eps delta / (2 sigma)
    PES:  xi += eps;  gradient = mean over pairs of xi delta / (2 sigma);  xi = 0 where an inner run starts anew

ES is unbiased for the smoothed loss of the whole run when it sees the whole run, and biased towards short-term gains
when it sees a window of it. PES removes that bias: ``xi`` sums the perturbations of all windows since the run began.

Source: Salimans et al. 2017 (arXiv:1703.03864); Vicol et al. 2021 (arXiv:2112.13835); ``truncated_es.py`` and
``truncated_pes.py`` of google/learned_optimization for the treatment of runs that end inside a window.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PES(NamedTuple):
    """Result of :func:`pes_gradient`."""

    gradient: Tensor  # [P]
    xi: Tensor  # [pairs, P] perturbations accumulated since each run began


def antithetic(theta: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """Perturbed thetas ``[2 pairs, P]``: all of ``theta + sigma eps``, then all of ``theta - sigma eps``."""
    return torch.cat([theta + sigma * eps, theta - sigma * eps])


def window_mean(losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean ``[runs]`` of ``losses`` ``[steps, runs]`` over the steps where ``mask`` is true (all, if there is none)."""
    return losses.mean(dim=0) if mask is None else (losses * mask).sum(dim=0) / mask.sum(dim=0)


def es_gradient(eps: Tensor, delta: Tensor, sigma: float) -> Tensor:
    """Antithetic ES: ``mean_i eps_i delta_i / (2 sigma)``.

    Args:
        eps: ``[pairs, P]``, unit normal.
        delta: ``[pairs]``, loss under ``+ sigma eps`` minus loss under ``- sigma eps``.

    Returns:
        ``[P]``; the exact gradient in expectation where the loss is at most quadratic in theta.

    Example:
        >>> es_gradient(torch.tensor([[1.0, -1.0]]), torch.tensor([0.4]), sigma=0.1)
        tensor([ 2., -2.])
    """
    return (eps * delta[:, None]).mean(dim=0) / (2.0 * sigma)


def pes_gradient(
    eps: Tensor,
    xi: Tensor,
    plus: Tensor,
    minus: Tensor,
    sigma: float,
    done: Tensor | None = None,
    mask: Tensor | None = None,
) -> PES:
    """Persistent ES over one window of every pair.

    Args:
        eps: ``[pairs, P]`` perturbations of this window.
        xi: ``[pairs, P]`` sum of the perturbations of earlier windows of the same runs, 0 where a run is new.
        plus, minus: ``[steps, pairs]`` losses under ``+ sigma eps`` and ``- sigma eps``.
        done: ``[steps, pairs]``, true at the step where a run ends inside the window and another begins. From that step
            on (itself included, as in the source) the losses belong to the new run, which has seen ``eps`` only.
        mask: ``[steps, pairs]``, false at steps whose loss does not count.
    """
    done = torch.zeros_like(plus, dtype=torch.bool) if done is None else done
    counted = torch.ones_like(plus) if mask is None else mask.to(plus)
    fresh = torch.cumsum(done, dim=0) > 0
    delta = (plus - minus) * counted / counted.sum(dim=0)
    old = torch.where(fresh, torch.zeros_like(delta), delta).sum(dim=0)
    new = torch.where(fresh, delta, torch.zeros_like(delta)).sum(dim=0)
    xi = xi + eps
    gradient = es_gradient(xi, old, sigma) + es_gradient(eps, new, sigma)
    return PES(gradient, torch.where(fresh[-1][:, None], eps, xi))
