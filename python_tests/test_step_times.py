"""Seconds per step: by a clock that only the optimizers move, so that they can be told exactly."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt.cli import main
from lopt.evaluation import runs
from lopt.evaluation.runs import Training, train_task
from lopt.evaluation.step_times import StepTimes, measure
from lopt.tasks.held_out import HeldOutTask

WINE = HeldOutTask(data="wine", sizes=(13, 6, 3), batch_size=16)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self.moves: list[str] = []

    def perf_counter(self) -> float:
        return self.now


class Slow(torch.optim.SGD):
    """Every step moves the clock; the later steps by more."""

    def __init__(
        self, params: Iterable[Tensor], clock: Clock, name: str, seconds: list[float], lr: float = 0.1
    ) -> None:
        super().__init__(params, lr=lr)
        self.clock, self.label, self.seconds = clock, name, seconds

    def step(self, closure: Any = None) -> None:
        super().step()
        self.clock.now += self.seconds.pop(0)
        self.clock.moves.append(self.label)


def test_optimizers_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    makers = {
        "a": lambda p, n: Slow(p, clock, "a", [90.0, 90.0, 1.0, 3.0, 5.0, 5.0]),
        "b": lambda p, n: Slow(p, clock, "b", [0.5] * n),
    }
    assert measure(WINE, makers, steps=2, rounds=3) == {"a": [2.0, 5.0], "b": [0.5, 0.5]}
    assert "".join(clock.moves) == "aabbaabbaabb"
    with pytest.raises(ValueError, match="rounds: expected at least 2, the first does not count, got 1"):
        measure(WINE, makers, rounds=1)


def test_rounds_of_a_diverged_run_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so long steps the parameters overflow: nothing is said about it, and the other goes on."""
    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    makers = {
        "a": lambda p, n: Slow(p, clock, "a", [1.0] * n, lr=1e38),
        "b": lambda p, n: Slow(p, clock, "b", [1.0] * n),
    }
    assert measure(WINE, makers, steps=9, rounds=3) == {"a": [], "b": [1.0, 1.0]}


def test_a_run_in_parts_is_the_whole_run() -> None:
    """To the bit; and its seconds are the sum of the parts'."""
    run = Training(WINE, lambda p, _: torch.optim.SGD(p, lr=0.1), seed=3, steps=9)
    run.advance(4)
    before = run.seconds
    run.advance(5)
    whole = train_task(WINE, lambda p, _: torch.optim.SGD(p, lr=0.1), 3, 9)
    assert tuple(torch.stack(run.batch_losses).tolist()) == whole.batch_losses
    for name, value in run.params.items():
        assert torch.equal(value, whole.params[name])
    assert run.seconds > before > 0


def test_command(tmp_path: Path) -> None:
    """All optimizers of a task are measured; what is in the table is not measured again, and the report uses it."""
    options = ["--suite", "families", "--tasks", "maf-wine-4x46", "diabetes-16-16-1", "--horizons", "8", "--seeds", "1"]
    options += ["--workers", "1", "--out", str(tmp_path), "--step-times"]
    assert main(["evaluate", *options, "--optimizers", "lopt", "adam"]) == 0
    first = StepTimes(tmp_path).rows
    assert {(row.task, row.optimizer) for row in first.values()} == {
        (task, name) for task in ("maf-wine-4x46", "diabetes-16-16-1") for name in ("lopt", "adam")
    }
    assert all(0 < row.least <= row.seconds <= row.most for row in first.values())
    # The Adams of the grid share their seconds, and have no row.
    assert main(["evaluate", *options, "--optimizers", "lopt", "adam", "adam-grid"]) == 0
    assert StepTimes(tmp_path).rows == first
    assert main(["evaluate", *options, "--optimizers", "adam", "sgd-tuned@2"]) == 0
    assert {row.optimizer for row in StepTimes(tmp_path).rows.values()} == {"lopt", "adam", "sgd-tuned"}
    assert (
        len((tmp_path / "step_times.csv").read_text().splitlines()) == 1 + 6
    )  # adam is there once, though measured twice
    pytest.importorskip("matplotlib")
    assert main(["report", str(tmp_path)]) == 0
    assert f"seconds per step measured on: {StepTimes(tmp_path).machine}" in (tmp_path / "report.html").read_text()
