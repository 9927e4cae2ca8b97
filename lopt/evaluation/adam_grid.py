"""A grid of Adams trained as one batch (:mod:`lopt.tasks.adam`), and its results."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lopt.evaluation.runs import Result, counted, evaluation_batches
from lopt.tasks.adam import AdamConfig, Schedule, batched_losses, flatten, train_adam
from lopt.tasks.task import SPLITS, Task

#: Learning rates of the references, half decades; each with both schedules.
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
GRID = tuple(AdamConfig(lr, schedule) for schedule in SCHEDULES for lr in LRS)

#: The references of the small suite, for any other as well: all of the grid in one batch.
ADAM_GRID = "adam-grid"

#: Opponents whose trials can be trained as one batch: what distinguishes them, but for the learning rate.
BATCHED = {
    "adam-tuned": AdamConfig(1.0),
    "adamw-cosine-tuned": AdamConfig(1.0, "cosine", weight_decay=0.01),
}
BATCHED_PARAMS = 100_000  # models with more are hardly quicker in a batch


def adam_results(task: Task, seed: int, steps: int, configs: Sequence[AdamConfig] = GRID) -> list[Result]:
    """One result per configuration; each gets its share of the seconds of the batch."""
    begin = time.perf_counter()
    params, shapes = train_adam(task, seed, steps, configs)
    seconds = (time.perf_counter() - begin) / len(configs)
    initial = _recorded(task, flatten(task.init(seed)).unsqueeze(0), shapes)[0]
    return [
        counted(
            dict(zip(SPLITS, final, strict=True)),
            dict(zip(SPLITS, initial, strict=True)),
            seconds,
            state_bytes_per_param=8.0,
        )
        for final in _recorded(task, params, shapes)
    ]


@torch.no_grad()
def _recorded(task: Task, params: Tensor, shapes: Mapping[str, torch.Size]) -> list[tuple[float, ...]]:
    """For every row of ``params`` the mean losses over all rows that every split is measured on."""
    losses = []
    for split in SPLITS:
        total, rows = torch.zeros(len(params), dtype=torch.float64), 0
        for batch in evaluation_batches(task, split):
            count = max(len(batch[0]), 1)
            total += batched_losses(task, params, shapes, batch).double() * count
            rows += count
        losses.append((total / rows).tolist())
    return list(zip(*losses, strict=True))
