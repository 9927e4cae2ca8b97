"""Meta-train an optimizer for a family of models of your own, and compare it with AdamW on members it has not seen.

python examples/meta_train_own.py --hours 1 --processes 4
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lopt
from lopt.evaluation.comparison import Runs
from lopt.evaluation.plots import loss_curves
from lopt.tasks import Task, from_module

ADAMW = "adamw-warmup-tuned"  # the best of eight learning rates, with warm-up and cosine; @2 for two of them


def rows() -> tuple[Tensor, Tensor]:
    """Your data: here places and heights of a landscape of waves. Every process calls this once."""
    random = torch.Generator().manual_seed(0)
    places = torch.rand(8192, 2, generator=random)
    waves, phases = 4 * torch.randn(2, 12, generator=random), 6 * torch.rand(12, generator=random)
    heights = torch.sin(places @ waves + phases).sum(dim=1, keepdim=True)
    return 2 * places - 1, (heights - heights.mean()) / heights.std()


def model(width: int, layers: int) -> nn.Module:
    """A member of your family of models."""
    sizes = [2, *[width] * layers]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def task(width: int, layers: int) -> Task:
    """Your training, as a task."""
    make, name = partial(model, width, layers), f"landscape-{layers}x{width}"
    return from_module(make, nn.functional.mse_loss, rows, batch_size=32, name=name)


def main(
    out: Path, steps: int = 500, trials: int = 8, points: int = 20, processes: int = 1, **budget: Any
) -> dict[str, float]:
    """Return how test losses of unseen members relate to AdamW's: those of the new theta, and those of ``default``."""
    family = [task(width, layers) for width in (12, 16, 24) for layers in (2, 3)]
    theta = lopt.meta_train("own", out, tasks=family, executor=processes, **budget)

    unseen = [task(20, 2), task(32, 3)]
    common: dict[str, Any] = {"steps": steps, "seeds": [0, 1], "points": points, "executor": processes, "out": out}
    mine = lopt.evaluate(unseen, ["lopt"], theta=theta, **common)
    default = lopt.evaluate(unseen, ["lopt"], **common)
    adamw = lopt.evaluate(unseen, [f"{ADAMW}@{trials}"], **common)
    loss_curves({"mine": mine, "default": default, "AdamW, tuned": adamw}, out / "losses.png")

    ratios = {}
    for name, ours in (("mine", mine), ("default", default)):
        comparison = Runs([*ours, *adamw]).compare("lopt", ADAMW, steps, "test")
        assert comparison is not None
        ratios[name] = comparison.ratio
    before, after = (theta.provenance["validation"][which] for which in ("first", "best"))
    print(f"Validation, log of final loss / initial loss: {before:.3f} at the start, {after:.3f} at best")
    print(f"Test loss over that of AdamW: {ratios['mine']:.3f}, with default {ratios['default']:.3f}")
    print(f'LearnedOptimizer(model, "{out / "theta.safetensors"}") trains with it; curves are in {out / "losses.png"}')
    return ratios


if __name__ == "__main__":  # processes import this file again
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)  # quickest for models of this size
    main(given.out, processes=given.processes, hours=given.hours)
