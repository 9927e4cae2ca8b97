"""``lopt meta-train``: meta-train theta on synthetic tasks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lopt.commands.common import Command, Outcome, say
from lopt.commands.weights import describe_theta
from lopt.meta.trainer import MetaTrainConfig, read_metrics, run


@dataclass(frozen=True, kw_only=True)
class MetaTrain(Command):
    """Meta-train theta by evolution strategies on small synthetic tasks.

    Writes theta.safetensors, metrics.jsonl, meta_loss.png, config.json and checkpoint.pt. lopt train --theta
    tries the result.
    """

    out: Path = Path("runs/meta-train")
    """Folder for everything the run leaves behind."""

    resume: bool = False
    """Go on from the checkpoint in --out; give the same options as before."""

    config: Annotated[MetaTrainConfig, tyro.conf.arg(name="")] = field(default_factory=MetaTrainConfig)

    def run(self, console: Console) -> Outcome:
        theta = run(self.config, self.out, resume=self.resume, console=console)
        path = self.out / "theta.safetensors"
        before, after = (theta.provenance["validation"][name] for name in ("first", "last"))
        say(console, f"Validation loss (1 = initial): {before:.4f} at the start, {after:.4f} at the end")
        say(console, f"Wrote {describe_theta(str(path), theta)}")
        numbers = {"command": "meta-train", "theta": path, "provenance": theta.provenance}
        return Outcome(0, {**numbers, "metrics": read_metrics(self.out)})
