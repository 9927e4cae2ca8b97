"""Tasks: what an optimizer is trained on and judged by (data sets, models, losses)."""

from lopt.tasks.augmented import AugmentedTask
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.families import NETWORK_FAMILIES, SAMPLED_FAMILIES, sample_task, task_from_config
from lopt.tasks.synthetic import ENGINE_FAMILIES, FAMILIES
from lopt.tasks.task import Batch, NoisyBatch, Task

__all__ = [
    "ENGINE_FAMILIES",
    "FAMILIES",
    "NETWORK_FAMILIES",
    "SAMPLED_FAMILIES",
    "AugmentedTask",
    "Batch",
    "NoisyBatch",
    "Task",
    "TaskDistribution",
    "sample_task",
    "task_from_config",
]
