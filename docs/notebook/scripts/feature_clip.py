"""At how many root mean squares should features be clipped? A line search over one constant of a theta's spec.

Meta-training does not move it. Gradients with long tails, as those of embeddings, make features that perceptrons never
show, and steps that are too long. This script scores a theta at several clips on the validation tasks of two recipes:
``continue`` (perceptrons; runs of 200, 1000 and 5000 steps) and ``mixture`` (all families; 100 and 400 steps), each
told and untold, by the mean over runs of log(final held-out loss / initial loss + .01), and writes the theta with the
best mean of both. Held-out tasks play no part.

    python docs/notebook/scripts/feature_clip.py THETA OUT
"""

import dataclasses
import sys

from validation import score

from lopt import Theta
from lopt.meta import pairs
from lopt.meta.executors import LocalProcesses, usable_cores
from lopt.meta.recipes import recipe

CLIPS = (5.0, 4.0, 3.0, 2.0)


def main() -> None:
    source, out = sys.argv[1:]
    theta = Theta.load(source)
    executor = LocalProcesses(usable_cores())
    scores: dict[float, dict[str, float]] = {}
    for clip in CLIPS:
        clipped = theta.with_spec(feature_clip=clip)
        scores[clip] = {}
        for name in ("continue", "mixture"):
            config = recipe(name, inner_steps=1)
            finals, _ = score(clipped, config, executor, config.validation_tasks)
            runs = (f"{horizon} {'told' if told else 'untold'}" for horizon, told in pairs.settings(config))
            means = (f"{run} {value:.4f}" for run, value in zip(runs, finals.mean(dim=0), strict=True))
            print(f"clip {clip:g}, {name} {finals.mean():.4f}:", ", ".join(means), flush=True)
            scores[clip][name] = round(float(finals.mean()), 4)
    executor.close()
    best = min(scores, key=lambda clip: sum(scores[clip].values()))
    search = {"clip": best, "scores": {str(clip): found for clip, found in scores.items()}}
    chosen = theta.with_spec(feature_clip=best)
    dataclasses.replace(chosen, provenance={**theta.provenance, "feature_clip": search}).save(out)


if __name__ == "__main__":
    main()
