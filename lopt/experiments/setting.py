"""What the user chose, and the jobs that most experiments are made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from lopt.evaluation.adam_grid import BATCHED, BATCHED_PARAMS
from lopt.evaluation.jobs import Job, Learned, TaskJob
from lopt.evaluation.opponents import FACTORS
from lopt.evaluation.table import LEARNED
from lopt.tasks.task import Task

Scale = Literal["small", "full"]
T = TypeVar("T")

SEEDS: dict[Scale, tuple[int, ...]] = {"small": (0,), "full": (0, 1, 2)}

#: Trials of Adams: eight learning rates, a third of a decade apart, from 2.2e-4 to 4.6e-2. The paper's eight end at
#: 1e-2, but our runs are shorter.
EIGHT = tuple(FACTORS.index(10.0 ** (k / 3)) for k in range(-2, 6))

#: Optimizers with the trials that run.
Optimizers = Sequence[tuple[str, Sequence[int]]]

#: The learned optimizer, told the number of steps and not.
BOTH: Optimizers = (("lopt", (0,)), ("lopt-untold", (0,)))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the user chose.

    Args:
        scale: ``small`` fits ten minutes of two cores, ``full`` is the real one.
        theta: of the learned optimizer, a shipped name or a file.
        seeds: each decides initial parameters and minibatches.
    """

    scale: Scale = "small"
    theta: str = "default"
    seeds: tuple[int, ...] = (0,)

    def pick(self, small: T, full: T) -> T:
        """The one of the two that belongs to the scale."""
        return small if self.scale == "small" else full

    @cached_property
    def learned(self) -> Learned:
        """The learned optimizer."""
        return Learned.load(self.theta)

    def jobs(
        self,
        suite: str,
        places: Iterable[tuple[str, Task, float, int]],
        optimizers: Optimizers,
        points: int = 0,
    ) -> list[Job]:
        """Runs of every optimizer, trial and seed at every place; Adams that differ in the learning rate alone are
        trained as one batch.

        Args:
            suite: name of the experiment.
            places: name of the task in tables and figures, task, place on the axis, number of steps.
            points: how often losses are recorded along the run, after its beginning; 0 for a run without a curve.
        """
        found: list[Job] = []
        for name, task, x, steps in places:
            for optimizer, trials in optimizers:
                whole = optimizer in BATCHED and not points and task.num_params <= BATCHED_PARAMS
                how: dict[str, Any] = {"learned": self.learned} if optimizer in LEARNED else {}
                how |= {"suite": suite, "task": task, "name": name, "x": x, "horizon": steps, "points": points}
                found += [
                    TaskJob(**how, optimizer=optimizer, seed=seed, trials=some)
                    for some in ([tuple(trials)] if whole else [(trial,) for trial in trials])
                    for seed in self.seeds
                ]
        return found
