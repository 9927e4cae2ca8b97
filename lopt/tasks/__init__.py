"""Tasks: what an optimizer is trained on and judged by (data sets, models, losses)."""

from lopt.tasks.augmented import AugmentedTask
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.families import NETWORK_FAMILIES, SAMPLED_FAMILIES, sample_task, task_from_config
from lopt.tasks.own import OwnTasks, check_task
from lopt.tasks.synthetic import ENGINE_FAMILIES, FAMILIES
from lopt.tasks.task import Batch, NoisyBatch, Task
from lopt.tasks.wrapped import from_module

__all__ = [
    "ENGINE_FAMILIES",
    "FAMILIES",
    "NETWORK_FAMILIES",
    "SAMPLED_FAMILIES",
    "AugmentedTask",
    "Batch",
    "NoisyBatch",
    "OwnTasks",
    "Task",
    "TaskDistribution",
    "check_task",
    "from_module",
    "sample_task",
    "task_from_config",
]
