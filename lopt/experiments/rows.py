"""The questions that figures and texts ask of rows."""

import math
from collections.abc import Sequence
from typing import Any

from lopt.evaluation.comparison import ratio
from lopt.evaluation.table import Run
from lopt.figures import GREY, Line


def mean(rows: Sequence[Run], column: str) -> float:
    """Mean of a column; of none, NaN."""
    return math.fsum(getattr(row, column) for row in rows) / len(rows) if rows else math.nan


def average(rows: Sequence[Run], name: str) -> list[float]:
    """Mean over the rows of a list of their curves, point by point."""
    return [sum(column) / len(rows) for column in zip(*(row.along(name) for row in rows), strict=True)]


def line(label: str, rows: Sequence[Run], at: str, what: str, colour: str, width: float = 1.8) -> Line:
    """The average of the rows, one list of their curves against another."""
    return Line(label, average(rows, at), average(rows, what), colour, width=width)


def over_x(
    label: str, rows: Sequence[Run], loss: str, colour: str = GREY, width: float = 1.8, marker: str = "o"
) -> Line:
    """The final loss along the axis, of the trial that is the best at each place."""
    xs = sorted(values(rows, "x"))
    losses = [mean(best(select(rows, x=x), loss), loss) for x in xs]
    return Line(label, xs, losses, colour, marker=marker, width=width)


def select(rows: Sequence[Run], **columns: Any) -> list[Run]:
    """The rows with these values.

    A tuple stands for any of its values.
    """
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in columns.items()}
    return [row for row in rows if all(getattr(row, name) in values for name, values in allowed.items())]


def values(rows: Sequence[Run], column: str) -> list[Any]:
    """Every value of a column once, in order of appearance."""
    return list(dict.fromkeys(getattr(row, column) for row in rows))


#: By which loss the trials of an optimizer are compared when a loss is to be low: nobody may look at test rows.
CHOICE = {"train_loss": "train_loss", "valid_loss": "valid_loss", "test_loss": "valid_loss"}


def best(rows: Sequence[Run], loss: str) -> list[Run]:
    """The rows, one per seed, of the optimizer and trial that tuning for this loss picks, see ``CHOICE``."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for row in rows:
        groups.setdefault((row.name, row.trial), []).append(row)
    return min(groups.values(), key=lambda group: mean(group, CHOICE[loss]))


def relative(rows: Sequence[Run], name: str, rival: str, loss: str) -> float:
    """Loss of an optimizer over that of a tuned rival, see :func:`~lopt.evaluation.comparison.ratio`; all rows are of
    one task and one place on the axis."""
    ours, theirs = select(rows, name=name), best(select(rows, name=rival), loss)
    return ratio(mean(ours, loss), mean(theirs, loss), mean(ours, f"initial_{loss}"))
