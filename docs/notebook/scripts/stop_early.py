"""How strongly should a rising validation loss shorten the step? A line search over one weight of a compact theta.

Meta-training moves this weight slowly: most of its runs are too short for early stopping to matter. This script adds
offsets to the weight from the rise of the validation loss (loss_rise in lopt.rule.tensor_lstm) to the log of the step,
scores each on synthetic validation tasks (runs of 200, 1000 and 5000 steps, told and untold) by the mean over runs of
log(final held-out loss / initial loss + .01), and writes the best theta. Held-out tasks play no part.

    python docs/notebook/scripts/stop_early.py THETA OUT
"""

import dataclasses
import sys

from validation import score

from lopt import Theta
from lopt.meta import pairs
from lopt.meta.executors import LocalProcesses, usable_cores
from lopt.meta.recipes import recipe

OFFSETS = (0.0, -0.7, -1.5, -3.0)
TASKS = 60


def main() -> None:
    source, out = sys.argv[1:]
    theta = Theta.load(source)
    config = recipe("default", inner_steps=1, validation_horizons=(200, 1000, 5000))
    executor = LocalProcesses(usable_cores())
    scores = {}
    print("offset", *(f"{horizon} {'told' if told else 'untold'}" for horizon, told in pairs.settings(config)), "mean")
    for offset in OFFSETS:
        step = theta.tensors["step.w"].clone()
        step[theta.spec.lstm_width + theta.spec.lstm_index("valid_rise")] += offset
        changed = Theta(theta.spec, {**theta.tensors, "step.w": step})
        finals, _ = score(changed, config, executor, TASKS)
        scores[offset] = float(finals.mean()), changed
        print(offset, *(f"{value:.3f}" for value in finals.mean(dim=0)), f"{scores[offset][0]:.4f}", flush=True)
    executor.close()
    best = min(scores, key=lambda offset: scores[offset][0])
    search = {"offset": best, "scores": {str(offset): round(score, 4) for offset, (score, _) in scores.items()}}
    provenance = {**theta.provenance, "stop_early": search}
    dataclasses.replace(scores[best][1], provenance=provenance).save(out)


if __name__ == "__main__":
    main()
