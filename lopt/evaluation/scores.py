"""How the learned optimizer is scored against references, from the rows of an evaluation."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lopt.evaluation.table import LossName, Run
from lopt.tasks.adam import Schedule

#: A ratio up to this counts as "no worse".
NO_WORSE = 1.02

#: The floor of a ratio is this share of the initial loss.
FLOOR = 0.01


class Reference(NamedTuple):
    """An opponent: an Adam whose learning rate is fixed, or the best of the grid, for each task, by some loss."""

    name: str
    schedule: Schedule
    choice: float | LossName


#: Opponents per loss. Choosing by the loss that is compared is an oracle's choice: nobody has it for ``test_loss``.
REFERENCES: dict[LossName, tuple[Reference, ...]] = {
    "train_loss": (
        Reference("Adam, best of 7 lrs", "constant", "train_loss"),
        Reference("Adam cosine, best of 7 lrs", "cosine", "train_loss"),
        Reference("Adam 1e-3", "constant", 1e-3),
        Reference("Adam cosine 3e-2", "cosine", 3e-2),
    ),
    "test_loss": (
        Reference("Adam, oracle's lr", "constant", "test_loss"),
        Reference("Adam cosine, oracle's lr", "cosine", "test_loss"),
        Reference("Adam, lr by valid", "constant", "valid_loss"),
        Reference("Adam cosine, lr by valid", "cosine", "valid_loss"),
        Reference("Adam 1e-3", "constant", 1e-3),
        Reference("Adam cosine 3e-2", "cosine", 3e-2),
    ),
}


class Summary(NamedTuple):
    """Ratios of several tasks in three numbers."""

    ratio: float  # geometric mean
    no_worse: float  # share of the tasks with a ratio of at most NO_WORSE
    worst: str  # the task with the largest ratio


@dataclass(frozen=True, kw_only=True)
class Score:
    """The learned optimizer against one reference at one horizon.

    ``spread`` is the sample standard deviation over the seeds of the geometric mean (NaN for one seed), with the
    reference's learning rates as chosen over all of them.
    """

    horizon: int
    hint: bool
    loss: LossName
    reference: str
    summary: Summary
    spread: float
    ratios: dict[str, float]


def ratio(loss: float, reference: float, initial: float) -> float:
    """``(loss + f) / (reference + f)`` with f = 1% of the initial loss: below 1 is better than the reference.

    Example:
        >>> round(ratio(0.5, 1.0, 2.0), 4)
        0.5098
    """
    return (loss + FLOOR * initial) / (reference + FLOOR * initial)


def summarise(ratios: Mapping[str, float]) -> Summary:
    """Geometric mean, share of tasks no worse, and the worst task.

    Example:
        >>> summarise({"a": 0.5, "b": 2.0})
        Summary(ratio=1.0, no_worse=0.5, worst='b')
    """
    mean = statistics.geometric_mean(ratios.values())
    no_worse = statistics.fmean(value <= NO_WORSE for value in ratios.values())
    return Summary(mean, no_worse, max(ratios, key=lambda task: ratios[task]))


def score(runs: Sequence[Run], horizon: int, hint: bool, loss: LossName, reference: Reference) -> Score:
    """Compare the learned optimizer with a reference; losses are averaged over the seeds, one ratio per task.

    Args:
        runs: rows of an evaluation; every task has the same seeds.
    """
    over_seeds: dict[str, float] = {}
    by_seed: dict[int, dict[str, float]] = {}
    for task in dict.fromkeys(run.task for run in runs):
        here = [run for run in runs if run.task == task and run.horizon == horizon]
        learned = [run for run in here if run.optimizer == "lopt" and run.hint == hint]
        adam = _opponent(here, reference)
        over_seeds[task] = _ratio_of_means(learned, adam, loss)
        for seed in sorted(run.seed for run in learned):
            one = [[run for run in group if run.seed == seed] for group in (learned, adam)]
            by_seed.setdefault(seed, {})[task] = _ratio_of_means(one[0], one[1], loss)
    means = [summarise(ratios).ratio for ratios in by_seed.values()]
    return Score(
        horizon=horizon,
        hint=hint,
        loss=loss,
        reference=reference.name,
        summary=summarise(over_seeds),
        spread=statistics.stdev(means) if len(means) > 1 else math.nan,
        ratios=over_seeds,
    )


def scores(runs: Sequence[Run]) -> list[Score]:
    """All comparisons that the rows of an evaluation allow: horizons, hints, losses, references."""
    runs = [run for run in runs if run.name != "lopt-averaged"]
    learned = [run for run in runs if run.optimizer == "lopt"]
    return [
        score(runs, horizon, hint, loss, reference)
        for horizon in dict.fromkeys(run.horizon for run in learned)
        for loss, references in REFERENCES.items()
        for reference in references
        for hint in dict.fromkeys(run.hint for run in learned)
    ]


def _opponent(runs: Sequence[Run], reference: Reference) -> list[Run]:
    """The runs of the reference's learning rate, all on one task and one horizon."""
    grid: dict[float, list[Run]] = {}
    for run in runs:
        if run.optimizer == "adam" and run.schedule == reference.schedule:
            grid.setdefault(run.lr, []).append(run)
    choice = reference.choice
    if not isinstance(choice, str):
        return grid[choice]
    return min(grid.values(), key=lambda same_lr: _mean(same_lr, choice))


def _ratio_of_means(learned: Sequence[Run], adam: Sequence[Run], loss: LossName) -> float:
    return ratio(_mean(learned, loss), _mean(adam, loss), _mean(learned, f"initial_{loss}"))


def _mean(runs: Iterable[Run], column: str) -> float:
    return statistics.fmean(getattr(run, column) for run in runs)
