"""The unit of work: one window of the inner run of one antithetic pair, and one task of the validation set.

Both are pure functions of what they are given, so they can run anywhere, in any order, and twice. Perturbations, tasks
and lengths follow from ``(config.seed, iteration, pair)``: a unit needs theta and a few integers, and gives a few
numbers. Only where an estimator continues runs from window to window does their state travel too, as a :class:`Carry`.
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.meta import es, inner, objective
from lopt.meta.config import MetaTrainConfig
from lopt.meta.es import ESTIMATORS
from lopt.meta.unroll import Run
from lopt.tasks.seeds import derive, generator
from lopt.tasks.task import Task
from lopt.theta import ThetaSpec

DRAWS = 1000  # of a task, until one is small enough


class Carry(NamedTuple):
    """An inner run of a pair between two windows."""

    begun: int  # iteration in which it began, which determines the run
    step: int
    stop: int  # steps after which it is replaced
    state: inner.State  # of the runs under +eps and -eps
    direction: Tensor | None  # [P] of the last window, where the next one needs it


class Shared(NamedTuple):
    """What all units of an iteration have in common."""

    config: MetaTrainConfig
    spec: ThetaSpec
    theta: Tensor  # [P]
    scale: Tensor  # [P], 0 for components that are not trained
    phase: int
    phase_begun: int  # iteration in which the phase began
    iteration: int


class Result(NamedTuple):
    """What a window of a pair gave."""

    delta: float  # meta-loss under +eps minus that under -eps, clipped
    meta_loss: float  # mean of both
    divergences: int
    inner_steps: int
    cpu_seconds: float
    carry: Carry | None  # None when the run has ended


def perturbation(config: MetaTrainConfig, iteration: int, pair: int, num_floats: int) -> Tensor:
    """``[P]`` unit normal."""
    random = generator(config.seed, "perturbation", iteration, pair)
    return torch.from_numpy(random.standard_normal(num_floats, dtype="float32"))


def horizon_of(config: MetaTrainConfig, phase: int, iteration: int, pair: int) -> int:
    """Length of the run that ``pair`` begins at ``iteration``: log-uniform, rounded to whole windows or losses."""
    shortest, longest = config.phases[phase].horizon
    random = generator(config.seed, "horizon", iteration, pair)
    horizon = round(math.exp(random.uniform(math.log(shortest), math.log(longest))))
    unit = config.phases[phase].window or max(1, horizon // objective.LOSSES_PER_RUN)
    return unit * max(1, round(horizon / unit))


def sample_run(config: MetaTrainConfig, phase: int, iteration: int, pair: int) -> Run:
    """The inner run that ``pair`` begins at ``iteration``."""
    horizon = horizon_of(config, phase, iteration, pair)
    random = generator(config.seed, "run", iteration, pair)
    task = _task(config, random, config.phases[phase].max_params)
    told = random.random() < config.tell_horizon
    spacing = objective.spacing(horizon, config.phases[phase].window or horizon)
    seed, shown = int(random.integers(2**63)), random.random() < config.show_valid
    return Run(task, seed, horizon, horizon if told else 0, valid_every=10 if shown else 0, loss_every=spacing)


def _task(config: MetaTrainConfig, random: np.random.Generator, max_params: int | None) -> Task:
    for _ in range(DRAWS):
        task = inner.cached_task(int(random.integers(2**63)), config.tasks)
        if max_params is None or task.num_params <= max_params:
            return task
    raise ValueError(f"max_params: {DRAWS} tasks of {list(config.tasks)} all have more than {max_params} parameters")


def eps_and_direction(shared: Shared, pair: int, carry: Carry | None) -> tuple[Tensor, Tensor]:
    """Perturbation ``[P]`` of this window, and what its delta is multiplied by."""
    estimator = ESTIMATORS[shared.config.phases[shared.phase].estimator]
    begun = carry.begun if carry is not None and estimator.one_eps_per_run else shared.iteration
    eps = perturbation(shared.config, begun, pair, len(shared.theta))
    return eps, estimator.direction(eps, None if carry is None else carry.direction)


def first_stop(shared: Shared, horizon: int, window: int, pair: int) -> int:
    """Where the first run of a pair in a phase is cut short: spread over its windows, so that pairs are not all at
    one stage."""
    if shared.iteration != shared.phase_begun:
        return horizon
    return window * math.ceil(horizon // window * (pair + 1) / shared.config.pairs)


def unroll_pair(shared: Shared, item: tuple[int, Carry | None]) -> Result:
    """One window of a pair.

    Args:
        item: number of the pair, and where its run stands; None to begin one.
    """
    clock = time.process_time()
    config, spec, (pair, carry) = shared.config, shared.spec, item
    phase = config.phases[shared.phase]
    estimator = ESTIMATORS[phase.estimator]
    eps, direction = eps_and_direction(shared, pair, carry)
    thetas = es.antithetic(shared.theta[None], eps[None], config.sigma * shared.scale)
    run = sample_run(config, shared.phase, shared.iteration if carry is None else carry.begun, pair)
    window = phase.window or run.horizon
    if carry is None:
        stop = first_stop(shared, run.horizon, window, pair)
        carry = Carry(shared.iteration, 0, stop, inner.start(spec, thetas, run), None)
    state, losses = inner.unroll(spec, thetas, run, carry.state, carry.step, window)

    points = objective.per_point(losses, config.objective, run.initial_loss, config.loss_limit)
    weights = objective.weights(config.weighting, run.horizon // run.loss_every)
    first = carry.step // run.loss_every
    plus, minus = (points * weights[first : first + points.shape[1]]).double().mean(dim=1).tolist()
    delta = max(-config.delta_clip, min(config.delta_clip, plus - minus))

    after = None
    if carry.step + window < carry.stop:
        state = inner.select(state, [0, 0]) if estimator.shares_state else state
        after = Carry(carry.begun, carry.step + window, carry.stop, state, direction if estimator.sums_eps else None)
    divergences = int(objective.diverged(losses).sum())
    seconds = time.process_time() - clock
    return Result(delta, (plus + minus) / 2.0, divergences, losses.train.numel(), seconds, after)


class Score(NamedTuple):
    """Mean meta-loss over the last tenth of a validation run, and over all of it."""

    final: float
    mean: float


def settings(config: MetaTrainConfig) -> list[tuple[int, bool]]:
    """Length and whether it is told, of the validation runs of every task."""
    return [(horizon, told) for horizon in config.validation_horizons for told in (True, False)]


def validate_task(shared: Shared, index: int) -> tuple[list[Score], float]:
    """Scores of theta on validation task ``index``, one for each of :func:`settings`, and the CPU-seconds it took."""
    clock = time.process_time()
    config = shared.config
    seed = derive(0, "validation", index)
    task = inner.cached_task(seed, config.tasks)
    scores = []
    for horizon, told in settings(config):
        run = Run(task, seed, horizon, horizon if told else 0, loss_every=objective.spacing(horizon, horizon))
        thetas = shared.theta[None]
        _, losses = inner.unroll(shared.spec, thetas, run, inner.start(shared.spec, thetas, run), 0, horizon)
        points = objective.per_point(losses, config.objective, run.initial_loss, config.loss_limit)[0].double()
        last = points[-max(1, len(points) // 10) :]
        scores.append(Score(float(last.mean()), float(points.mean())))
    return scores, time.process_time() - clock
