"""Tasks: what an optimizer is trained on and judged by (data sets, models, losses)."""

from lopt.tasks.synthetic import ENGINE_FAMILIES, FAMILIES, sample_task, task_from_config
from lopt.tasks.task import Batch, Task

__all__ = ["ENGINE_FAMILIES", "FAMILIES", "Batch", "Task", "sample_task", "task_from_config"]
