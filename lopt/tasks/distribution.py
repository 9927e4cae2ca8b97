"""A mixture of tasks: families with weights, data sets, bounds of size and time, and how often tasks are augmented.

Everything about a task follows from the distribution and its seed. Time per step is predicted, not measured
(:mod:`lopt.tasks.cost`), so the clock has no say in what is drawn.

Source: arXiv:2009.11243, section 3.1 (a mixture of families; tasks of more than 100 ms per step are left out);
arXiv:2211.09760, appendix B (how often and by how much tasks are augmented).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lopt.tasks import families, synthetic
from lopt.tasks.augmented import AugmentedTask
from lopt.tasks.cost import CostModel
from lopt.tasks.data import catalogue
from lopt.tasks.families import Family
from lopt.tasks.generators import log_uniform
from lopt.tasks.pieces import pick
from lopt.tasks.sampled import from_config
from lopt.tasks.seeds import derive, generator
from lopt.tasks.task import Task

DRAWS = 1000  # of a task, until one fits

#: Levels and ranges (in decades on both sides) of reparametrisation, each equally often.
LEVELS = ("global", "global", "tensor", "tensor", "parameter")
DECADES = (3.0, 2.0, 1.0)


@dataclass(frozen=True)
class TaskDistribution:
    """A mixture of tasks.

    Args:
        families: name and weight of each; the share of a family is its weight, whatever part of its tasks fits.
        data: names of the data sets that real-data families choose from, none of them held out.
        max_seconds: bound of the predicted time per step; None for none.
        max_params: bound of the number of parameters; None for none.
        reparametrise, reduce_batch, gradient_noise: shares of the tasks that get other units of their parameters, a
            minibatch of a tenth to all of its rows, and noise on their gradients of .01 to 1 times their size.
        cost: what a step is predicted to take.

    Raises:
        ValueError: an unknown family, a weight or a bound that is not positive, a share outside 0 to 1, or a data set
            that is not for meta-training.

    Example:
        >>> some = TaskDistribution({"mlp": 2.0, "quadratic": 1.0}, max_params=5000)
        >>> some.sample(7) == some.sample(7)
        True
    """

    families: tuple[tuple[Family, float], ...]
    data: tuple[str, ...] = catalogue.CORE
    max_seconds: float | None = 0.1
    max_params: int | None = None
    reparametrise: float = 0.0
    reduce_batch: float = 0.0
    gradient_noise: float = 0.0
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        given: Any = self.families
        pairs = given.items() if isinstance(given, Mapping) else given
        object.__setattr__(self, "families", tuple((name, float(weight)) for name, weight in pairs))
        object.__setattr__(self, "data", tuple(self.data))
        if isinstance(self.cost, Mapping):
            object.__setattr__(self, "cost", CostModel(**self.cost))
        known = [*synthetic.FAMILIES, *families.SAMPLERS]
        names = [name for name, _ in self.families]
        if not names or not set(names) <= set(known) or len(set(names)) < len(names):
            raise ValueError(f"families: expected some of {known}, each once, got {names}")
        if not all(weight > 0.0 for _, weight in self.families):
            raise ValueError(f"families: expected positive weights, got {dict(self.families)}")
        for name in ("max_seconds", "max_params"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {bound}")
        for name in ("reparametrise", "reduce_batch", "gradient_noise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        others = sorted(set(self.data) - set(catalogue.META_TRAIN))
        if others:
            raise ValueError(f"data: {others} are not for meta-training; expected some of {catalogue.META_TRAIN}")

    @property
    def names(self) -> list[str]:
        """Of the families."""
        return [name for name, _ in self.families]

    def sample(self, seed: int) -> Task:
        """The task called ``seed``: a family by the weights, then the first of its tasks that fits.

        Raises:
            ValueError: none of many tasks fits.
            FileNotFoundError, ModuleNotFoundError: data of the task is not here; the message says how to get it.
        """
        weights = np.cumsum([weight for _, weight in self.families])
        place = int(np.searchsorted(weights, weights[-1] * generator(seed, "family").random(), side="right"))
        family = self.families[place][0]
        for draw in range(DRAWS):
            task = self._augmented(families.sample_task(derive(seed, "task", draw), (family,), self.data), seed, draw)
            if self._fits(task):
                return task
        raise ValueError(
            f"max_params, max_seconds: {DRAWS} tasks of {family} all have more than {self.max_params} parameters or "
            f"take more than {self.max_seconds} s per step; leave the family out or raise the bound"
        )

    def _fits(self, task: Task) -> bool:
        if self.max_params is not None and task.num_params > self.max_params:
            return False
        return self.max_seconds is None or self.cost.seconds(task, self.max_seconds) <= self.max_seconds

    def _augmented(self, task: Task, seed: int, draw: int) -> Task:
        random = generator(seed, "augmentation", draw)
        rescaled, reduced, noisy = random.random(3) < (self.reparametrise, self.reduce_batch, self.gradient_noise)
        if reduced:
            task = families.with_batch_share(task, float(random.uniform(0.1, 1.0)))
        if not rescaled and not noisy:
            return task
        return AugmentedTask(
            task=task,
            seed=derive(seed, "scales", draw),
            reparametrise=pick(random, LEVELS) if rescaled else "none",
            decades=pick(random, DECADES),
            gradient_noise=log_uniform(random, 0.01, 1.0) if noisy else 0.0,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        values = dataclasses.asdict(self)
        return {**values, "families": dict(self.families), "data": list(self.data)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskDistribution":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: unknown or missing fields, or values out of range.
        """
        return from_config(cls, {**values, "families": tuple(dict(values.get("families", {})).items())})
