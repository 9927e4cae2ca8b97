"""An optimizer that notes what trainers tell it, for the tests in integrations/."""

from typing import Any

from lopt import LearnedOptimizer
from lopt.rule.losses import LossState


class Seen(LearnedOptimizer):
    """Notes what it is told: the training loss of each step, and the validation losses with their step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.train: list[float] = []
        self.valid: list[tuple[int, float]] = []
        self.register_step_post_hook(lambda *_: self.train.append(self._last()))

    def _last(self) -> float:
        return LossState.of(self.param_groups[0]["train_loss"]).last.item()

    def observe(self, train_loss: Any = None, valid_loss: Any = None, **options: Any) -> None:
        super().observe(train_loss, valid_loss, **options)
        if valid_loss is not None:
            self.valid.append((len(self.train), float(valid_loss)))
