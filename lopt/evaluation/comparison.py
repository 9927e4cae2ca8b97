"""What the rows of an evaluation say: one optimizer against each of the others, over tasks, by step and by second.

A ratio is ``(L - b + f) / (L_other - b + f)`` with losses L that are means over the seeds, f = 1% of what the initial
loss is above b, and b = 0, or the lowest loss of any run of the task where that is negative (flows): below 1 is
better. A task counts as won below .98 and as lost above 1.02, so that a tie is neither. Intervals are those of the
bootstrap over tasks, 95%.

The trial of an optimizer with several is that of the least mean loss, by default on outer_valid, for each task and
horizon. By second, two optimizers are compared when the quicker of them ends; the other's loss is interpolated there.
Their seconds are steps times the seconds per step of :mod:`lopt.evaluation.step_times`, or, where those are not
measured, the runs' own if they are of one machine.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lopt.evaluation.table import LossName, Run

Measure = Literal["train", "test"]
Per = Literal["step", "second"]
MEASURES: tuple[Measure, ...] = ("train", "test")

#: A ratio up to this counts as "no worse".
NO_WORSE = 1.02

#: The floor of a ratio is this share of the initial loss.
FLOOR = 0.01

#: Resamples of a bootstrap, and its seed.
RESAMPLES = 10_000

#: Adams of both schedules of the grid together, as one tuned optimizer.
GRIDS = "adam-grids"

Place = tuple[str, int]  # task and horizon
Points = Sequence[tuple[int, float, float, float]]  # step, seconds, training and test loss along a run


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One optimizer against another at one horizon, or at all (None), by task: ``ratios``, and both losses."""

    name: str
    other: str
    horizon: int | None
    measure: Measure
    per: Per
    ratios: dict[str, float]
    losses: dict[str, tuple[float, float]]

    @property
    def of_losses(self) -> float | None:
        """Geometric mean of L / L_other over the tasks where both are above 0; None if there is none."""
        above = [mine / theirs for mine, theirs in self.losses.values() if min(mine, theirs) > 0]
        return statistics.geometric_mean(above) if above else None

    @property
    def better(self) -> float:
        """Share of tasks with a smaller loss, by however little."""
        return statistics.fmean(value < 1 for value in self.ratios.values())

    @property
    def won(self) -> float:
        """Share of tasks with a clearly smaller loss."""
        return statistics.fmean(value < 2 - NO_WORSE for value in self.ratios.values())

    @property
    def lost(self) -> float:
        """Share of tasks with a clearly larger loss."""
        return statistics.fmean(value > NO_WORSE for value in self.ratios.values())

    @property
    def no_worse(self) -> float:
        """Share of tasks that are not lost."""
        return statistics.fmean(value <= NO_WORSE for value in self.ratios.values())

    @property
    def worst(self) -> str:
        """The task with the largest ratio."""
        return max(self.ratios, key=lambda task: self.ratios[task])

    @property
    def ratio(self) -> float:
        """Geometric mean over tasks."""
        return statistics.geometric_mean(self.ratios.values())

    @property
    def median(self) -> float:
        """Median over tasks."""
        return statistics.median(self.ratios.values())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Of :attr:`ratio`: 95% of the bootstrap over tasks."""
        return bootstrap(list(self.ratios.values()))


class Runs:
    """Runs of an evaluation, grouped; tuned optimizers by their chosen trial.

    Args:
        runs: rows of one theta (and of any opponents). A task that several suites have counts once for each, by the
            name of the suite and its own.
        budgets: how many trials an optimizer with several has; all that the rows hold if it is not named.
        step_times: seconds per step by suite, SHA-256 of the task, and optimizer.
        choice: the loss by which a trial is chosen.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        budgets: Mapping[str, int] | None = None,
        step_times: Mapping[tuple[str, str, str], float] | None = None,
        choice: LossName = "valid_loss",
    ) -> None:
        self.all = list(_told_apart(list(runs)))
        self._step_times = step_times or {}
        self._compared: dict[tuple[str, str, int | None, Measure, Per, int | None], Comparison | None] = {}
        self._trials: dict[tuple[str, Place], dict[str, list[Run]]] = {}
        grids = {run.name for run in self.all if run.name.endswith("-grid")}
        grids = grids if len(grids) > 1 else set()
        for run in self.all:
            key = run.settings or f"{run.schedule} {run.lr}"
            for name in (run.name, GRIDS) if run.name in grids else (run.name,):
                self._trials.setdefault((name, (run.task, run.horizon)), {}).setdefault(key, []).append(run)
        names = list(dict.fromkeys(name for name, _ in self._trials))
        self.budgets: dict[str, int] = {}
        for name in names:
            found = [len(trials) for (other, _), trials in self._trials.items() if other == name]
            self.budgets[name] = min(found)
        for name, budget in (budgets or {}).items():
            if not 1 <= budget <= self.budgets.get(name, 0):
                have = self.budgets.get(name, 0)
                raise ValueError(f"budget: {name} has {have} trials on every task, got {budget}; run more")
            self.budgets[name] = budget
        self.chosen: dict[str, dict[Place, list[Run]]] = {name: {} for name in names}
        for (name, place), trials in self._trials.items():
            self.chosen[name][place] = _choose(trials, self.budgets[name], "-grid" in name, choice)

    def label(self, name: str) -> str:
        """The name with its budget, if it has one."""
        return f"{name}@{self.budgets[name]}" if self.budgets[name] > 1 else name

    def families(self, horizon: int | None) -> dict[str, str]:
        """Family of every task of that horizon, or of all tasks."""
        return {run.task: run.family or "mlp" for run in self.all if horizon in (None, run.horizon)}

    def compare(
        self,
        name: str,
        other: str,
        horizon: int | None,
        measure: Measure,
        per: Per = "step",
        seed: int | None = None,
    ) -> Comparison | None:
        """``name`` against ``other`` on the tasks and seeds that both have, or on one seed; None if there is none.

        Without a horizon, a task counts once for each that it was run for.
        """
        key = name, other, horizon, measure, per, seed
        if key not in self._compared:
            self._compared[key] = self._compare(*key)
        return self._compared[key]

    def _compare(
        self, name: str, other: str, horizon: int | None, measure: Measure, per: Per, seed: int | None
    ) -> Comparison | None:
        ratios: dict[str, float] = {}
        both: dict[str, tuple[float, float]] = {}
        for place, ours in self.chosen[name].items():
            theirs = {run.seed: run for run in self.chosen[other].get(place, [])}
            pairs = [(run, theirs[run.seed]) for run in ours if run.seed in theirs and seed in (None, run.seed)]
            if horizon not in (None, place[1]) or not pairs:
                continue
            found = [self._losses(a, b, measure, per) for a, b in pairs]
            losses = [both for both in found if both is not None]
            if len(losses) < len(found):
                continue
            means = [statistics.fmean(column) for column in zip(*losses, strict=True)]
            start = statistics.fmean(_initial(a, measure) for a, _ in pairs)
            base = min(0.0, self._lowest[place, measure])
            task = place[0] if horizon is not None else f"{place[0]}, {place[1]} steps"
            ratios[task] = ratio(means[0] - base, means[1] - base, start - base)
            both[task] = means[0], means[1]
        if not ratios:
            return None
        which: dict[str, Any] = {"name": name, "other": other, "horizon": horizon, "measure": measure, "per": per}
        return Comparison(**which, ratios=ratios, losses=both)

    def _losses(self, a: Run, b: Run, measure: Measure, per: Per) -> tuple[float, float] | None:
        """Losses of two runs at their ends, or at the end of the quicker one; None if seconds cannot be compared."""
        if per == "step":
            return _loss(a, measure), _loss(b, measure)
        (ours, clock), (theirs, other_clock) = self._timed(a), self._timed(b)
        return at_equal_time(ours, theirs, measure) if ours and theirs and clock == other_clock else None

    def _timed(self, run: Run) -> tuple[Points, str]:
        """Points of a run, and by which clock their seconds are."""
        per_step = self.step_time(run)
        if per_step is None:
            return run.points, run.machine
        return [(step, step * per_step, train, test) for step, _, train, test in run.points], "step times"

    def step_time(self, run: Run) -> float | None:
        """Seconds per step of the run's optimizer, if measured apart."""
        return self._step_times.get((run.suite, run.task_sha256, run.name))

    def final(self, name: str, horizon: int, measure: Measure) -> dict[str, float]:
        """Mean final loss over the seeds, by task."""
        return {
            task: statistics.fmean(_loss(run, measure) for run in runs)
            for (task, steps), runs in self.chosen[name].items()
            if steps == horizon
        }

    def normalised(self, name: str, horizon: int, measure: Measure) -> dict[str, float]:
        """``(L - L_best) / (L_initial - L_best)`` by task, with the best mean over seeds of any optimizer and trial.

        Source: arXiv:2009.11243, appendix E.
        """
        found = {}
        for place, runs in self.chosen[name].items():
            if place[1] == horizon:
                mean = statistics.fmean(_loss(run, measure) for run in runs)
                start = statistics.fmean(_initial(run, measure) for run in runs)
                best = self._best[place, measure]
                found[place[0]] = (mean - best) / (start - best) if start > best else 0.0
        return found

    @cached_property
    def _best(self) -> dict[tuple[Place, Measure], float]:
        best: dict[tuple[Place, Measure], float] = {}
        for (_, place), trials in self._trials.items():
            for measure in MEASURES:
                means = [statistics.fmean(_loss(run, measure) for run in runs) for runs in trials.values()]
                best[place, measure] = min(best.get((place, measure), math.inf), *means)
        return best

    @cached_property
    def _lowest(self) -> dict[tuple[Place, Measure], float]:
        lowest: dict[tuple[Place, Measure], float] = {}
        for run in self.all:
            for measure in MEASURES:
                key = (run.task, run.horizon), measure
                along = [train if measure == "train" else test for _, _, train, test in run.points]
                lowest[key] = min(lowest.get(key, math.inf), _loss(run, measure), *along)
        return lowest


def ratio(loss: float, reference: float, initial: float) -> float:
    """``(loss + f) / (reference + f)`` with f = 1% of the initial loss: below 1 is better than the reference.

    Example:
        >>> round(ratio(0.5, 1.0, 2.0), 4)
        0.5098
    """
    return (loss + FLOOR * initial) / (reference + FLOOR * initial)


def bootstrap(ratios: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Interval of the geometric mean: the middle ``share`` of its values over resampled ratios.

    Example:
        >>> bootstrap([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    logs = np.log(np.asarray(ratios))
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.quantile(logs[draws].mean(axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(np.exp(low)), float(np.exp(high))


def at_equal_time(ours: Points, theirs: Points, measure: Measure) -> tuple[float, float]:
    """The losses of two runs after as many seconds of training as the quicker one took; linear between points."""
    until = min(ours[-1][1], theirs[-1][1])
    found = []
    for points in (ours, theirs):
        seconds = [point[1] for point in points]
        losses = [point[2] if measure == "train" else point[3] for point in points]
        found.append(float(np.interp(until, seconds, losses)))
    return found[0], found[1]


def _told_apart(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs, those of tasks whose name several suites have under the name "suite: task"."""
    suites: dict[str, set[str]] = {}
    for run in runs:
        suites.setdefault(run.task, set()).add(run.suite)
    for run in runs:
        yield dataclasses.replace(run, task=f"{run.suite}: {run.task}") if len(suites[run.task]) > 1 else run


def _choose(trials: Mapping[str, Sequence[Run]], budget: int, in_order: bool, choice: LossName) -> list[Run]:
    """The runs of the trial with the least mean loss, among the first of the budget."""
    groups = list(trials.values())
    if not in_order:
        groups.sort(key=lambda runs: runs[0].trial)
    seeds = {run.seed for runs in groups[:budget] for run in runs}
    whole = [runs for runs in groups[:budget] if {run.seed for run in runs} == seeds] or groups[:1]
    return list(min(whole, key=lambda runs: statistics.fmean(getattr(run, choice) for run in runs)))


def _loss(run: Run, measure: Measure) -> float:
    return run.train_loss if measure == "train" else run.test_loss


def _initial(run: Run, measure: Measure) -> float:
    return run.initial_train_loss if measure == "train" else run.initial_test_loss
