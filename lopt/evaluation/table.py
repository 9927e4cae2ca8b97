"""The table of runs: one row per run, kept in one CSV file that grows while an evaluation runs.

A row is found again by what its result depends on (:attr:`Run.key`): what is in the table is not run again, and an
interrupted evaluation goes on where it stopped. Files of earlier versions, with fewer columns, are read as well.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

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

#: The columns that differ when a run is repeated.
TIMED = ("seconds", "steps_per_second", "times")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a row of the CSV file.

    Losses are those of whole splits, or of fixed minibatches of them, as in :func:`~lopt.evaluation.runs.train_task`;
    ``valid`` is outer_valid. ``hint`` says whether a learned optimizer was told the number of steps; ``impl`` is its
    implementation, or the package an opponent comes from. ``trial`` counts the hyperparameters that tuning tries, and
    ``settings`` is those in JSON. ``curve`` is JSON, too: step, training and test loss along the run, ``times`` the
    seconds of training until there.
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

    @property
    def key(self) -> tuple[Any, ...]:
        """What the result depends on; a run whose key is known need not be run again."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def name(self) -> str:
        """The optimizer as the command line calls it."""
        if self.optimizer == "lopt":
            return "lopt" if self.hint else "lopt-untold"
        if self.schedule:  # the grid of Adams in one batch
            return "adam-grid" if self.schedule == "constant" else f"adam-{self.schedule}-grid"
        return self.optimizer

    @property
    def points(self) -> list[tuple[int, float, float, float]]:
        """Step, seconds, training and test loss along the run; nothing where they were not recorded."""
        curve, times = json.loads(self.curve or "[]"), json.loads(self.times or "[]")
        return [(step, at, train, test) for (step, train, test), at in zip(curve, times, strict=True)]


COLUMNS = {field.name: field.type for field in dataclasses.fields(Run)}
_REQUIRED = sum(field.default is dataclasses.MISSING for field in dataclasses.fields(Run))


class RunTable:
    """The runs in a CSV file: read at once, appended to as they come in.

    Several processes may append to one file; they wait at ``.lock`` beside it. The last row of a process that was
    killed while it wrote is ignored.

    Raises:
        ValueError: the file is a table of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[tuple[Any, ...], Run] = {}
        self._complete = self._read()

    def append(self, runs: Sequence[Run]) -> None:
        """Add runs, here and in the file."""
        self.runs.update({run.key: run for run in runs})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self._complete:
                self._read()
                self.runs.update({run.key: run for run in runs})
                self._write()
                return
            before = self.path.read_bytes()[-1:] if self.path.is_file() else b""
            text = _text(runs, header=not before)
            with self.path.open("a") as file:
                file.write(("\n" if before not in (b"", b"\n") else "") + text)

    def tidy(self) -> None:
        """Sort the file by what was run, so that it does not tell in which order, or how often it was interrupted."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._read()
            self._write()

    def _read(self) -> bool:
        """Take in the rows of the file; whether it has all columns (or does not exist) and whole rows only."""
        content = self.path.read_text() if self.path.is_file() else ""
        rows = list(csv.reader(io.StringIO(content)))
        if not rows:
            return True
        names = list(COLUMNS)
        header = rows[0]
        if len(header) < _REQUIRED or header != names[: len(header)]:
            columns = ", ".join(names)
            raise ValueError(f"{self.path}: expected the columns {columns}; move the file or choose another --out")
        whole = rows[1:] if content.endswith("\n") else rows[1:-1]
        for row in whole:
            if len(row) == len(header):
                run = _parse(row)
                self.runs[run.key] = run
        return header == names and content.endswith("\n")

    def _write(self) -> None:
        """Replace the file by all runs, sorted."""
        order = sorted(self.runs.values(), key=lambda run: (run.suite, run.task, run.horizon, *_sortable(run.key)))
        part = self.path.with_suffix(".part")
        part.write_text(_text(order, header=True))
        os.replace(part, self.path)
        self._complete = True

    def _alone(self) -> FileLock:
        """While inside, no other process writes into the folder's tables; a process that is killed lets go."""
        return FileLock(self.path.parent / ".lock")


def _sortable(key: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{value:020.10f}" if isinstance(value, (int, float)) else str(value) for value in key)


def _text(runs: Sequence[Run], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(dataclasses.astuple(run) for run in runs)
    return text.getvalue()


def _parse(row: Sequence[str]) -> Run:
    values: dict[str, Any] = {}
    for (name, kind), text in zip(COLUMNS.items(), row, strict=False):
        values[name] = text == "True" if kind is bool else math.nan if text == "nan" else kind(text)  # type: ignore[operator]
    return Run(**values)
