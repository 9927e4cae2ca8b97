"""Losses on their way into an optimizer's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lopt import kernels
from lopt.rule import Rule, Theta, tensor_lstm
from lopt.rule.losses import bounded_loss, told
from lopt.rule.tensor_lstm import Globals
from lopt.state import sample
from lopt.warnings import warn

Loss = float | Tensor | None


class Losses:
    """What was told since the last step, and ever.

    Attributes:
        waiting: a training loss was observed that no step has used yet.
        valid_alone: validation losses were told, and never a training loss; None before any loss.
        level: takes losses in compiled code: that of the steps, once there was one.
        queued: validation losses wait for those of other ranks.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.valid_alone: bool | None = None
        self.level: kernels.TensorLevel | None = None
        self.queued = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "level": None}

    def note(self, train: Loss, valid: Loss = None) -> None:
        """Losses are told."""
        if train is not None:
            self.valid_alone = False
        elif valid is not None and self.valid_alone is None:
            self.valid_alone = True

    def use(self) -> None:
        """A step uses what waits."""
        self.waiting = False
        if self.valid_alone:
            self.valid_alone = False  # said once
            warn(
                "validation losses were observed, and no training loss: they are compared with training losses, so "
                "they do nothing; give step(loss=...), or observe(train_loss=...)"
            )

    def follow(self, shared: Mapping[str, Tensor] | None) -> None:
        """Say what the state says that all tensors share, after it was loaded."""
        self.waiting, self.valid_alone, self.level, self.queued = False, None, None, False
        if shared is not None:
            self.queued = float(shared["pending_valid"][1]) > 0
            self.waiting = float(shared["pending_loss"][1]) > 0
            if self.waiting or float(shared["train_loss"][2]) > 0:
                self.valid_alone = False
            elif float(shared["valid_loss"][2]) > 0:
                self.valid_alone = True

    def queue(self, shared: Mapping[str, Tensor], weights: Mapping[str, Tensor], valid: Loss) -> None:
        """Keep a validation loss until the next step, where it meets those of other ranks."""
        like = sample(weights)
        loss = torch.as_tensor(valid, dtype=like.dtype, device=like.device).reshape(())
        one = torch.stack([bounded_loss(loss), torch.ones_like(loss)])
        shared["pending_valid"].add_(torch.where(torch.isfinite(loss), one, torch.zeros_like(one)))
        self.queued = True

    def write(
        self,
        implementation: str,
        theta: Theta[Any],
        weights: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        train: Loss,
        valid: Loss = None,
        weight: Loss = 1.0,
    ) -> None:
        """Add a training loss to those of the next step, and take a validation loss, in place."""
        like, of_rule = sample(weights), isinstance(theta.spec, Rule)
        compiled = implementation != "reference" and not of_rule
        if train is not None and not (compiled and isinstance(weight, float) and weight == 1.0):
            loss, part = (torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(()) for x in (train, weight))
            given = torch.isfinite(loss) & torch.isfinite(part) & (part > 0)
            part = bounded_loss(part)
            shared["pending_loss"].add_(torch.where(given, torch.stack([part * bounded_loss(loss), part]), 0.0))
            train = None
        if train is None and valid is None:
            return
        if compiled:
            if self.level is None:
                rows = tensor_lstm.init_rows(theta.spec, weights, 0)
                self.level = kernels.TensorLevel(implementation, theta, (), rows)
            self.level.begin(shared, train, valid)
            return
        loss = torch.as_tensor(valid, dtype=like.dtype, device=like.device).reshape(())
        if of_rule:
            shared["valid_loss"].copy_(told(shared["valid_loss"], loss))
            return
        old = Globals(*(shared[name] for name in Globals._fields))
        for name, value in tensor_lstm.observe_valid(theta.spec, old, loss)._asdict().items():
            shared[name].copy_(value)
