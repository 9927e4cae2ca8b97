"""State of a loss, and what the tensor level sees of it: running mean and variance, first and lowest mean.

Pure functions of a state ``[8]``, a tensor with the fields of :class:`LossState`; csrc/rule/losses.h has them in C++.

Source: arXiv:2009.11243, appendix C.3, with the constants of the author's port; the rises are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule.constants import (
    EPSILON,
    FALL_SCALE,
    INPUT_BOUND,
    LARGEST,
    LOSS_OUTLIER,
    MIDDLE_SHARE,
    RISE_SCALE,
    SLOW_SHARE,
    TINY,
)


class LossState(NamedTuple):
    """Fields of the state of a loss, all zero before the first."""

    mean: Tensor  # running mean, with the bias of its start at zero
    var: Tensor  # running variance, likewise
    updates: Tensor  # number of losses so far
    last: Tensor  # loss
    first: Tensor  # mean without bias
    lowest: Tensor  # mean without bias
    middle: Tensor  # running mean with a decay of .99, with its bias
    slow: Tensor  # the same with .999

    @classmethod
    def of(cls, state: Tensor) -> "LossState":
        """The fields of a state ``[8]``."""
        return cls(*state.unbind())


def init_loss(like: Tensor) -> Tensor:
    """State before any loss ``[8]``, in dtype and on device of ``like``."""
    return like.new_zeros(len(LossState._fields))


def next_loss(state: Tensor, loss: Tensor, decay: float, robust: bool = False) -> Tensor:
    """State of a loss after one more; ``var`` uses the new, uncorrected mean.

    Args:
        robust: a loss more than ten standard deviations from the mean of those before counts as one at that distance,
            and in the mean as that mean: one loss cannot blind the inputs. If losses stay far away, they are soon
            within reach, since the deviation grows threefold with each.
    """
    old, center = LossState.of(state), loss
    if robust:
        reach = LOSS_OUTLIER * (loss_spread(state, decay) + EPSILON)
        middle = corrected_mean(state, decay)
        near = torch.minimum(torch.maximum(loss, middle - reach), middle + reach)
        far = (old.updates > 0) & (near != loss)
        center, loss = torch.where(far, middle, loss), torch.where(far, near, loss)
    fast = decay * old.mean + (1.0 - decay) * center
    var = decay * old.var + (1.0 - decay) * torch.square(fast - loss)
    middle, slow = (
        mean + share * (center - mean) for share, mean in ((MIDDLE_SHARE, old.middle), (SLOW_SHARE, old.slow))
    )
    new = LossState(fast, var, old.updates + 1.0, loss, old.first, old.lowest, middle, slow)
    now, only = corrected_mean(torch.stack(new), decay), new.updates == 1.0
    first, lowest = torch.where(only, now, old.first), torch.where(only, now, torch.minimum(old.lowest, now))
    return torch.stack(new._replace(first=first, lowest=lowest))


def told(state: Tensor, loss: Tensor, decay: float = 0.9) -> Tensor:
    """State of a loss after one more, a non-finite one counts as none."""
    safe = torch.where(torch.isfinite(loss), bounded_loss(loss), torch.zeros_like(loss))
    return torch.where(torch.isfinite(loss), next_loss(state, safe, decay), state)


def bounded_loss(loss: Tensor) -> Tensor:
    """A loss so small that its square is finite, within +-1e14."""
    return torch.clamp(loss, -LARGEST, LARGEST)


def _correction(state: Tensor, decay: float) -> Tensor:
    return 1.0 / (1.0 - torch.pow(state.new_full((), decay), LossState.of(state).updates) + EPSILON)


def corrected_mean(state: Tensor, decay: float) -> Tensor:
    """Bias-corrected mean of the losses, 0 before the first."""
    mean = LossState.of(state).mean
    return torch.where(LossState.of(state).updates > 0, mean * _correction(state, decay), torch.zeros_like(mean))


def standardise_loss(state: Tensor, loss: Tensor, decay: float) -> Tensor:
    """``clip((loss - mean) / std, -5, 5)`` with bias-corrected mean and variance."""
    old, correction = LossState.of(state), _correction(state, decay)
    standard = (loss - old.mean * correction) * torch.rsqrt(old.var * correction + EPSILON)
    return torch.clamp(standard, -INPUT_BOUND, INPUT_BOUND)


def loss_spread(state: Tensor, decay: float) -> Tensor:
    """Standard deviation of the losses around their mean."""
    return torch.sqrt(LossState.of(state).var * _correction(state, decay))


def loss_fall(state: Tensor, decay: float) -> Tensor:
    """``sign(x) ln(1 + 10 |x|)`` within +-5, with ``x`` the fall of the losses over the last thousand.

    In their standard deviations: the mean with a decay of .999 above that with .99, both without bias.

    Far above 0 while a loss falls fast, and about 0 where it stands still or noise is all there is to see.
    """
    old = LossState.of(state)
    middle, slow = (
        mean / (1.0 - torch.pow(state.new_full((), 1.0 - share), old.updates) + EPSILON)
        for share, mean in ((MIDDLE_SHARE, old.middle), (SLOW_SHARE, old.slow))
    )
    fall = (slow - middle) / (loss_spread(state, decay) + EPSILON)
    return torch.sign(fall) * torch.clamp(torch.log1p(FALL_SCALE * torch.abs(fall)), max=INPUT_BOUND)


def loss_rise(state: Tensor, decay: float, spread: Tensor | float = 0.0) -> Tensor:
    """``ln(1 + 100 (mean - lowest) / (first - lowest + spread))``, at most 5: how much of what was gained is lost.

    0 while the mean of the losses falls, .7 when a hundredth of the way down is lost, 4.6 at the first loss. A rising
    validation loss is overfitting, a rising training loss too large a step. Does not depend on the loss' scale or zero.

    Args:
        spread: of the losses, in their units: as long as less than that is gained, a rise may be noise.
    """
    old = LossState.of(state)
    above, gained = torch.clamp(corrected_mean(state, decay) - old.lowest, min=0.0), old.first - old.lowest
    return torch.clamp(torch.log1p(RISE_SCALE * above / (gained + spread + TINY)), max=INPUT_BOUND)
