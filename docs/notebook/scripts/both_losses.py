"""What does a theta that is trained for one loss cost in the other?

Scores thetas between ``default`` (held-out loss) and ``train-loss`` on the first 60 validation tasks of the recipe
``continue``: the mean over runs of 200 and 1000 steps, with and without total_steps, of log(final loss / initial loss +
.01), for both losses; then the differences from ``default`` with their standard errors over tasks. Held-out tasks play
no part.

    python docs/notebook/scripts/both_losses.py
"""

import math

import torch
from validation import score

from lopt import Theta
from lopt.meta.executors import LocalProcesses, usable_cores
from lopt.meta.recipes import recipe

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
OBJECTIVES = ("held_out", "train")
TASKS = 60


def main() -> None:
    ours, other = Theta.load("default"), Theta.load("train-loss")
    executor = LocalProcesses(usable_cores())
    print("| share of train-loss |", " | ".join(f"{name} | difference" for name in OBJECTIVES), "|")
    print("|---" * (1 + 2 * len(OBJECTIVES)) + "|")
    first: dict[str, torch.Tensor] = {}
    for share in SHARES:
        theta = ours.toward(other, share)
        cells = [f"{share:g}"]
        for objective in OBJECTIVES:
            config = recipe("continue", inner_steps=1, validation_horizons=(200, 1000), objective=objective)
            scores = score(theta, config, executor, TASKS)[0].mean(dim=1)
            change = scores - first.setdefault(objective, scores)
            cells += [f"{scores.mean():.4f}", f"{change.mean():.4f} ± {change.std() / math.sqrt(TASKS):.4f}"]
        print("|", " | ".join(cells), "|", flush=True)
    executor.close()


if __name__ == "__main__":
    main()
