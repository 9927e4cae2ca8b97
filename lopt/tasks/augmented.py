"""Tasks made harder to recognise: parameters in other units, and noise on gradients.

With scales ``s``, an augmented task has the parameters ``x / s`` where the task has ``x``: the same losses, other sizes
of parameters and gradients. Noise on gradients is that of smaller minibatches, without their saving of time.

Source: arXiv:2211.09760, appendix B, and google/learned_optimization (reparametrisation and its three levels).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.seeds import generator
from lopt.tasks.task import SplitName, Task

Level = Literal["none", "global", "tensor", "parameter"]


class NoisyGradientBatch(NamedTuple):
    """A minibatch of the task within, and what is added to the gradient of its loss."""

    batch: Any
    noise: Tensor  # [num_params]


@dataclass(frozen=True, kw_only=True)
class AugmentedTask(Task):
    """Another task with its parameters rescaled and noise on its gradients; the value of its loss has no noise.

    Args:
        task: the task within.
        seed: of the scales.
        reparametrise: one scale for all parameters, one for each tensor, one for each parameter, or none.
        decades: scales are ``10^u`` with ``u`` uniform in ``[-decades, decades]``.
        gradient_noise: deviation of what is added to the gradient in every step, relative to the root mean square of
            the same tensor's gradient at the initial parameters of seed 0.

    Example:
        >>> from lopt.tasks import sample_task
        >>> task = sample_task(0, ["mlp"])
        >>> scaled = AugmentedTask(task=task, reparametrise="tensor", decades=2.0)
        >>> scaled.initial_loss(0) == task.initial_loss(0)
        True
    """

    task: Task
    seed: int = 0
    reparametrise: Level = "none"
    decades: float = 1.0
    gradient_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.reparametrise not in get_args(Level):
            raise ValueError(f"reparametrise: expected one of {get_args(Level)}, got {self.reparametrise!r}")
        for name in ("decades", "gradient_noise"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        changes = [] if self.reparametrise == "none" else [f"{self.reparametrise}-scale"]
        changes += ["noise"] if self.gradient_noise else []
        return "+".join([self.task.name, *changes])

    @property
    def config(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "task": self.task.config,
            "seed": self.seed,
            "reparametrise": self.reparametrise,
            "decades": self.decades,
            "gradient_noise": self.gradient_noise,
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.task.shapes

    @property
    def transposed(self) -> frozenset[str]:
        return self.task.transposed

    @property
    def loss_floor(self) -> float | None:
        return self.task.loss_floor

    @property
    def batch_work(self) -> float:
        return self.task.batch_work

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """``s`` of every tensor, ``[]`` or of its shape."""
        random = generator(self.seed, "scales")
        if self.reparametrise == "parameter":
            return {name: self._power(random.uniform(-1.0, 1.0, shape)) for name, shape in self.shapes.items()}
        count = len(self.shapes) if self.reparametrise == "tensor" else 1
        drawn = random.uniform(-1.0, 1.0, count) if self.reparametrise != "none" else np.zeros(1)
        return {name: self._power(drawn[i % count]) for i, name in enumerate(self.shapes)}

    def _power(self, exponent: Any) -> Tensor:
        return torch.from_numpy(np.asarray(10.0 ** (self.decades * exponent), dtype=np.float32))

    @cached_property
    def noise_deviations(self) -> Tensor:
        """Of the noise of every parameter ``[num_params]``."""
        params = {name: value.requires_grad_() for name, value in self.init(0).items()}
        with torch.enable_grad():
            loss = self._clean_loss(params, next(self.task.batches(0, "train")))
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        flat = [grad.nan_to_num(0.0, 0.0, 0.0).reshape(-1) for grad in grads]
        return torch.cat([self.gradient_noise * grad.square().mean().sqrt().expand_as(grad) for grad in flat])

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: value / self.scales[name] for name, value in self.task.init(seed).items()}

    def _clean_loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        device = next(iter(params.values())).device
        scales = self.on(device, "scales")
        return self.task.loss({name: value * scales[name] for name, value in params.items()}, batch)

    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        if not isinstance(batch, NoisyGradientBatch):
            return self._clean_loss(params, batch)
        loss, begin = self._clean_loss(params, batch.batch), 0
        for value in params.values():  # zero in value; in the gradient the noise
            noise = batch.noise[begin : begin + value.numel()].reshape(value.shape)
            loss = loss + ((value - value.detach()) * noise).sum()
            begin += value.numel()
        return loss

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Any]:
        noisy = self.gradient_noise > 0.0 and split == "train"
        for step, batch in enumerate(self.task.batches(seed, split, start), start):
            if noisy:
                random = generator(seed, "gradient noise", step)
                noise = torch.from_numpy(random.standard_normal(self.num_params, dtype=np.float32))
                batch = NoisyGradientBatch(batch, noise * self.noise_deviations)
            yield batch
