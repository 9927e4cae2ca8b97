"""``lopt meta-train``: meta-train theta on tasks that need no data."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from lopt.commands.common import Outcome, OutFolder, Seed, json_settings, say
from lopt.commands.weights import describe_theta
from lopt.commands.workers import Spread
from lopt.meta.loggers import LoggerName
from lopt.meta.metrics import read_metrics
from lopt.meta.recipes import check_fields
from lopt.meta.train import meta_train

RecipeName = Literal["default", "train-loss", "continue", "paper", "networks", "mixture", "backprop", "tiny"]


@dataclass(frozen=True, kw_only=True)
class MetaTrain(Spread):
    """Meta-train theta by evolution strategies on small synthetic tasks, or with --recipe mixture on all families.

    Writes theta.safetensors (the best on the validation tasks), theta_last.safetensors, metrics.jsonl, meta_loss.png,
    config.json and checkpoint.pt. lopt train --theta tries the result.
    """

    recipe: RecipeName | None = None
    """Settings to begin with; default if none is named."""

    out: OutFolder = Path("runs/meta-train")
    """Folder for everything the run leaves behind."""

    hours: float | None = None
    """Budget in hours of wall time. Converted once, by a short measurement, to a number of inner steps: that is the
    budget, so results do not depend on a clock. One hour if neither this nor --inner-steps is given."""

    inner_steps: int | None = None
    """Budget in inner steps, for a run that can be repeated exactly."""

    resume: bool = False
    """Go on from the checkpoint in --out, with its settings; settings given as well must agree with them."""

    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Theta to start from, a file or a shipped name, instead of Adam."""

    seed: Seed | None = None
    """Every random number derives from it; 0 if not given."""

    log: tuple[LoggerName, ...] = ()
    """Where metrics go beside metrics.jsonl, in folders of --out: tensorboard (tensorboard --logdir), wandb (Weights
    & Biases; with WANDB_MODE=offline it stays on this machine)."""

    set: tuple[str, ...] = ()
    """More settings, as NAME=VALUE with the value in JSON, for instance pairs=32 weighting="last"."""

    def run(self, console: Console) -> Outcome:
        with self.spread() as executor:
            theta = meta_train(
                self.recipe,
                self.out,
                hours=self.hours,
                executor=executor,
                callbacks=self.log,
                resume=self.resume,
                console=console,
                command=shlex.join(["lopt", *sys.argv[1:]]),
                **self._given(),
            )
        path = self.out / "theta.safetensors"
        before, after = (theta.provenance["validation"][name] for name in ("first", "best"))
        say(console, f"Validation, log of final loss / initial loss: {before:.4f} at the start, {after:.4f} at best")
        say(console, f"Wrote {describe_theta(str(path), theta)}")
        numbers = {"command": "meta-train", "theta": path, "provenance": theta.provenance}
        return Outcome(0, {**numbers, "metrics": read_metrics(self.out)})

    def _given(self) -> dict[str, Any]:
        """Fields of the configuration that the command line names."""
        named = {"inner_steps": self.inner_steps, "init": self.from_, "seed": self.seed}
        given = {name: value for name, value in named.items() if value is not None}
        given |= json_settings(self.set)
        check_fields(given)
        return given
