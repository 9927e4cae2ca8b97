"""Seconds per step of every optimizer on every task, measured apart from the runs.

Runs may be spread over processes, days and machines; their seconds then mean little. So a comparison by second takes
the losses along a run from its row, and the seconds of a step from here: all optimizers of a task in turn, a few steps
each, several times over, in one process with one thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lopt.evaluation.runs import VALID_EVERY, OptimizerFactory, Training
from lopt.tables import CsvTable
from lopt.tasks.task import Task

#: Every optimizer takes so many steps in its turn, so many times, the first of which does not count.
STEPS, ROUNDS = 2 * VALID_EVERY, 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """How long a step takes: a row of the CSV file.

    Args:
        optimizer: name as on the command line.
        seconds: per step, the median over rounds; ``least`` and ``most`` are of the quickest and slowest round.
        impl: implementation, or package, as in the rows of runs.
        machine: its processor and the instruction set of the CPU kernels.
    """

    suite: str
    task: str
    optimizer: str
    seconds: float
    least: float
    most: float
    impl: str
    task_sha256: str
    machine: str
    date: str
    commit: str
    lopt: str
    torch: str
    numpy: str
    python: str

    @property
    def key(self) -> tuple[str, ...]:
        """What is measured once."""
        return (self.suite, self.task_sha256, self.optimizer, self.impl, self.machine)


class StepTimes(CsvTable[StepTime]):
    """The rows in ``step_times.csv`` of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "step_times.csv", StepTime)

    def tidy(self) -> None:
        """Sort the file by what was measured, and leave out what was measured anew."""
        self.sort(lambda row: (row.suite, row.task, row.optimizer, row.impl, row.machine))

    @property
    def machine(self) -> str | None:
        """The machine with most rows; of several, the first. None if there are no rows."""
        machines = [row.machine for row in self.rows.values()]
        return max(dict.fromkeys(machines), key=machines.count, default=None)

    def seconds(self) -> dict[tuple[str, str, str], float]:
        """``(suite, SHA-256 of the task, optimizer)`` -> seconds per step, on :attr:`machine`."""
        rows = [row for row in self.rows.values() if row.machine == self.machine]
        return {(row.suite, row.task_sha256, row.optimizer): row.seconds for row in rows}


def measure(
    task: Task, factories: Mapping[str, OptimizerFactory], *, steps: int = STEPS, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds per step of every optimizer on one task: a number for each round but the first, until it diverges.

    Args:
        factories: the optimizers, by name; all start from seed 0.
        steps: taken in a round.
        rounds: at least 2.

    Raises:
        ValueError: too few rounds.

    Example:
        >>> from lopt.tasks import sample_task
        >>> found = measure(sample_task(0), {"sgd": lambda params, _: torch.optim.SGD(params, lr=0.1)}, rounds=4)
        >>> [len(seconds) for seconds in found.values()], min(found["sgd"]) > 0
        ([3], True)
    """
    if rounds < 2:
        raise ValueError(f"rounds: expected at least 2, the first does not count, got {rounds}")
    found: dict[str, list[float]] = {name: [] for name in factories}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runs = {name: Training(task, factory, 0, steps * rounds) for name, factory in factories.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                before = run.seconds
                run.advance(steps)
                if run.finite:
                    found[name].append((run.seconds - before) / steps)
    return {name: seconds[1:] for name, seconds in found.items()}
