"""lopt.evaluate: rows of any tasks are those of a plain run; they are kept, compared and drawn."""

import dataclasses
import doctest
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import lopt
from lopt import LearnedOptimizer, Theta
from lopt.evaluation.comparison import Runs
from lopt.evaluation.plots import loss_curves
from lopt.evaluation.runs import train_task
from lopt.tasks import Task, from_module

INPUTS = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return INPUTS, torch.sin(INPUTS).sum(dim=1, keepdim=True)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def task(name: str = "sines") -> Task:
    return from_module(module, functional.mse_loss, data, batch_size=8, name=name)


def test_rows_are_those_of_a_plain_run(tmp_path: Path) -> None:
    theta, counts = Theta.load("compact"), []
    names = ["lopt", "adamw-warmup-tuned@2"]
    rows = lopt.evaluate(
        task(), names, theta=theta, steps=12, seeds=[3], points=4, out=tmp_path, on_done=lambda *n: counts.append(n)
    )
    assert [row.name for row in rows] == ["lopt", "adamw-warmup-tuned", "adamw-warmup-tuned"]
    assert counts == [(0, 3), (1, 3), (2, 3), (3, 3)]
    curve = train_task(
        task(), lambda params, steps: LearnedOptimizer([task().group(params)], theta, total_steps=steps), 3, 12
    )
    assert (rows[0].train_loss, rows[0].test_loss) == (curve.final["train"], curve.final["test"])
    assert [point[0] for point in rows[0].points] == [0, 3, 6, 9, 12]
    assert rows[0].points[-1][3] == rows[0].test_loss
    assert (rows[0].suite, rows[0].family, rows[0].data, rows[0].num_params) == ("own", "sines", "", 37)
    again = lopt.evaluate(task(), names, theta=theta, steps=12, seeds=[3], out=tmp_path)
    assert again == rows  # kept, seconds and all
    theta.save(tmp_path / "theta.safetensors")
    by_file = lopt.evaluate(task(), ["lopt"], theta=tmp_path / "theta.safetensors", steps=12, seeds=[3], out=tmp_path)
    assert by_file == rows[:1]
    tuned = min(rows[1:], key=lambda row: row.valid_loss)
    comparison = Runs(rows).compare("lopt", "adamw-warmup-tuned", 12, "test")
    assert comparison is not None
    assert comparison.losses == {"sines": (rows[0].test_loss, tuned.test_loss)}


def test_rows_are_drawn(tmp_path: Path) -> None:
    tasks = [task("one"), task("two")]
    ours = lopt.evaluate(tasks, ["lopt"], steps=6, seeds=[0, 1], points=3)
    others = lopt.evaluate(tasks, ["adamw-warmup-tuned@2"], steps=6, seeds=[0, 1], points=3)
    loss_curves({"ours": ours, "AdamW": others}, tmp_path / "losses.svg", "train")
    text = (tmp_path / "losses.svg").read_text()
    assert text.count('id="axes_') == 2
    with pytest.raises(
        ValueError, match=r"runs\['both'\]: expected rows of one optimizer, got those of \['lopt', 'adamw"
    ):
        loss_curves({"both": [*ours, *others]}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="runs: expected at least one optimizer with rows, got none"):
        loss_curves({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"runs\['bare'\]: expected losses along all runs, got none on"):
        loss_curves({"bare": [dataclasses.replace(ours[0], curve="", times="")]}, tmp_path / "none.png")


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks: \['sines'\] are names of several; give each its own"):
        lopt.evaluate([task(), task()])
    with pytest.raises(ValueError, match="optimizer: expected one of"):
        lopt.evaluate(task(), ["lopt", "adamv"])
    with pytest.raises(FileNotFoundError, match="theta: no file 'absent'"):
        lopt.evaluate(task(), ["lopt"], theta="absent")


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(importlib.import_module("lopt.evaluation.evaluate"))
    assert result.failed == 0
    assert result.attempted > 0
