"""How often do runs get stuck after a first overshoot?

Trains convolutions and perceptrons by TaskSet's samplers on generated textures, none of them held out: 200 steps, told
total_steps, seed 0. Prints a row per optimizer: the mean of log(final training loss / initial loss + .01) over tasks,
and how many of them end above .8 of the initial loss.

    python docs/notebook/scripts/overshoot.py lopt lopt-untold adam adam-tuned:4
"""

import math
import sys
from collections.abc import Iterator

from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.processes import in_processes
from lopt.evaluation.runs import train_task
from lopt.meta.executors import usable_cores
from lopt.tasks import sample_task
from lopt.tasks.families import with_batch_size
from lopt.tasks.task import Task

FAMILIES = (("conv_fc", 24), ("mlp", 24), ("conv_pooling", 12))
MOST_PARAMS, STEPS, STUCK = 60_000, 200, 0.8


def tasks() -> Iterator[Task]:
    """Those of the first seeds from 100 on that are small."""
    for family, seeds in FAMILIES:
        for seed in range(100, 100 + seeds):
            task = with_batch_size(sample_task(seed, [family], ["textures"]), 64)
            if task.num_params <= MOST_PARAMS:
                yield task


def run(job: tuple[Task, str]) -> tuple[float, float]:
    """Initial and final training loss; NAME:k is trial k."""
    task, optimizer = job
    name, _, trial = optimizer.partition(":")
    curve = train_task(task, lambda params, steps: make_optimizer(name, params, steps, int(trial or 0)), 0, STEPS)
    return curve.initial["train"], curve.final["train"]


def main() -> None:
    names = sys.argv[1:] or ["lopt", "adam"]
    jobs = [(task, name) for task in tasks() for name in names]
    found = dict(zip(names, ([] for _ in names), strict=True))
    for (_, name), (first, last) in in_processes(run, jobs, usable_cores()):
        found[name].append(min(last, 10 * first) / first if math.isfinite(last) else 10.0)  # all losses are positive
    print("| optimizer | tasks | score | stuck |\n|---|---|---|---|")
    for name, ratios in found.items():
        score = sum(math.log(ratio + 0.01) for ratio in ratios) / len(ratios)
        print(f"| {name} | {len(ratios)} | {score:.3f} | {sum(ratio > STUCK for ratio in ratios)} |")


if __name__ == "__main__":
    main()
