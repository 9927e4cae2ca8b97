"""lopt tasks: numbers of the commands against the library's, figures, and messages; and what is measured of a task."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tyro", reason="the command line needs tyro, which this environment lacks")

from lopt.cli import main
from lopt.evaluation.runs import train_task
from lopt.tables import read_csv
from lopt.tasks import NETWORK_FAMILIES, SAMPLED_FAMILIES, measure, sample_task
from lopt.tasks.data import catalogue
from lopt.tasks.losg import LosgTask
from lopt.tasks.losg_problems import Bowl, Quadratic


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output folders are relative: keep them out of the repository."""
    monkeypatch.chdir(tmp_path)


def run(tmp_path: Path, *arguments: str) -> Any:
    path = tmp_path / "numbers.json"
    assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_list_names_every_family_and_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "missing", lambda name: "get it" if name == "wordnet" else None)
    numbers = run(tmp_path, "tasks", "list")
    assert set(numbers["families"]) == {*SAMPLED_FAMILIES, *NETWORK_FAMILIES}
    assert numbers["data"]["wordnet"] == {"kind": "text", "role": "held-out", "missing": "get it"}
    assert "missing: get it" in capsys.readouterr().out
    roles = {name: facts["role"] for name, facts in numbers["data"].items()}
    assert {name for name in roles if roles[name] == "core"} == set(catalogue.CORE)


def test_show_says_what_the_task_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    task = sample_task(2, ["losg_tasks"])
    numbers = run(tmp_path, "tasks", "show", "losg_tasks", "2", "--steps", "10", "--out", str(tmp_path / "out"))
    assert numbers["config"] == json.loads(json.dumps(task.config))
    assert numbers["initial_loss"] == task.initial_loss(0)
    assert numbers["num_params"] == task.num_params
    assert (tmp_path / "out" / "losg_tasks-2.png").read_bytes()[:4] == b"\x89PNG"
    small = ("--steps", "1", "--no-plot", "--batch-size", "4", "--length", "10")
    text = run(tmp_path, "tasks", "show", "char_rnn_language_model", "1", *small)
    data = sample_task(1, ["char_rnn_language_model"]).data  # type: ignore[attr-defined]
    assert text["text_sha256"] == catalogue.corpus(data.name, data.variant).sha256


def test_train_gives_the_losses_of_the_library(tmp_path: Path) -> None:
    options = ("--optimizer", "SGD", "--lr", "0.01", "--steps", "20", "--no-plot", "--out", str(tmp_path / "out"))
    numbers = run(tmp_path, "tasks", "train", "mlp", "1", *options)
    task = sample_task(1, ["mlp"])
    curve = train_task(task, lambda params, _: torch.optim.SGD(params, lr=0.01), 0, 20, record_every=1)
    assert numbers["losses"] == {s: pytest.approx(curve.losses[s], rel=1e-4) for s in ("train", "outer_valid", "test")}
    assert numbers["losses"]["train"][-1] < numbers["losses"]["train"][0]
    learned = run(tmp_path, "tasks", "train", "mlp", "1", "--steps", "30", "--no-plot", "--out", str(tmp_path / "out"))
    assert learned["losses"]["train"][-1] < learned["losses"]["train"][0]


def test_check_and_time_count_tasks(tmp_path: Path) -> None:
    out = tmp_path / "checks.csv"
    numbers = run(tmp_path, "tasks", "check", "losg_tasks", "--seeds", "3", "--out", str(out))
    assert [row["seed"] for row in numbers["checks"]] == [0, 1, 2]
    (row,) = read_csv(out)
    stuck = [str(check["seed"]) for check in numbers["checks"] if not check["progress"]]
    assert (row["family"], row["tasks"], row["finite"], row["too_slow"]) == ("losg_tasks", "3", "3", "0")
    assert row["stuck_seeds"].split() == stuck
    assert int(row["progress"]) == 3 - len(stuck)
    assert numbers["checks"][1]["name"] == sample_task(1, ["losg_tasks"]).name
    numbers = run(tmp_path, "tasks", "check", "losg_tasks", "--seeds", "2", "--limit", "0")
    assert numbers["checks"] == []
    numbers = run(tmp_path, "tasks", "time", "losg_tasks", "--seeds", "2")
    assert [row["num_params"] for row in numbers["tasks"]] == [
        sample_task(seed, ["losg_tasks"]).num_params for seed in range(2)
    ]


def test_gallery_is_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    path = tmp_path / "new" / "gallery.png"
    run(tmp_path, "tasks", "gallery", "--families", "losg_tasks", "mlp", "--steps", "4", "--out", str(path))
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_errors_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "show", "image"]) == 2
    assert "family: expected one of mlp, mlp_ae" in capsys.readouterr().err
    assert main(["tasks", "train", "mlp", "--optimizer", "Adamm", "--no-plot"]) == 2
    assert "optimizer: expected lopt or one of" in capsys.readouterr().err
    assert main(["tasks", "train", "mlp", "--steps", "0", "--no-plot"]) == 2
    assert "steps: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["tasks", "show", "vit", "--data", "iris", "--no-plot"]) == 2
    assert "data: expected a data set with images, got ['iris']" in capsys.readouterr().err


def test_adam_side_by_side_is_torchs_adam() -> None:
    task = LosgTask(problem=Quadratic(8), seed=1)
    rates = [1e-2, 3e-2]
    steps, losses = measure.adam_losses(task, rates, steps=12, points=3)
    assert steps == [0, 4, 8, 12]
    for row, rate in enumerate(rates):
        stream = task.batches(0, "train")
        fixed, expected = [next(stream) for _ in range(4)], []
        params = {name: value.requires_grad_() for name, value in task.init(0).items()}
        optimizer = torch.optim.Adam(params.values(), lr=rate)
        for step in range(13):
            if step in steps:
                expected.append(sum(task.loss(params, batch).item() for batch in fixed) / 4)
            optimizer.zero_grad()
            task.loss(params, next(stream)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        torch.testing.assert_close(losses[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)


class Hopeless(LosgTask):
    """A bowl whose loss, or gradient, is not finite."""

    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        return super().loss(params, batch) + torch.sqrt(params["x"] * 0).sum()  # gradient 0 / 0


def test_what_cannot_be_trained_is_found() -> None:
    good = measure.check(LosgTask(problem=Bowl(2.0, 0.0), seed=0))
    assert (good.finite_loss, good.finite_gradient, good.progress, good.diverged) == (True, True, True, False)
    bad = measure.check(Hopeless(problem=Bowl(2.0, 0.0), seed=0))
    assert (bad.finite_loss, bad.finite_gradient, bad.progress, bad.diverged) == (True, False, False, True)
    assert all(math.isnan(end) for end in bad.ends)
