"""A callback for Lightning's Trainer. For Fabric, whose loop is the script's own, there is ``watch_loss``."""

from typing import Any

import torch
from torch import Tensor

from lopt.integrations.unwrap import tell_steps, unwrap
from lopt.optimizer import LearnedOptimizer
from lopt.warnings import warn

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


class LightningCallback(Callback):  # type: ignore[misc]  # the library is not read by mypy
    """Hands the losses of a LightningModule to its :class:`lopt.LearnedOptimizer`.

    * Training losses: what is sent backward, without the factors of a gradient scaler and of
      ``accumulate_grad_batches``; the step sees the mean over its minibatches, each with the same weight, as the
      gradient has it. Where a module optimizes by hand, with several optimizers, each sees what was sent backward
      since a step of any.
    * Validation losses: the metric ``valid_loss`` that the module logs, after each validation during training; of
      several data loaders the mean. Sanity checks and ``trainer.validate`` are left out.
    * ``total_steps``, from the trainer, in automatic optimization, if the optimizer was made without.

    Args:
        valid_loss: the name under which the module logs its validation loss.
        scale: what the losses sent backward are multiplied by: the number of minibatches in a step, where a module
            that optimizes by hand divides by it.

    Raises:
        TypeError: at the beginning of training, the module has no LearnedOptimizer.

    Example::

        class Model(lightning.LightningModule):
            def configure_optimizers(self):
                return LearnedOptimizer(self)

            def validation_step(self, batch, index):
                self.log("val_loss", self.loss(batch))

        lightning.Trainer(callbacks=[LightningCallback()]).fit(Model(), train, valid)
    """

    def __init__(self, valid_loss: str = "val_loss", *, scale: float = 1.0) -> None:
        super().__init__()
        self._valid_loss, self._scale = valid_loss, scale
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._losses = []
        optimizers = self._optimizers(trainer)
        if not optimizers:
            came = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise TypeError(
                f"LightningCallback: expected a LearnedOptimizer among the module's optimizers, got {came}; "
                "return one from configure_optimizers"
            )
        if pl_module.automatic_optimization:
            tell_steps(optimizers[0], trainer.estimated_stepping_batches)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss.float() / scaler.scale(torch.ones((), device=loss.device))  # a power of two: exact
        factor = self._scale * trainer.accumulate_grad_batches
        self._losses.append(loss if factor == 1.0 else loss * factor)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found, losses, self._losses = unwrap(optimizer), self._losses, []
        if found is not None:
            for loss in losses:
                found.observe(train_loss=loss)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        one_each = f"{self._valid_loss}/dataloader_idx_"
        losses = [value for name, value in metrics.items() if name == self._valid_loss or name.startswith(one_each)]
        if not losses:
            warn(
                f"LightningCallback: the module logs no {self._valid_loss!r} in validation, but {sorted(metrics)}; "
                "write LightningCallback(valid_loss=...) with the name of its validation loss"
            )
            return
        mean = torch.stack([torch.as_tensor(loss).detach().float() for loss in losses]).mean()
        for optimizer in self._optimizers(trainer):
            optimizer.observe(valid_loss=mean)

    @staticmethod
    def _optimizers(trainer: Any) -> list[LearnedOptimizer]:
        return [found for found in map(unwrap, trainer.optimizers) if found is not None]
