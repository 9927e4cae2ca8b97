"""On which families of tasks are a theta's steps too short or too long?

Scores a compact theta, the same with the logarithm of every step raised, and the imitation of Adam that meta-training
begins with, on 16 validation tasks of every synthetic family: the mean over runs of 200 and 1000 steps, told and
untold, of log(final held-out loss / initial loss + .01). Held-out tasks play no part.

    python docs/notebook/scripts/by_family.py THETA
"""

import math
import sys

import torch
from validation import score

from lopt import Theta
from lopt.meta.executors import LocalProcesses, usable_cores
from lopt.meta.recipes import recipe
from lopt.tasks import ENGINE_FAMILIES

FACTORS = (1.0, math.exp(0.25), math.exp(0.5), math.exp(0.75))
TASKS = 16


def main() -> None:
    (source,) = sys.argv[1:]
    theta = Theta.load(source)
    thetas = {"Adam": Theta.init_adam("compact")}
    for factor in FACTORS:
        changed = {**theta.tensors, "step.b": theta.tensors["step.b"] + math.log(factor)}
        thetas[f"steps x {factor:.2f}"] = Theta(theta.spec, changed)
    executor = LocalProcesses(usable_cores())
    print("| family |", " | ".join(thetas), "|")
    print("|---" * (1 + len(thetas)) + "|")
    table = []
    for family in ENGINE_FAMILIES:
        config = recipe("continue", inner_steps=1, tasks=(family,), validation_horizons=(200, 1000))
        scores = []
        for changed_theta in thetas.values():
            scores.append(float(score(changed_theta, config, executor, TASKS)[0].mean()))
        table.append(scores)
        print(f"| {family} |", " | ".join(f"{score:.3f}" for score in scores), "|", flush=True)
    print("| mean |", " | ".join(f"{score:.3f}" for score in torch.tensor(table).mean(dim=0).tolist()), "|")
    executor.close()


if __name__ == "__main__":
    main()
