"""``lopt plot``: draw the figure of a meta-training run, finished or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lopt.commands.common import Command, Outcome, check_option, say
from lopt.meta import plots
from lopt.meta.metrics import FILE, read_metrics


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw meta_loss.png of a meta-training run from its metrics.jsonl; the run may still be going on."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""

    def run(self, console: Console) -> Outcome:
        metrics = read_metrics(self.folder)
        check_option("folder", self.folder, "folder")
        if not metrics:
            raise ValueError(f"folder: {self.folder / FILE} has no whole line; wait for the first, or run it again")
        path = self.folder / "meta_loss.png"
        plots.meta_loss(metrics, path)
        last = metrics[-1]
        say(console, f"Wrote {path}: iteration {last['iteration']}, {last['inner_steps']:,} inner steps")
        return Outcome(0, {"command": "plot", "figure": path, "last": last})
