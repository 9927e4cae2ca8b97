"""The learned optimizer against Adams of the grid, chosen in several ways: the scores of the small suite."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lopt.evaluation.comparison import Measure, Runs
from lopt.evaluation.table import LossName, Run
from lopt.tasks.adam import Schedule


class Reference(NamedTuple):
    """An Adam whose learning rate is fixed, or the best of the grid, for each task, by some loss."""

    name: str
    schedule: Schedule
    choice: float | LossName


#: References per loss. Choosing by the loss that is compared is an oracle's choice: nobody has it for ``test_loss``.
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
    """Ratios of several tasks: geometric mean, share of the tasks that are no worse, the task with the largest."""

    ratio: float
    no_worse: float
    worst: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """The learned optimizer, told the number of steps (``hint``) or not, against one reference at one horizon.

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


def scores(runs: Sequence[Run]) -> list[Score]:
    """All comparisons that the rows of an evaluation allow: horizons, losses, references, hints."""
    learned = [run for run in runs if run.name in ("lopt", "lopt-untold")]
    return [
        found
        for horizon in dict.fromkeys(run.horizon for run in learned)
        for loss, references in REFERENCES.items()
        for reference in references
        for hint in dict.fromkeys(run.hint for run in learned)
        if (found := score(runs, horizon, hint, loss, reference)) is not None
    ]


def score(runs: Sequence[Run], horizon: int, hint: bool, loss: LossName, reference: Reference) -> Score | None:
    """One of them; None if no task has the runs for it."""
    choice = reference.choice
    name = "lopt" if hint else "lopt-untold"
    other = "adam-grid" if reference.schedule == "constant" else f"adam-{reference.schedule}-grid"
    some = [
        run
        for run in runs
        if run.horizon == horizon
        and (run.name == name or (run.name == other and (isinstance(choice, str) or run.lr == choice)))
    ]
    compared = Runs(some, choice=choice if isinstance(choice, str) else loss)
    measure: Measure = "train" if loss == "train_loss" else "test"
    one = compared.compare(name, other, horizon, measure)
    if one is None:
        return None
    seeds = dict.fromkeys(run.seed for run in some if run.name == name)
    by_seed = [compared.compare(name, other, horizon, measure, seed=seed) for seed in seeds]
    means = [each.ratio for each in by_seed if each is not None]
    return Score(
        horizon=horizon,
        hint=hint,
        loss=loss,
        reference=reference.name,
        summary=Summary(one.ratio, one.no_worse, one.worst),
        spread=statistics.stdev(means) if len(means) > 1 else math.nan,
        ratios=one.ratios,
    )
