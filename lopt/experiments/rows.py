"""What runs gave: one row each, a CSV file of them, and the questions that figures and texts ask."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt.evaluation.runs import RECORDED, Result
from lopt.evaluation.scores import ratio
from lopt.evaluation.table import LOSSES
from lopt.experiments.runs import Run
from lopt.figures import Line
from lopt.provenance import origin
from lopt.tables import CsvTable


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the CSV file: a run and its result. ``curve`` is JSON, lists by name."""

    task: str
    optimizer: str
    trial: int
    lr: float
    x: float
    seed: int
    steps: int
    train_loss: float
    valid_loss: float
    test_loss: float
    initial_train_loss: float
    initial_valid_loss: float
    initial_test_loss: float
    diverged: bool
    seconds: float
    curve: str
    run_sha256: str
    theta_sha256: str
    date: str
    machine: str
    commit: str
    lopt: str
    torch: str
    numpy: str
    python: str

    @classmethod
    def of(cls, run: Run, result: Result) -> "Row":
        """The row of a run that has ended."""
        columns: dict[str, Any] = {name: getattr(run, name) for name in ("task", "optimizer", "trial", "seed", "steps")}
        columns |= {"lr": float(run.lr), "x": float(run.x), "theta_sha256": run.theta_sha256, "run_sha256": run.sha256}
        for split in RECORDED:
            columns |= {LOSSES[split]: result.losses[split], f"initial_{LOSSES[split]}": result.initial[split]}
        curve = {name: [float(f"{value:.6g}") for value in values] for name, values in result.curve.items()}
        made: dict[str, Any] = dict(origin())
        return cls(
            **columns,
            diverged=result.diverged,
            seconds=round(result.seconds, 4),
            curve=json.dumps(curve, separators=(",", ":")),
            **made,
        )

    @property
    def key(self) -> str:
        """Hash of what the result depends on."""
        return self.run_sha256

    def along(self, name: str) -> list[float]:
        """A list of the curve."""
        values: list[float] = json.loads(self.curve)[name]
        return values


class RowTable(CsvTable[Row]):
    """The rows of an experiment in a CSV file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row)

    def tidy(self, runs: Sequence[Run]) -> None:
        """Sort the file: these runs in their order, then the others."""
        order = {run.sha256: at for at, run in enumerate(runs)}
        self.sort(lambda row: order.get(row.key, len(order)))


def mean(rows: Sequence[Row], column: str) -> float:
    """Mean of a column; of none, NaN."""
    return math.fsum(getattr(row, column) for row in rows) / len(rows) if rows else math.nan


def average(rows: Sequence[Row], name: str) -> list[float]:
    """Mean over the rows of a list of their curves, point by point."""
    return [sum(column) / len(rows) for column in zip(*(row.along(name) for row in rows), strict=True)]


def line(label: str, rows: Sequence[Row], at: str, what: str, colour: str, width: float = 1.8) -> Line:
    """The average of the rows, one list of their curves against another."""
    return Line(label, average(rows, at), average(rows, what), colour, width=width)


def select(rows: Sequence[Row], **columns: Any) -> list[Row]:
    """The rows with these values.

    A tuple stands for any of its values.
    """
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in columns.items()}
    return [row for row in rows if all(getattr(row, name) in values for name, values in allowed.items())]


def values(rows: Sequence[Row], column: str) -> list[Any]:
    """Every value of a column once, in order of appearance."""
    return list(dict.fromkeys(getattr(row, column) for row in rows))


#: By which loss the trials of an optimizer are compared when a loss is to be low: nobody may look at test rows.
CHOICE = {"train_loss": "train_loss", "valid_loss": "valid_loss", "test_loss": "valid_loss"}


def best(rows: Sequence[Row], loss: str) -> list[Row]:
    """The rows, one per seed, of the optimizer and trial that tuning for this loss picks, see ``CHOICE``."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, row.trial), []).append(row)
    return min(groups.values(), key=lambda group: mean(group, CHOICE[loss]))


def relative(rows: Sequence[Row], optimizer: str, rival: str, loss: str) -> float:
    """Loss of an optimizer over that of a tuned rival, see :func:`~lopt.evaluation.scores.ratio`; all rows are of one
    task and one place on the axis."""
    ours, theirs = select(rows, optimizer=optimizer), best(select(rows, optimizer=rival), loss)
    return ratio(mean(ours, loss), mean(theirs, loss), mean(ours, f"initial_{loss}"))
