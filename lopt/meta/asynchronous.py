"""Meta-training whose workers never wait: theta changes with the first estimates that come, whoever made them.

A worker is given a unit as soon as it has ended one, with the theta of that moment. An iteration takes the first
``pairs`` estimates by thetas of at most ``staleness`` iterations before; older ones are dropped and counted. So the
learner waits for no worker, slow or lost, and what comes when decides which estimates there are: the result is not the
same bits again. Validations are units among the others; while one lasts, theta goes on.

Where an estimator goes on with runs from window to window, they stay with the worker that began them. It goes on with
the one that it has left longest, and keeps as many as all workers together need for an iteration of different runs.
When a worker dies its runs are gone, and those that replace them begin anew.

Source: arXiv:2009.11243, appendix B, and github.com/google/learned_optimization (outer_train.py, distributed.py).
"""

import math
import secrets
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lopt.meta import pairs
from lopt.meta.executors import Executor, kept
from lopt.meta.learner import Learner
from lopt.meta.pairs import Carry, Result, Shared

BATCH = 32  # estimates that are prepared at once: a millisecond, and half the time that it takes one by one
PATIENCE = 10  # iterations before it is said that most estimates are too old


class Window(NamedTuple):
    """The unit of work: a window of runs that the worker has, or of new ones."""

    run: str  # the meta-training that it belongs to
    group: int  # number of the unit among those of its iteration
    slots: int  # groups of runs that a worker has
    carry: Carry | None  # to go on with, from a checkpoint
    asked: int | None  # interval between checkpoints, in each of which a worker sends its runs once; None for never


class Estimate(NamedTuple):
    """What a window gave."""

    result: Result
    asked: int | None
    runs: list[Carry] | None  # of the worker, where they were asked for


@dataclass
class _Runs:
    """Those of a worker, in the order in which it goes on with them."""

    of: tuple[str, int]  # meta-training and phase
    waiting: deque[Carry | None] = field(default_factory=deque)  # None where they have ended, and others begin
    sent: int | None = None  # interval between checkpoints in which they were sent


def work(shared: Shared, item: Window | int) -> Any:
    """An :class:`Estimate`, or for a number what :func:`lopt.meta.pairs.validate_task` gives."""
    if isinstance(item, int):
        return pairs.validate_task(shared, item)
    here = kept()
    if not isinstance(here.value, _Runs) or here.value.of != (item.run, shared.phase):
        here.value = _Runs((item.run, shared.phase))
    own = here.value
    carry = item.carry
    if carry is None and len(own.waiting) >= item.slots:
        carry = own.waiting.popleft()
    result = pairs.unroll_group(shared, (item.group, carry))
    if result.carry is not None or len(own.waiting) < item.slots:
        own.waiting.append(result.carry)
    send = item.asked != own.sent
    own.sent = item.asked
    return Estimate(
        result._replace(carry=None), item.asked, [carry for carry in own.waiting if carry is not None] if send else None
    )


@dataclass
class _Validation:
    """One that is being made, of the mean theta after ``iteration``."""

    iteration: int
    average: Tensor
    shared: Shared
    found: dict[int, Any] = field(default_factory=dict)  # task -> scores


def iterations(learner: Learner, executor: Executor) -> Generator[dict[str, Any], None, None]:
    """Iterations as metrics, among them those of asynchrony:

    ``workers``, by how many the estimates were made; ``staleness`` and ``staleness_max``, by how many iterations old
    thetas, in the mean and at most; ``dropped``, how many others were too old; with a validation ``validated``, the
    iteration after which the mean theta had its scores.
    """
    desk = _Desk(learner)
    with closing(executor.flow(work, desk.units())) as flow:
        for index, found in flow:
            yield from desk.take(index, found)
            if desk.ended:
                return


class _Desk:
    """Hands out units and takes what comes back."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        learner.begin()
        self.run = secrets.token_hex(8)
        self.back = deque(carry for carry in learner.state.carries if carry is not None)
        self.given = 0  # units
        self.groups = 0  # of this iteration
        self.slots = learner.config.groups  # until it is known how many workers there are
        self.fresh: list[Result] = []  # of this iteration
        self.made: list[Result] = []  # and those that were too old
        self.dropped = self.used = 0
        self.warned = False
        self.runs: dict[str, tuple[int, list[Carry]]] = {}  # worker -> when it was asked for them, they
        self.tasks: deque[tuple[_Validation, int]] = deque()  # of validations, not yet handed out
        self.out: dict[int, tuple[_Validation, int]] = {}  # those that were: index of the unit -> which
        self.scores: dict[str, Any] = {}  # of a validation, for the next metrics
        self.last: dict[str, Any] | None = None  # metrics of the last iteration, until it is validated

    @property
    def ended(self) -> bool:
        """Whether all is done."""
        return self.last is None and self.learner.state.inner_steps >= self.learner.config.inner_steps

    def units(self) -> Iterator[tuple[Shared, Window | int]]:
        """What workers are given."""
        config, state = self.learner.config, self.learner.state
        while self.tasks or (self.last is None and not self.ended):
            self.given += 1
            if self.tasks:
                validation, task = self.out[self.given - 1] = self.tasks.popleft()
                yield validation.shared, task
                continue
            carry = self.back.popleft() if self.back else None
            asked = state.iteration // config.checkpoint_every if config.keep_runs else None
            self.groups += 1
            yield self.learner.shared, Window(self.run, self.groups - 1, self.slots, carry, asked)

    def take(self, index: int, found: Any) -> Iterator[dict[str, Any]]:
        """The result of a unit; gives metrics where an iteration ends with it."""
        if index in self.out:
            yield from self._take_scores(*self.out.pop(index), found)
        elif self.last is None:
            self._take_estimate(found)
            if len(self.fresh) == self.learner.config.groups:
                yield from self._iterate()

    def _take_estimate(self, found: Estimate) -> None:
        config, state, result = self.learner.config, self.learner.state, found.result
        assert config.staleness is not None
        self.made.append(result)
        if result.iteration < state.phase_begun:
            return
        if found.runs is not None and found.asked is not None:
            self.runs[result.worker] = found.asked, found.runs
        if state.iteration - result.iteration <= config.staleness:
            self.fresh.append(result)
            if len(self.fresh) % BATCH == 0:
                self.learner.prepare(self.fresh[-BATCH:])

    def _iterate(self) -> Iterator[dict[str, Any]]:
        config, state = self.learner.config, self.learner.state
        fresh, made = sorted(self.fresh, key=lambda result: (result.iteration, result.group)), self.made
        self.fresh, self.made, self.groups = [], [], 0
        ages = [state.iteration - result.iteration for result in fresh]
        workers = len({result.worker for result in fresh})
        metrics, due = self.learner.update(fresh, made)
        metrics |= {"workers": workers, "staleness": sum(ages) / len(ages), "staleness_max": max(ages)}
        metrics["dropped"] = len(made) - len(fresh)
        self._count(len(made) - len(fresh), len(fresh))
        self.slots = math.ceil(config.groups / workers)
        interval = (state.iteration - 1) // config.checkpoint_every
        self.runs = {name: entry for name, entry in self.runs.items() if entry[0] >= interval - 1}
        state.carries = [carry for _, runs in self.runs.values() for carry in runs]
        if due:
            validation = _Validation(state.iteration, state.average, self.learner.validation())
            self.tasks.extend((validation, task) for task in range(config.validation_tasks))
        if state.inner_steps >= config.inner_steps:
            self.last = metrics
            return
        scores, self.scores = self.scores, {}
        yield metrics | scores
        phase = state.phase
        self.learner.begin()
        if state.phase != phase:
            self.runs.clear()
            self.back.clear()

    def _take_scores(self, validation: _Validation, task: int, found: Any) -> Iterator[dict[str, Any]]:
        validation.found[task] = found
        if len(validation.found) == self.learner.config.validation_tasks:
            scores = [validation.found[number] for number in sorted(validation.found)]
            self.scores = self.learner.score(validation.iteration, validation.average, scores)
            self.scores["validated"] = validation.iteration
        if self.last is not None and not self.tasks and not self.out:
            metrics, self.last = self.last | self.scores, None
            yield metrics

    def _count(self, dropped: int, used: int) -> None:
        self.dropped, self.used = self.dropped + dropped, self.used + used
        if self.dropped > self.used > PATIENCE * self.learner.config.groups and not self.warned:
            self.warned = True
            warnings.warn(
                f"staleness: more estimates were dropped ({self.dropped}) than used ({self.used}); have more pairs in "
                "an iteration, fewer workers or a larger staleness",
                stacklevel=2,
            )
