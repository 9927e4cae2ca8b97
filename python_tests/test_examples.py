"""The scripts in examples/ run as they are, and do what they say."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lopt.meta.config import Phase

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def put_back(set_num_threads: Callable[[int], None]) -> None:
    """The examples choose one thread."""


def test_every_example_is_tested() -> None:
    tested = ["meta_train_own", "ported_script", "resume", "train_digits", "train_text"]
    elsewhere = ["finetune_hf", "train_gpt"]  # in integrations, and in distributed/test_train_gpt.py
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(tested + elsewhere)


def test_train_digits_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("train_digits")
    accuracy = example.main(300)
    assert accuracy > 0.9
    assert example.main(300) == accuracy  # same seed, same numbers
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out


def test_train_text_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Better than the distribution of single bytes, whose entropy is known."""
    example = load("train_text")
    counts = torch.frombuffer(bytearray(example.help_topics()), dtype=torch.uint8).bincount(minlength=256).double()
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    loss = example.main(60)
    assert loss < entropy - 0.3
    assert f"60 steps: validation loss {loss:.3f} nats" in capsys.readouterr().out


@pytest.mark.slow
def test_a_ported_script_does_not_suffer_from_what_was_written_for_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    """The script's schedule of a learning rate and its weight decay, over three seeds.

    Decay alone costs nothing. The schedule shortens later steps, which costs up to .1 nats in so short a run. Taken as
    multipliers, such rates leave the loss above 4.
    """
    example = load("ported_script")
    sizes = {"steps": 200, "width": 32, "layers": 1}

    def losses(seeds: int = 3, **changes: float) -> list[float]:
        return [example.main(**sizes, **changes, seed=seed) for seed in range(seeds)]

    plain = losses(peak_lr=0.0, weight_decay=0.0)
    decayed = losses(1, peak_lr=0.0)
    with pytest.warns(UserWarning, match="LearnedOptimizer has no learning rate"):
        scheduled = losses()
    assert abs(plain[0] - decayed[0]) < 0.02
    assert max(b - a for a, b in zip(plain, scheduled, strict=True)) < 0.15
    assert f"{200} steps: validation loss {scheduled[-1]:.3f} nats" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [2, 31])
def test_resume_is_exact(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("resume")
    assert example.main(steps) == 0.0
    model, optimizer = example.make()
    before = [param.detach().clone() for param in model.parameters()]
    example.train(model, optimizer, 0, steps)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "largest difference 0\n" in capsys.readouterr().out


def test_a_theta_of_ones_own_is_trained_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("meta_train_own")
    quick = {"inner_steps": 160, "pairs": 4, "pairs_per_task": 2, "validation_tasks": 1, "validation_horizons": (10,)}
    ratios = example.main(tmp_path, steps=10, trials=1, points=1, **quick, phases=(Phase(1.0, (10, 20), "linear"),))
    assert max(ratios.values()) < 1.0
    assert f"Test loss over that of AdamW: {ratios['mine']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 2 * 2 * 3  # tasks, seeds, optimizers


@pytest.mark.parametrize("name", ["ported_script", "resume", "train_digits", "train_text"])
def test_as_a_script(name: str) -> None:
    script = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "4"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    if name == "ported_script":
        assert "UserWarning: lr=0.001 in param_groups [0, 1]: LearnedOptimizer has no learning rate" in done.stderr
    else:
        assert done.stderr == ""
    assert re.search("^4 steps", done.stdout, re.MULTILINE)
