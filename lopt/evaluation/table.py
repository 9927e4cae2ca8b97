"""The table of runs: one row per run, kept in one CSV file that grows while an evaluation runs.

A row is found again by what its result depends on (:attr:`Run.key`): what is in the table is not run again, and an
interrupted evaluation goes on where it stopped. Files of earlier versions, with fewer columns, are read as well.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lopt.tables import CsvTable
from lopt.tasks.task import SplitName

LossName = Literal["train_loss", "valid_loss", "test_loss", "inner_valid_loss"]

#: Column of the loss on each split.
LOSSES: dict[SplitName, LossName] = {
    "train": "train_loss",
    "outer_valid": "valid_loss",
    "test": "test_loss",
    "inner_valid": "inner_valid_loss",
}

#: The columns that identify a run.
KEY = (
    "suite",
    "task_sha256",
    "horizon",
    "seed",
    "optimizer",
    "hint",
    "impl",
    "theta_sha256",
    "code_sha256",
    "schedule",
    "lr",
    "settings",
)

#: Names of the learned optimizer, and what its runs are set to: told the number of steps, not told, not told with an
#: average of its iterates, and told, but no validation losses.
LEARNED: dict[str, dict[str, bool]] = {
    "lopt": {},
    "lopt-untold": {},
    "lopt-averaged": {"average": True},
    "lopt-blind": {"blind": True},
}

#: Those of them that are told.
TOLD = ("lopt", "lopt-blind")

#: The columns that differ when a run is repeated.
TIMED = ("seconds", "steps_per_second", "times", "date")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a row of the CSV file.

    Losses are those of whole splits, or of fixed minibatches of them, as in :func:`~lopt.evaluation.runs.train_task`;
    ``valid`` is outer_valid. ``hint`` says whether a learned optimizer was told the number of steps; ``impl`` is its
    implementation, or the package an opponent comes from. ``trial`` counts the hyperparameters that tuning tries, and
    ``settings`` is those in JSON. ``curve`` is JSON, too: step, training and test loss along the run, ``times`` the
    seconds of training until there; or, in experiments of another kind, lists by name. ``machine`` is its processor and
    the instruction set of the CPU kernels, ``x`` its place on the axis of an experiment.
    """

    suite: str
    task: str
    optimizer: str
    schedule: str
    lr: float
    seed: int
    horizon: int
    hint: bool
    train_loss: float
    valid_loss: float
    test_loss: float
    initial_train_loss: float
    initial_valid_loss: float
    initial_test_loss: float
    diverged: bool
    seconds: float
    impl: str
    task_sha256: str
    theta_sha256: str
    code_sha256: str
    commit: str
    lopt: str
    torch: str
    numpy: str
    python: str
    # What earlier tables lack.
    family: str = ""
    data: str = ""
    num_params: int = 0
    trial: int = 0
    settings: str = ""
    inner_valid_loss: float = math.nan
    initial_inner_valid_loss: float = math.nan
    steps_per_second: float = math.nan
    state_bytes_per_param: float = math.nan
    curve: str = ""
    times: str = ""
    date: str = ""
    machine: str = ""
    x: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What the result depends on; a run whose key is known need not be run again."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def name(self) -> str:
        """The optimizer as the command line calls it."""
        if self.optimizer == "lopt":
            names = [name for name, settings in LEARNED.items() if settings and json.dumps(settings) == self.settings]
            return names[0] if names else "lopt" if self.hint else "lopt-untold"
        if self.schedule:  # the grid of Adams in one batch
            return "adam-grid" if self.schedule == "constant" else f"adam-{self.schedule}-grid"
        return self.optimizer

    @property
    def points(self) -> list[tuple[int, float, float, float]]:
        """Step, seconds, training and test loss along the run; nothing where they were not recorded."""
        curve, times = json.loads(self.curve or "[]"), json.loads(self.times or "[]")
        return [(step, at, train, test) for (step, train, test), at in zip(curve, times, strict=True)]

    def along(self, name: str) -> list[float]:
        """What was recorded along the run: "step", "seconds", "train", "test", or a list of another name."""
        if self.times:
            return [float(point[("step", "seconds", "train", "test").index(name)]) for point in self.points]
        values: list[float] = json.loads(self.curve)[name]
        return values


class RunTable(CsvTable[Run]):
    """The runs in a CSV file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Run)

    def tidy(self, first: Sequence[Any] = ()) -> None:
        """Sort the file: the runs of these keys, as they come, then others by what was run."""
        order = {key: place for place, key in enumerate(first)}
        last = len(order)
        self.sort(lambda run: (order.get(run.key, last), run.suite, run.task, run.horizon, *_sortable(run.key)))


def _sortable(key: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{value:020.10f}" if isinstance(value, (int, float)) else str(value) for value in key)
