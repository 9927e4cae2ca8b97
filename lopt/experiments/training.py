"""Runs that train a task, and the optimizers that the experiments share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lopt.evaluation.adam_grid import adam_results
from lopt.evaluation.opponents import FACTORS, OPPONENTS, make_optimizer
from lopt.evaluation.runs import Result, result, train_task
from lopt.experiments.runs import Run
from lopt.optimizer import LearnedOptimizer
from lopt.tasks.adam import AdamConfig
from lopt.tasks.task import VALID_ROWS, Task

#: Adam's learning rates along an axis: eight, a third of a decade apart, from 2.2e-4 to 4.6e-2. The paper's eight end
#: at 1e-2, but our runs are shorter.
ADAM = "adam-tuned"
EIGHT = tuple(FACTORS.index(10.0 ** (k / 3)) for k in range(-2, 6))

#: Opponents whose trials are trained as one batch: what distinguishes them, but for the learning rate.
BATCHED: Mapping[str, AdamConfig] = {
    ADAM: AdamConfig(1.0, "constant"),
    "adamw-cosine-tuned": AdamConfig(1.0, "cosine", weight_decay=0.01),
}
BATCHED_PARAMS = 100_000  # models with more are hardly quicker in a batch

#: The learned optimizer without validation losses.
BLIND = "lopt-blind"


@dataclass(frozen=True, kw_only=True)
class TaskRun(Run):
    """Trains ``problem``; losses are those of :func:`~lopt.evaluation.runs.train_task`, as they count (``limit``).

    Args:
        points: how often losses are recorded along the run.
    """

    problem: Task
    points: int = 1

    @property
    def config(self) -> dict[str, Any]:
        sees = {"valid_rows": VALID_ROWS} if self.theta and self.optimizer != BLIND else {}
        return {"problem": self.problem.config, "points": self.points, **sees}

    @property
    def cost(self) -> float:
        return self.steps * (1e4 + self.problem.num_params)

    def measure(self) -> Result:
        every = max(1, self.steps // self.points)
        curve = train_task(self.problem, self.build, self.seed, self.steps, record_every=every)
        found = result(curve)
        return found if self.points > 1 else replace(found, curve={})

    @property
    def batch(self) -> str:
        """Adams that differ in the learning rate and its schedule alone."""
        if self.optimizer not in BATCHED or self.points > 1 or self.problem.num_params > BATCHED_PARAMS:
            return ""
        return json.dumps([self.task, self.x, self.steps, self.seed, self.config], sort_keys=True)

    def measure_batch(self, runs: Sequence["TaskRun"]) -> list[Result]:
        configs = [replace(BATCHED[run.optimizer], lr=run.lr) for run in runs]
        return adam_results(self.problem, self.seed, self.steps, configs)

    def build(self, params: list[Tensor], steps: int) -> torch.optim.Optimizer:
        """The optimizer of this run."""
        if self.optimizer == BLIND:
            return Blind(params, self.theta, total_steps=steps)
        theta = self.theta or "default"
        return make_optimizer(self.optimizer, params, steps, self.trial, task=self.problem, theta=theta)


class Blind(LearnedOptimizer):
    """A learned optimizer that is never told a validation loss."""

    def observe(
        self,
        train_loss: float | Tensor | None = None,
        valid_loss: float | Tensor | None = None,
        *,
        weight: float | Tensor = 1.0,
    ) -> None:
        super().observe(train_loss, weight=weight)


def learned(theta: str, names: Sequence[str] = ("lopt", "lopt-untold")) -> list[dict[str, Any]]:
    """Fields of a run of the learned optimizer under each of these names."""
    return [{"optimizer": name, "theta": theta} for name in names]


def tuned(name: str = ADAM, trials: Sequence[int] = EIGHT) -> list[dict[str, Any]]:
    """Fields of the runs of an opponent, one for each of these of its trials."""
    found = OPPONENTS[name].trials
    return [{"optimizer": name, "trial": trial, "lr": float(found[trial].get("lr", 1.0))} for trial in trials]
