"""The unit of work: one window of the runs of antithetic pairs that share a task, and one task of the validation set.

Both are pure functions of what they are given, so they can run anywhere, in any order, and twice. Perturbations, tasks
and lengths follow from ``(config.seed, iteration, pair)``: a unit needs theta and a few integers, and gives a few
numbers. Only where an estimator continues runs from window to window does their state travel too, as a :class:`Carry`;
with asynchronous workers it stays where it is.
"""

import math
import time
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.meta import backprop, es, inner, objective
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.es import ESTIMATORS
from lopt.meta.executors import kept
from lopt.meta.unroll import Run
from lopt.rule import AnySpec, Rule
from lopt.tasks.seeds import derive, generator
from lopt.tasks.task import Task

DRAWS = 1000  # of a task, until one is small enough


Key = tuple[int, int]  # iteration and group, which determine perturbations, and the runs that begin


class Carry(NamedTuple):
    """The inner runs of a group of pairs between two windows."""

    keys: tuple[Key, ...]  # of the windows so far; the first determines the runs
    step: int
    stop: int  # steps after which they are replaced
    state: inner.State  # of the runs under +eps of all pairs, then under -eps


class Shared(NamedTuple):
    """What all units of an iteration have in common."""

    config: MetaTrainConfig
    spec: AnySpec
    theta: Tensor  # [P]
    scale: Tensor  # [P], 0 for components that are not trained
    phase: int
    phase_begun: int  # iteration in which the phase began
    iteration: int


class Result(NamedTuple):
    """What a window of a group of pairs gave."""

    iteration: int
    group: int
    keys: tuple[Key, ...]  # whose perturbations add up to what the differences are multiplied by
    family: str  # of the task: what its name begins with
    deltas: tuple[float, ...]  # of each pair the meta-loss under +eps minus that under -eps, clipped
    meta_loss: float  # mean of all
    divergences: int
    inner_steps: int
    cpu_seconds: float
    carry: Carry | None  # None when the runs have ended, or stay with the worker
    worker: str  # by which it was computed
    gradient: Tensor | None = None  # [P] of the meta-loss, where the estimator gives it and no differences
    ended: bool = True  # whether this was the last window of the runs


def perturbation(config: MetaTrainConfig, iteration: int, pair: int, num_floats: int) -> Tensor:
    """``[P]`` unit normal."""
    random = generator(config.seed, "perturbation", iteration, pair)
    return torch.from_numpy(random.standard_normal(num_floats, dtype="float32"))


def perturbations(config: MetaTrainConfig, key: Key, num_floats: int) -> Tensor:
    """``[pairs, P]`` of the pairs of a group that share a task."""
    iteration, group = key
    pairs = range(group * config.pairs_per_task, (group + 1) * config.pairs_per_task)
    rows = [perturbation(config, iteration, pair, num_floats) for pair in pairs]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _points(phase: Phase) -> int:
    """Losses of a run that the meta-loss is made of."""
    return objective.FEWER if phase.estimator == "backprop" else objective.LOSSES_PER_RUN


def horizon_of(config: MetaTrainConfig, phase: int, iteration: int, group: int) -> int:
    """Length of the runs that ``group`` begins at ``iteration``: log-uniform, rounded to whole windows or losses."""
    shortest, longest = config.phases[phase].horizon
    random = generator(config.seed, "horizon", iteration, group)
    horizon = round(math.exp(random.uniform(math.log(shortest), math.log(longest))))
    unit = config.phases[phase].window or max(1, horizon // _points(config.phases[phase]))
    return unit * max(1, round(horizon / unit))


def sample_run(config: MetaTrainConfig, phase: int, iteration: int, group: int) -> Run:
    """The inner run that all pairs of ``group`` begin at ``iteration``."""
    horizon = horizon_of(config, phase, iteration, group)
    random = generator(config.seed, "run", iteration, group)
    task = _task(config, random, config.phases[phase].max_params)
    told = random.random() < config.tell_horizon
    spacing = objective.spacing(horizon, config.phases[phase].window or horizon, _points(config.phases[phase]))
    seed, shown = int(random.integers(2**63)), random.random() < config.show_valid
    valid = {"valid_every": 10 if shown else 0, "valid_batches": task.num_batches(config.valid_rows)}
    averaged = not told and random.random() < config.averaged
    return Run(task, seed, horizon, horizon if told else 0, **valid, loss_every=spacing, averaged=averaged)


def _task(config: MetaTrainConfig, random: np.random.Generator, max_params: int | None) -> Task:
    for _ in range(DRAWS):
        task = inner.cached_task(int(random.integers(2**63)), config.tasks)
        if max_params is None or task.num_params <= max_params:
            return task
    names = list(config.tasks) if isinstance(config.tasks, tuple) else config.tasks.names
    raise ValueError(f"max_params: {DRAWS} tasks of {names} all have more than {max_params} parameters")


def first_stop(shared: Shared, horizon: int, window: int, group: int) -> int:
    """Where the first runs of a group in a phase are cut short: spread over their windows, so that groups are not all
    at one stage."""
    if shared.iteration != shared.phase_begun:
        return horizon
    return window * math.ceil(horizon // window * (group % shared.config.groups + 1) / shared.config.groups)


def unroll_group(shared: Shared, item: tuple[int, Carry | None]) -> Result:
    """One window of the pairs that share a task.

    Args:
        item: number of the group, and where its runs stand; None to begin them.
    """
    clock = time.process_time()
    config, spec, (group, carry) = shared.config, shared.spec, item
    phase = config.phases[shared.phase]
    if phase.estimator == "backprop":
        return _differentiate(shared, group)
    estimator = ESTIMATORS[phase.estimator]
    key = shared.iteration, group
    keys = (*(() if carry is None else carry.keys), key)
    used = estimator.directions(keys)
    eps = perturbations(config, used[-1], len(shared.theta))
    thetas = es.antithetic(shared.theta, eps, config.sigma * shared.scale)
    run = sample_run(config, shared.phase, *keys[0])
    window = phase.window or run.horizon
    if carry is None:
        stop = first_stop(shared, run.horizon, window, group)
        carry = Carry((), 0, stop, inner.start(spec, thetas, run))
    state, losses = inner.unroll(spec, thetas, run, carry.state, carry.step, window, config.backend)

    points = objective.per_point(losses, config.objective, run.unit, config.loss_limit)
    weights = objective.weights(config.weighting, run.horizon // run.loss_every)
    first = carry.step // run.loss_every
    means = (points * weights[first : first + points.shape[1]]).double().mean(dim=1)
    plus, minus = means.tensor_split(2)
    deltas = torch.clamp(plus - minus, -config.delta_clip, config.delta_clip).tolist()

    after = None
    if carry.step + window < carry.stop:
        if estimator.shares_state:
            state = inner.select(state, [*range(len(eps)), *range(len(eps))])
        after = Carry(keys, carry.step + window, carry.stop, state)
    return Result(
        shared.iteration,
        group,
        used,
        family=run.task.name.partition("-")[0],
        deltas=tuple(deltas),
        meta_loss=float(means.mean()),
        divergences=int(objective.diverged(losses).sum()),
        inner_steps=losses.train.numel(),
        cpu_seconds=time.process_time() - clock,
        carry=after,
        worker=kept().worker,
        ended=after is None,
    )


def _differentiate(shared: Shared, group: int) -> Result:
    """A whole run under theta, and the gradient of its meta-loss."""
    clock = time.process_time()
    config, key = shared.config, (shared.iteration, group)
    if isinstance(shared.spec, Rule):
        raise TypeError(f"estimator: backprop runs lopt's own optimizer, theta is one of {shared.spec.name}; take es")
    run = sample_run(config, shared.phase, *key)
    found = backprop.estimate(shared.spec, shared.theta, run, config)
    return Result(
        shared.iteration,
        group,
        (key,),
        family=run.task.name.partition("-")[0],
        deltas=(),
        meta_loss=found.meta_loss,
        divergences=int(objective.diverged(found.losses).sum()),
        inner_steps=found.losses.train.numel(),
        cpu_seconds=time.process_time() - clock,
        carry=None,
        worker=kept().worker,
        gradient=found.gradient,
    )


class Score(NamedTuple):
    """Mean meta-loss over the last tenth of a validation run, and over all of it."""

    final: float
    mean: float


def settings(config: MetaTrainConfig) -> list[tuple[int, bool]]:
    """Length and whether it is told, of the validation runs of every task."""
    return [(horizon, told) for horizon in config.validation_horizons for told in (True, False)]


#: Their own cache: those of the iterations in between would push them out, and they come again.
_validation_task = lru_cache(maxsize=256)(inner.cached_task)


def validate_task(shared: Shared, index: int) -> tuple[list[Score], float]:
    """Scores of theta on validation task ``index``, one for each of :func:`settings`, and the CPU-seconds it took."""
    clock = time.process_time()
    config = shared.config
    seed = derive(0, "validation", index)
    task = _validation_task(seed, config.tasks)
    scores = []
    for horizon, told in settings(config):
        spacing, valid_batches = objective.spacing(horizon, horizon), task.num_batches(config.valid_rows)
        run = Run(task, seed, horizon, horizon if told else 0, valid_batches=valid_batches, loss_every=spacing)
        thetas = shared.theta[None]
        begun = inner.start(shared.spec, thetas, run)
        _, losses = inner.unroll(shared.spec, thetas, run, begun, 0, horizon, config.backend)
        points = objective.per_point(losses, config.objective, run.unit, config.loss_limit)[0].double()
        last = points[-max(1, len(points) // 10) :]
        scores.append(Score(float(last.mean()), float(points.mean())))
    return scores, time.process_time() - clock
