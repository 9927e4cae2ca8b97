"""Lanes: the sequences of inner runs that an outer iteration looks at a window of.

An iteration advances ``tasks_per_iteration`` lanes. A lane holds one inner run at a time, under the thetas of its share
of the antithetic pairs; when the run ends, another begins, with a task, a length and seeds that follow from
``(config.seed, iteration, lane)``. :func:`estimate` is all the work of a lane in an iteration, a pure function that can
run anywhere: it needs theta, the lane and three integers, and gives the lane's share of the meta-gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.meta import es
from lopt.meta.config import MetaTrainConfig
from lopt.meta.unroll import Run, RunState, start, unroll
from lopt.tasks.seeds import derive, generator
from lopt.tasks.synthetic import sample_task
from lopt.theta import ThetaSpec, unflatten


@dataclass(frozen=True)
class Lane:
    """An inner run under the thetas of ``2 pairs`` perturbations, and what PES remembers about it."""

    run: Run
    stop: int  # steps after which the run is replaced
    state: RunState
    xi: Tensor  # [pairs, P]


class Estimate(NamedTuple):
    """What a lane contributes to an iteration."""

    gradient: Tensor  # [P]
    meta_loss: float  # mean over steps and runs
    divergences: int  # runs in which a loss was not finite
    inner_steps: int


def perturbations(config: MetaTrainConfig, iteration: int, lane: int, num_floats: int) -> Tensor:
    """``[pairs, P]`` unit normal, a function of seed, iteration and pair alone."""
    count = config.pairs // config.tasks_per_iteration
    rows = [
        generator(config.seed, "perturbation", iteration, pair).standard_normal(num_floats, dtype="float32")
        for pair in range(lane * count, (lane + 1) * count)
    ]
    return torch.stack([torch.from_numpy(row) for row in rows])


def sample_run(config: MetaTrainConfig, iteration: int, lane: int) -> Run:
    """The inner run that begins in ``lane`` at ``iteration``."""
    random = generator(config.seed, "run", iteration, lane)
    if config.num_tasks is None:
        task_seed = derive(config.seed, "task", iteration, lane)
    else:
        task_seed = derive(config.seed, "task", int(random.integers(config.num_tasks)))
    shortest, longest = config.horizon
    horizon = round(math.exp(random.uniform(math.log(shortest), math.log(longest))))
    if config.truncation is not None:
        horizon = config.truncation * max(1, round(horizon / config.truncation))
    told = random.random() < config.tell_horizon
    task = sample_task(task_seed, config.tasks)
    return Run(task, derive(config.seed, "inner", iteration, lane), horizon, horizon if told else 0)


def first_stop(config: MetaTrainConfig, run: Run, lane: int) -> int:
    """Where the first run of a lane is cut short: spread over its windows, so that lanes are not all at one stage."""
    window = config.truncation or run.horizon
    return window * math.ceil(run.horizon // window * (lane + 1) / config.tasks_per_iteration)


def estimate(
    config: MetaTrainConfig, spec: ThetaSpec, theta: Tensor, lane: Lane | None, index: int, iteration: int
) -> tuple[Lane, Estimate]:
    """Unroll one window of a lane and estimate the meta-gradient from it.

    Truncated ES goes on from the state under ``theta + sigma eps`` for both signs; PES keeps a state for each.

    Args:
        theta: ``[P]``.
        lane: None in the first iteration.
        index: which lane it is.
    """
    eps = perturbations(config, iteration, index, theta.shape[0])
    weights = unflatten(spec, es.antithetic(theta, eps, config.sigma))
    if lane is None or lane.state.step >= lane.stop:
        run = sample_run(config, iteration, index)
        stop = first_stop(config, run, index) if lane is None else run.horizon
        lane = Lane(run, stop, start(spec, weights, run), torch.zeros_like(eps))
    window = config.truncation or lane.run.horizon
    state, losses = unroll(spec, weights, lane.run, lane.state, window, config.loss_limit)
    plus, minus = losses.meta.chunk(2, dim=1)
    if config.estimator == "pes":
        gradient, xi = es.pes_gradient(eps, lane.xi, plus, minus, config.sigma)
    else:
        gradient = es.es_gradient(eps, es.window_mean(plus) - es.window_mean(minus), config.sigma)
        xi, state = lane.xi, state.select(torch.arange(len(eps)).repeat(2))
    meta_loss = float(losses.meta.double().mean())
    result = Estimate(gradient, meta_loss, int(losses.diverged.sum()), losses.meta.numel())
    return Lane(lane.run, lane.stop, state, xi), result


def validation_set(config: MetaTrainConfig) -> list[Run]:
    """Runs of the longest length on tasks of the same families; the same for every ``config.seed``."""
    runs = []
    for index in range(config.validation_runs):
        seed = derive(0, "validation", index)
        runs.append(Run(sample_task(seed, config.tasks), seed, config.horizon[1], config.horizon[1]))
    return runs


def evaluate(spec: ThetaSpec, thetas: Tensor, runs: list[Run], loss_limit: float) -> Tensor:
    """Mean meta-loss ``[runs, R]`` over whole runs, the same for every theta of ``thetas`` ``[R, P]``."""
    weights = unflatten(spec, thetas)
    means = []
    for run in runs:
        _, losses = unroll(spec, weights, run, start(spec, weights, run), run.horizon, loss_limit)
        means.append(es.window_mean(losses.meta))
    return torch.stack(means)
