"""Inner runs of one task under several thetas: in the fused engine where it can run the task, in PyTorch elsewhere and
by rules of others.

Both give the same losses (but for rounding). A state is plain data with a leading dimension of runs, so that it can be
pickled and checkpointed: a tensor for the engine, a dict of tensors otherwise.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lopt.meta import engine
from lopt.meta import unroll as torch_unroll
from lopt.meta.objective import Losses
from lopt.meta.unroll import Run, RunState
from lopt.rule import AnySpec, Rule, unflatten
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.families import Family, sample_task
from lopt.tasks.own import OwnTasks
from lopt.tasks.task import Task, map_tensors

State = Any

#: Bytes that the runs of a torch unroll may need at once; more runs go in groups. Fixed, as groups of another size
#: give other roundings.
MEMORY = 1 << 30

_problem = lru_cache(maxsize=256)(engine.problem_of)  # generating data takes about a millisecond
_bytes_per_run = lru_cache(maxsize=256)(torch_unroll.bytes_per_run)


@lru_cache(maxsize=256)
def cached_task(seed: int, tasks: tuple[Family, ...] | TaskDistribution | OwnTasks) -> Task:
    """The task called ``seed`` of a mixture."""
    return sample_task(seed, tasks) if isinstance(tasks, tuple) else tasks.sample(seed)


def uses_engine(task: Task) -> bool:
    """Whether the fused engine runs this task."""
    return _problem(task) is not None


def start(spec: AnySpec, thetas: Tensor, run: Run) -> State:
    """State before the first step, under every theta of ``thetas`` ``[R, P]``."""
    if isinstance(spec, Rule) or (problem := _problem(run.task)) is None:
        return torch_unroll.start(spec, unflatten(spec, thetas), run).pack()
    init = engine.initial_params(run.task, run.seed)
    return torch.stack([engine.start(spec, problem, theta, init) for theta in thetas])


def unroll(
    spec: AnySpec, thetas: Tensor, run: Run, state: State, step: int, steps: int, backend: str = "cpu"
) -> tuple[State, Losses]:
    """Continue the runs from ``step`` by ``steps`` steps; the given state is left as it is.

    Args:
        backend: of the fused engine (:func:`lopt.meta.engine.unroll`). States are on the CPU between two calls.
    """
    if isinstance(spec, Rule) or (problem := _problem(run.task)) is None:
        return _torch_unroll(spec, thetas, run, state, step, steps)
    state = state.to(engine.device_of(backend), copy=True)
    keys = engine.minibatch_keys(run.seed)
    runs = [engine.EngineRun(0, row, state[row], keys, run.total_steps, run.averaged) for row in range(len(thetas))]
    valid = {"valid_every": run.valid_every, "valid_batches": run.valid_batches}
    outer, train = engine.unroll(
        spec, thetas, [problem], runs, steps, **valid, loss_every=run.loss_every, backend=backend
    )
    return state.cpu(), Losses(outer, train)


def _torch_unroll(spec: AnySpec, thetas: Tensor, run: Run, state: State, step: int, steps: int) -> tuple[State, Losses]:
    """In groups of runs that fit into ``MEMORY``; of one run where not even that does."""
    size = max(1, MEMORY // _bytes_per_run(spec, run.task))
    after, outer, train = [], [], []
    for first in range(0, len(thetas), size):
        rows = list(range(first, min(first + size, len(thetas))))
        before = RunState.unpack(step, select(state, rows))
        part, losses = torch_unroll.unroll(spec, unflatten(spec, thetas[rows]), run, before, steps)
        after.append(part.pack())
        outer.append(losses.outer)
        train.append(losses.train)
    return join(after), Losses(torch.cat(outer), torch.cat(train))


def select(state: State, rows: list[int]) -> State:
    """The state of the runs ``rows``, in that order; a run may be taken twice."""
    return map_tensors(lambda x: x[rows], state)


def join(states: list[State]) -> State:
    """All runs of several states, one after the other."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(states)
    if isinstance(first, dict):
        return {name: join([state[name] for state in states]) for name in first}
    return [join(list(parts)) for parts in zip(*states, strict=True)]
