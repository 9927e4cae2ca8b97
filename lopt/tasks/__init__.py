"""Tasks: what an optimizer is trained on and judged by (data sets, models, losses)."""

from lopt.tasks.synthetic import sample_task, task_from_config
from lopt.tasks.task import Batch, Task

__all__ = ["Batch", "Task", "sample_task", "task_from_config"]
