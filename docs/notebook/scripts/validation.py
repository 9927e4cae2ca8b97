"""Scores of a theta on validation tasks of meta-training, for the scripts beside this one."""

import torch
from torch import Tensor

from lopt import Theta
from lopt.meta import pairs
from lopt.meta.config import MetaTrainConfig
from lopt.meta.executors import Executor
from lopt.meta.pairs import Shared
from lopt.meta.trainer import one_thread


def score(theta: Theta, config: MetaTrainConfig, executor: Executor, tasks: int) -> tuple[Tensor, float]:
    """Final meta-losses ``[tasks, settings]`` of the first tasks, in the settings that :func:`lopt.meta.pairs.settings`
    has, and the CPU-seconds they took."""
    shared = Shared(config, theta.spec, theta.flatten(), torch.zeros(0), 0, 0, 0)
    with one_thread():
        found = executor.map(pairs.validate_task, shared, range(tasks))
    return torch.tensor([[one.final for one in row] for row, _ in found]), sum(seconds for _, seconds in found)
