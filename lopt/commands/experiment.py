"""``lopt experiment``: the paper's experiments, each with a CSV file, a figure and a text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from lopt.commands.common import Outcome, OutFolder, Seed, check_option, say
from lopt.commands.progress import progress
from lopt.commands.workers import Spread
from lopt.evaluation.jobs import Job, execute
from lopt.evaluation.suites import take_fashion_mnist_from
from lopt.evaluation.table import Run, RunTable
from lopt.experiments import EXPERIMENTS
from lopt.experiments.setting import SEEDS, Scale, Setting
from lopt.figures import require_matplotlib

if TYPE_CHECKING:
    Name = str
else:  # what there is, as tyro reads it
    Name = Literal[tuple(EXPERIMENTS)]


@dataclass(frozen=True, kw_only=True)
class RunExperiment(Spread):
    """Run one of the paper's experiments: every run is a row of NAME.csv, beside it NAME.png and README.md.

    Rows that are there are not run again: an experiment that was stopped goes on where it was, and one that is complete
    is drawn and written anew. Repeated runs give the same losses to the bit. A row is found by what it depends on, with
    theta and the code of the optimizer; rows of other code stay in the file.
    """

    name: Annotated[Name, tyro.conf.Positional]
    """Which experiment."""

    scale: Scale = "small"
    """small fits ten minutes of two quick cores; full is the real one."""

    theta: str = "default"
    """Meta-parameters of the learned optimizer: a shipped name (see lopt weights show) or a file."""

    seeds: tuple[Seed, ...] | None = None
    """A seed decides initial weights and minibatches; 0 for small and 0 1 2 for full if none is given."""

    runs: bool = True
    """Do not run anything: draw and write what the rows in --out say, whatever they depend on."""

    data: Path | None = None
    """Folder with the IDX files of Fashion-MNIST, if they are not where the Debian package puts them."""

    out: OutFolder | None = None
    """Folder for the three files; runs/experiments/NAME-SCALE if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds = self.seeds
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise ValueError(f"seeds: expected numbers from 0 on, at least one and none twice, got {seeds}")

    def run(self, console: Console) -> Outcome:
        require_matplotlib()
        experiment = EXPERIMENTS[self.name]
        out = self.out or Path("runs/experiments") / f"{self.name}-{self.scale}"
        check_option("out", out, "folder")
        seeds = SEEDS[self.scale] if self.seeds is None else self.seeds
        if self.data is not None:
            take_fashion_mnist_from(self.data)
        table = RunTable(out / f"{self.name}.csv")
        if self.runs:
            jobs = experiment.jobs(Setting(scale=self.scale, theta=self.theta, seeds=seeds))
            rows = self._execute(console, jobs, table)
        else:
            rows = list(table.rows.values())
            if not rows:
                raise ValueError(f"runs: no rows in {table.path}; run the experiment, or name its folder")
        figure, text = experiment.write(rows, out)
        say(console, text.read_text(encoding="utf-8").rstrip())
        say(console, "")
        say(console, f"Wrote {table.path}, {figure} and {text}")
        numbers = {"command": "experiment", "rows": [dataclasses.asdict(row) for row in rows]}
        return Outcome(0, {**numbers, "figure": figure, "text": text})

    def _execute(self, console: Console, jobs: Sequence[Job], table: RunTable) -> list[Run]:
        there = [key in table.rows for job in jobs for key in job.keys]
        say(console, f"{len(there)} runs, {sum(there)} of them in {table.path}")
        with progress(console, f"{self.name}, batches of runs") as status, self.spread() as workers:
            return execute(jobs, table, workers, status.update, self.data, in_order=True)
