"""Evolution-strategies estimates of the gradient of the meta-loss with respect to theta.

Pure functions of losses and perturbations. ``eps`` ``[P]`` is unit normal, one for each antithetic pair: an inner run
under ``theta + sigma eps`` and one under ``theta - sigma eps``, with the same task, initial parameters and minibatches.
With ``delta = L(theta + sigma eps) - L(theta - sigma eps)``, of a window of the two runs,

    gradient = mean over pairs of direction * delta / (2 sigma)

and an estimator says which eps a window is perturbed by, which direction its delta belongs to, and from where the two
runs go on after it:

    ==============  ================  =====================================  ==========================
    estimator       eps               direction                              next window of the pair
    ==============  ================  =====================================  ==========================
    es              new               eps                                    none: a window is a whole run
    truncated_es    new               eps                                    both from the run of +eps
    pes             new               sum of eps since the run began         each from its own
    nres            of the whole run  eps                                    each from its own
    ==============  ================  =====================================  ==========================

``backprop`` is none of these: :mod:`lopt.meta.backprop` differentiates whole runs under theta itself.

``es`` is unbiased for the smoothed loss of whole runs. ``truncated_es`` is biased towards short-term gains. ``pes`` and
``nres`` are unbiased over the windows of a run; the variance of ``pes`` grows with their number, that of ``nres`` does
not. Over runs of several lengths, windows count equally, so a run counts in proportion to its length.

Source: Salimans et al. 2017 (arXiv:1703.03864); Vicol et al. 2021 (arXiv:2112.13835, PES); Li et al. 2023
(arXiv:2304.12180, NRES); Vicol 2023 (arXiv:2304.11153, the same as ES-Single).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

W = TypeVar("W")
EstimatorName = Literal["es", "truncated_es", "pes", "nres", "backprop"]


class Estimator(NamedTuple):
    """What tells the estimators apart; see the table above."""

    one_eps_per_run: bool = False
    sums_eps: bool = False
    shares_state: bool = False

    def directions(self, windows: tuple[W, ...]) -> tuple[W, ...]:
        """The windows of a run whose eps add up to what the delta of its last one is multiplied by.

        The last of these has the eps by which that window is perturbed.

        Args:
            windows: of the run, up to now.

        Example:
            >>> [ESTIMATORS[name].directions((5, 6, 7)) for name in ("truncated_es", "pes", "nres")]
            [(7,), (5, 6, 7), (5,)]
        """
        return windows if self.sums_eps else windows[:1] if self.one_eps_per_run else windows[-1:]


ESTIMATORS: dict[str, Estimator] = {
    "es": Estimator(),
    "truncated_es": Estimator(shares_state=True),
    "pes": Estimator(sums_eps=True),
    "nres": Estimator(one_eps_per_run=True),
}


def antithetic(theta: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """Perturbed thetas ``[2 pairs, P]``: all of ``theta + sigma eps``, then all of ``theta - sigma eps``."""
    return torch.cat([theta + sigma * eps, theta - sigma * eps])


def es_gradient(direction: Tensor, delta: Tensor, sigma: float, out: Tensor | None = None) -> Tensor:
    """``mean_i direction_i delta_i / (2 sigma)``.

    Args:
        direction: ``[pairs, P]``, for ES unit normal.
        delta: ``[pairs]``, loss under ``+ sigma eps`` minus loss under ``- sigma eps``.
        out: ``[pairs, P]``, takes the products; may be ``direction``.

    Returns:
        ``[P]``; for ES the exact gradient in expectation where the loss is at most quadratic in theta.

    Example:
        >>> es_gradient(torch.tensor([[1.0, -1.0]]), torch.tensor([0.4]), sigma=0.1)
        tensor([ 2., -2.])
    """
    return torch.mul(direction, delta[:, None], out=out).mean(dim=0) / (2.0 * sigma)


TAIL = 3.0  # medians


def equalised(delta: Tensor, families: Sequence[str]) -> Tensor:
    """Differences in units of the median of their family's in this iteration, at most ``TAIL`` of them.

    A perceptron that is learned to the last digit makes differences ten times those of a language model, and a few of
    them a hundred times: they would be most of the noise, and all of the gradient.

    Args:
        delta: ``[pairs]``.
        families: of each.

    Example:
        >>> equalised(torch.tensor([0.1, -0.2, 9.0, 0.01]), ["a", "a", "a", "b"])
        tensor([ 0.5000, -1.0000,  3.0000,  1.0000])
    """
    result = torch.zeros_like(delta)
    for family in sorted(set(families)):
        own = torch.tensor([name == family for name in families])
        median = delta[own].abs().median()
        if median > 0:
            result[own] = (delta[own] / median).clamp(-TAIL, TAIL)
    return result
