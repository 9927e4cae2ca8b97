"""The optimizers that a learned one is measured against, each as ``make_optimizer(params, total_steps)``."""

from collections.abc import Iterable

import torch
from torch import Tensor


def adam(params: Iterable[Tensor], total_steps: int, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Adam at a constant learning rate; it has no use for ``total_steps``."""
    return torch.optim.Adam(params, lr=lr)


def adamw_cosine(params: Iterable[Tensor], total_steps: int, lr: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW (weight decay 0.01) whose learning rate falls from ``lr`` to 0 along half a cosine.

    ``lr_t = lr * (1 + cos(pi * t / total_steps)) / 2`` at step t = 0, 1, ... The schedule runs in a hook
    after each step, so that the caller sees a plain optimizer.
    """
    optimizer = torch.optim.AdamW(params, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer
