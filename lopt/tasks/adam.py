"""Adams trained as one batch, on any task whose loss can be vmapped: cheaper than separate runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lopt.tasks.task import Batch, Task

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class AdamConfig:
    """One Adam of a grid, or AdamW if it has weight decay."""

    lr: float
    schedule: Schedule = "constant"
    weight_decay: float = 0.0


def train_adam(
    task: Task,
    seed: int,
    steps: int,
    configs: Sequence[AdamConfig],
    *,
    start: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, dict[str, torch.Size]]:
    """Train with every configuration at once, and return the flat parameters ``[configs, P]`` and their shapes.

    One step of all of them is one batched gradient and one update of ``[configs, P]`` tensors, by the formula of
    ``torch.optim.AdamW`` (betas .9 and .999, eps 1e-8), which without weight decay is ``torch.optim.Adam``:

    ``param -= lr_t * weight_decay * param`` and
    ``param -= lr_t / (1 - .9^t) * mom / (sqrt(rms / (1 - .999^t)) + eps)`` at t = 1, 2, ...

    where the cosine schedule has ``lr_t = lr (1 + cos(pi (t - 1) / steps)) / 2``.

    Args:
        start: number of the first training minibatch.
        on_step: called with the number of steps done and the parameters, before the first and after every step.

    Source: D. Kingma, J. Ba, arXiv:1412.6980; I. Loshchilov, F. Hutter, arXiv:1711.05101.
    """
    init = task.init(seed)
    shapes = {name: value.shape for name, value in init.items()}
    params = flatten(init).repeat(len(configs), 1).requires_grad_()
    mom, rms = torch.zeros_like(params), torch.zeros_like(params)
    constant = [config.schedule == "constant" for config in configs]
    decays = any(config.weight_decay for config in configs)
    batches = task.batches(seed, "train", start)
    if on_step is not None:
        on_step(0, params.detach())
    for t in range(1, steps + 1):
        losses = batched_losses(task, params, shapes, next(batches))
        (grads,) = torch.autograd.grad(losses.sum(), params)
        half_cosine = (1 + math.cos(math.pi * (t - 1) / steps)) / 2
        lrs = [c.lr * (1.0 if flat else half_cosine) for c, flat in zip(configs, constant, strict=True)]
        step_size = torch.tensor([lr / (1 - 0.9**t) for lr in lrs]).unsqueeze(1)
        with torch.no_grad():
            if decays:
                kept = [1 - lr * config.weight_decay for lr, config in zip(lrs, configs, strict=True)]
                params.mul_(torch.tensor(kept).unsqueeze(1))
            mom.lerp_(grads, 1 - 0.9)
            rms.mul_(0.999).addcmul_(grads, grads, value=1 - 0.999)
            denominator = rms.sqrt().div_(math.sqrt(1 - 0.999**t)).add_(1e-8)
            params.addcmul_(step_size, mom / denominator, value=-1.0)
        if on_step is not None:
            on_step(t, params.detach())
    return params.detach(), shapes


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """All parameters in one row ``[P]``."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def batched_losses(task: Task, params: Tensor, shapes: Mapping[str, torch.Size], batch: Batch) -> Tensor:
    """Losses ``[configs]`` of flat parameters ``[configs, P]`` on one batch."""

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return task.loss(values, batch)

    losses: Tensor = torch.func.vmap(loss)(params)
    return losses
