"""How many rows should the validation losses have that a theta is told?

Scores it on the first 100 validation tasks of the recipe ``continue``, told losses of 1 (a minibatch), 128, 256 and
1024 rows: the mean over runs of 200 and 1000 steps, with and without total_steps, of log(final held-out loss / initial
loss + .01); then the difference from the first with its standard error over tasks. Held-out tasks play no part.

    python docs/notebook/scripts/valid_rows.py THETA
"""

import math
import sys

import torch
from validation import score

from lopt import Theta
from lopt.meta.executors import LocalProcesses, usable_cores
from lopt.meta.recipes import recipe

ROWS = (1, 128, 256, 1024)
TASKS = 100


def main() -> None:
    (source,) = sys.argv[1:]
    theta = Theta.load(source)
    executor = LocalProcesses(usable_cores())
    print("| rows | score | difference | CPU-seconds |")
    print("|---|---|---|---|")
    first = torch.zeros(TASKS)
    for rows in ROWS:
        config = recipe("continue", inner_steps=1, validation_horizons=(200, 1000), valid_rows=rows)
        finals, seconds = score(theta, config, executor, TASKS)
        scores = finals.mean(dim=1)
        first = scores if rows == ROWS[0] else first
        change = scores - first
        print(
            f"| {rows} | {scores.mean():.4f} | {change.mean():.4f} ± {change.std() / math.sqrt(TASKS):.4f} | "
            f"{seconds:.0f} |",
            flush=True,
        )
    executor.close()


if __name__ == "__main__":
    main()
