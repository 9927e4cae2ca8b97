"""A callback for ``transformers.Trainer`` and its subclasses."""

import sys
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from lopt.integrations.unwrap import need, tell_steps
from lopt.optimizer import LearnedOptimizer
from lopt.warnings import warn


class TransformersCallback(TrainerCallback):  # type: ignore[misc]  # the library is not read by mypy
    """Hands the losses of a ``transformers.Trainer`` to its :class:`lopt.LearnedOptimizer`.

    * Training losses: what ``training_step`` returns, summed over the minibatches of a step. The trainer has divided
      each by their number, or by the number of tokens in all of them, so the sum is the mean whose gradient the step
      takes, whatever computes the loss.
    * Validation losses: ``eval_loss`` after each evaluation during training, once for all where there are several
      evaluation data sets, as their mean. Evaluations before the first step of a resumed run are left out: the
      uninterrupted run does not have them.
    * ``total_steps``, from the trainer, if the optimizer was made without.

    Args:
        valid_loss: the name of the metric to take instead of ``eval_loss``, such as ``"eval_code_loss"``.

    Raises:
        TypeError: at the beginning of training, the trainer has another optimizer.

    Example::

        trainer = Trainer(
            model,
            TrainingArguments("out", lr_scheduler_type="constant", eval_strategy="steps", eval_steps=100),
            optimizers=(LearnedOptimizer(model), None),
            callbacks=[TransformersCallback()],
            train_dataset=train, eval_dataset=valid,
        )
    """

    def __init__(self, valid_loss: str | None = None) -> None:
        self._valid_loss = valid_loss
        self._trainer: Any = None
        self._optimizer: LearnedOptimizer | None = None
        self._replaced: dict[str, Any] = {}
        self._share: Tensor | None = None
        self._resumed_at: int | None = None
        self._evaluated: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        remedy = "write Trainer(..., optimizers=(LearnedOptimizer(model), None))"
        optimizer = need(kwargs["optimizer"], "TransformersCallback", remedy)
        self._leave()
        self._optimizer, self._trainer, self._evaluated = optimizer, _trainer_of(self), {}
        self._resumed_at = state.global_step or None
        if args.lr_scheduler_type == "linear" and getattr(self._trainer, "_created_lr_scheduler", True):
            warn(
                "lr_scheduler_type='linear', the default of TrainingArguments, makes the learned steps shorter and "
                "shorter, which they become by themselves; write lr_scheduler_type='constant'"
            )
        tell_steps(optimizer, state.max_steps)
        own, training_step = vars(self._trainer), self._trainer.training_step
        self._replaced = {name: value for name, value in own.items() if name == "training_step"}

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = training_step(*args, **kwargs)
            self._share = loss if self._share is None else self._share + loss
            return loss

        own["training_step"] = watched

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._share = None

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer is not None and self._share is not None:
            self._optimizer.observe(train_loss=self._share)
        self._share = None

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer is None or state.global_step == self._resumed_at:
            return
        names = self._names()
        metrics = kwargs["metrics"]
        self._evaluated.update({name: metrics[name] for name in names if name in metrics})
        if len(self._evaluated) == len(names):  # all data sets, and not later: a checkpoint may follow
            self._optimizer.observe(valid_loss=sum(self._evaluated.values()) / len(names))
            self._evaluated = {}

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()

    def _names(self) -> list[str]:
        """Of the metrics whose mean is the validation loss."""
        if self._valid_loss is not None:
            return [self._valid_loss]
        data = self._trainer.eval_dataset
        return [f"eval_{name}_loss" for name in data] if isinstance(data, dict) else ["eval_loss"]

    def _leave(self) -> None:
        """Training is over, or broke off: the trainer is as it was."""
        if self._trainer is not None:
            del self._trainer.training_step
            vars(self._trainer).update(self._replaced)
        self._trainer, self._optimizer, self._share = None, None, None


def _trainer_of(callback: TrainerCallback) -> Any:
    """The trainer that is calling a callback. It tells callbacks of everything but itself, so look at who called."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("TransformersCallback: expected to be called by a transformers.Trainer that has this callback")
