"""What scripts share: an optimizer line of their own, and dropout whose masks come with the minibatch."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.tasks.image_tasks import ImageData
from lopt.tasks.module_tasks import ModuleTask
from lopt.tasks.task import Batch, NoisyBatch
from lopt.tasks.text_tasks import TextData


@dataclass(frozen=True, kw_only=True)
class Script(ModuleTask):
    """A script. ``steps`` are the lengths it is run for; ``lr``, ``betas``, ``clip`` (of the gradient's norm) its own.

    Where the script has no Adam, ``lr`` is the usual 1e-3.
    """

    data: TextData | ImageData

    steps: ClassVar[tuple[int, ...]]
    lr: ClassVar[float] = 1e-3
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    clip: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        return self.family

    @property
    def loss_floor(self) -> float:
        return 0.0

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        """The script's optimizer, with its schedule inside: Adam, if nothing else is said."""
        return self.adam(params, 1.0)

    def adam(self, params: Mapping[str, Tensor], factor: float) -> Optimizer:
        """Adam with so many times the script's learning rate, constant."""
        return self._clipped(torch.optim.Adam(params.values(), lr=factor * self.lr, betas=self.betas))

    def _clipped(self, optimizer: Optimizer) -> Optimizer:
        if (most := self.clip) is not None:
            params = [param for group in optimizer.param_groups for param in group["params"]]

            def clip(*_: Any) -> None:
                torch.nn.utils.clip_grad_norm_(params, most)

            optimizer.register_step_pre_hook(clip)
        return optimizer


def scheduled(optimizer: Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> Optimizer:
    """The optimizer, whose schedule goes on with every step."""
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def dropped(x: Tensor, noise: Tensor | None, share: float) -> Tensor:
    """``x`` without this share of its numbers, those where normal noise is lowest, the others enlarged to make up for
    it; without noise ``x`` itself."""
    return x if noise is None else x * (noise > NormalDist().inv_cdf(share)) / (1 - share)


def noise_of(batch: Batch | NoisyBatch) -> Tensor | None:
    """The noise of a minibatch, if it has any."""
    return batch.noise if isinstance(batch, NoisyBatch) else None
