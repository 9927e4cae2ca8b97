"""``lopt plot``: draw the figure of a meta-training run, finished or not, or of what an optimizer did in a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lopt import history
from lopt.commands.common import Command, Outcome, check_option, say
from lopt.meta import plots
from lopt.meta.metrics import FILE, read_metrics


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw meta_loss.png of a meta-training run from its metrics.jsonl (the run may still be going on), or, beside a
    table that lopt.History saved, its figure."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|CSV")]
    """Folder of the meta-training run, or the table."""

    def run(self, console: Console) -> Outcome:
        return self._history(console) if self.source.is_file() else self._meta_training(console)

    def _history(self, console: Console) -> Outcome:
        rows, path = history.read(self.source), self.source.with_suffix(".png")
        history.plot(rows, path, self.source.stem)
        say(console, f"Wrote {path}: {len({row.tensor for row in rows})} tensors, {rows[-1].step} steps")
        return Outcome(0, {"command": "plot", "figure": path, "last": rows[-1]._asdict()})

    def _meta_training(self, console: Console) -> Outcome:
        metrics = read_metrics(self.source)
        check_option("source", self.source, "folder")
        if not metrics:
            raise ValueError(f"source: {self.source / FILE} has no whole line; wait for the first, or run it again")
        path = self.source / "meta_loss.png"
        plots.meta_loss(metrics, path)
        last = metrics[-1]
        say(console, f"Wrote {path}: iteration {last['iteration']}, {last['inner_steps']:,} inner steps")
        return Outcome(0, {"command": "plot", "figure": path, "last": last})
