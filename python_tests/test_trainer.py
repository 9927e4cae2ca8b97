"""lopt/meta: what an outer iteration computes, that a run learns, and that stopping it changes nothing."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lopt import Theta
from lopt.meta import checkpoint, es, lanes, plots, trainer
from lopt.meta.config import MetaTrainConfig
from lopt.meta.unroll import Run, map_tensors, start, unroll
from lopt.theta import unflatten

SMALL = MetaTrainConfig(
    iterations=7, pairs=4, horizon=(4, 12), truncation=4, validation_runs=1, checkpoint_every=3, seed=11
)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def train(config: MetaTrainConfig, out: Path, resume: bool = False) -> Theta:
    return trainer.run(config, out, resume, Console(file=io.StringIO()))


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "cpu_seconds"} for line in lines]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("estimator", ["es", "pes"])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_killed_and_resumed_run_is_bit_identical_to_one_that_never_stopped(
    estimator: Any, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second lane of iteration ``stop``, after lines that no checkpoint covers, one of them cut short."""
    config = dataclasses.replace(SMALL, estimator=estimator)
    whole = train(config, tmp_path / "whole")

    def estimate(*args: Any) -> Any:
        if args[4:] == (1, stop):
            raise Killed
        return original(*args)

    original = lanes.estimate
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "estimate", estimate)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "meta_lo')
    resumed = train(config, tmp_path / "killed", resume=True)

    assert torch.equal(resumed.flatten(), whole.flatten())
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert [line["iteration"] for line in metrics(tmp_path / "whole")] == list(range(8))
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt")[2] for name in ("whole", "killed")]
    for a, b in zip(ends[0].lanes, ends[1].lanes, strict=True):
        assert a is not None
        assert b is not None
        assert (a.run, a.stop, a.state.step) == (b.run, b.stop, b.state.step)
        assert leaves(a) == leaves(b)


def leaves(lane: lanes.Lane) -> list[Any]:
    found: list[Any] = []
    map_tensors(lambda x: found.append(x.tolist()) or x, [lane.xi, *lane.state[1:]])
    return found


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "whole")
    train(dataclasses.replace(SMALL, iterations=5), tmp_path / "longer")
    longer = train(SMALL, tmp_path / "longer", resume=True)
    assert torch.equal(longer.flatten(), whole.flatten())


def test_an_iteration_is_clipped_adam_on_the_mean_estimate(tmp_path: Path) -> None:
    """By hand, from the estimators and the unroll: two lanes of two pairs each, full runs."""
    config = dataclasses.replace(SMALL, iterations=1, truncation=None, gradient_clip=0.3, lr=0.01)
    trained = train(config, tmp_path)
    theta = Theta.init_adam("compact", seed=config.seed)
    gradients, losses = [], []
    for lane in range(2):
        eps = lanes.perturbations(config, 0, lane, theta.num_floats)
        weights = unflatten(theta.spec, es.antithetic(theta.flatten(), eps, config.sigma))
        run = lanes.sample_run(config, 0, lane)
        _, result = unroll(theta.spec, weights, run, start(theta.spec, weights, run), run.horizon, config.loss_limit)
        plus, minus = result.meta[:, :2].mean(dim=0), result.meta[:, 2:].mean(dim=0)
        gradients.append((eps * (plus - minus)[:, None]).sum(dim=0) / (2 * 2 * config.sigma))
        losses.append(float(result.meta.mean()))
    gradient = ((gradients[0] + gradients[1]) / 2).clamp(-0.3, 0.3)
    step = gradient / (gradient.abs() + 1e-8)  # the first step of Adam
    torch.testing.assert_close(trained.flatten(), theta.flatten() - 0.01 * step, rtol=0, atol=1e-6)
    moments = checkpoint.load(tmp_path / "checkpoint.pt")[2].adam.state_dict()["state"][0]
    torch.testing.assert_close(moments["exp_avg"], 0.1 * gradient, rtol=1e-5, atol=1e-6)
    assert 0.1 < float((gradient.abs() == 0.3).double().mean()) < 0.9  # both sides of the clip
    assert metrics(tmp_path)[1]["meta_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_training_lowers_the_meta_loss_on_its_tasks(tmp_path: Path) -> None:
    """25 iterations on two tasks; before and after on runs of these tasks with other seeds, the same for both."""
    config = MetaTrainConfig(
        iterations=25,
        tasks=("quadratic", "mixture"),
        num_tasks=2,
        pairs=16,
        horizon=(20, 20),
        lr=5e-3,
        validation_runs=1,
    )
    after, before = train(config, tmp_path), Theta.init_adam("compact", config.seed)
    tasks = {lanes.sample_run(config, iteration, lane).task for iteration in range(6) for lane in range(2)}
    assert len(tasks) == 2
    runs = [[Run(task, seed, 20, 20) for seed in range(1000, 1006)] for task in tasks]
    thetas = torch.stack([before.flatten(), after.flatten()])
    losses = torch.stack([lanes.evaluate(before.spec, thetas, of_task, config.loss_limit) for of_task in runs])
    assert float((losses[..., 1] / losses[..., 0]).max()) < 1.0  # every run
    before_after = losses.mean(dim=1)  # [tasks, 2]
    assert float((before_after[:, 1] / before_after[:, 0]).max()) < 0.75


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    theta = train(SMALL, tmp_path)
    saved = Theta.load(tmp_path / "theta.safetensors")
    assert torch.equal(saved.flatten(), theta.flatten())
    assert saved.provenance == theta.provenance
    assert MetaTrainConfig.from_json(saved.provenance["config"]) == SMALL
    assert saved.provenance["inner_steps"] == 7 * 2 * 4 * 4  # iterations, lanes, runs, steps
    assert saved.provenance["cpu_seconds"] > 0
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines if "validation" in line] == [0, 3, 6, 7]
    assert saved.provenance["validation"] == {"first": lines[0]["validation"], "last": lines[7]["validation"]}
    runs = lanes.validation_set(SMALL)
    again = float(lanes.evaluate(theta.spec, theta.flatten()[None], runs, SMALL.loss_limit).mean())
    assert lines[7]["validation"] == pytest.approx(again, rel=1e-6)
    assert MetaTrainConfig.from_json(json.loads((tmp_path / "config.json").read_text())["config"]) == SMALL
    assert (tmp_path / "meta_loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(content["theta"], theta.flatten())
    assert content["iteration"] == 7


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(dataclasses.replace(SMALL, iterations=3), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def save(content: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise Killed

    state = checkpoint.load(tmp_path / "checkpoint.pt")[2]
    spec = Theta.init("compact").spec
    for patched, name, replacement in ((torch, "save", save), (os, "replace", lambda *_: save(None, io.BytesIO()))):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, replacement)
            with pytest.raises(Killed):
                checkpoint.save(tmp_path / "checkpoint.pt", SMALL, spec, state)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="to resume from; start anew, in an empty folder"):
        train(SMALL, tmp_path, resume=True)
    short = dataclasses.replace(SMALL, iterations=1)
    train(short, tmp_path)
    with pytest.raises(FileExistsError, match="holds a meta-training run already; resume it or choose another folder"):
        train(short, tmp_path)
    with pytest.raises(ValueError, match=r"sigma: the run in .* was begun with 0.01, cannot go on with 0.5"):
        train(dataclasses.replace(short, sigma=0.5), tmp_path, resume=True)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(ValueError, match="has version 99, this version of lopt reads version 1"):
        checkpoint.load(path)
    torch.save({name: value for name, value in content.items() if name != "lanes"}, path)
    with pytest.raises(ValueError, match=r"has no entries \['lanes'\]"):
        checkpoint.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or no checkpoint of meta-training"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preset", "huge", "preset: expected one of .* got 'huge'"),
        ("estimator", "spsa", "estimator: expected one of .* got 'spsa'"),
        ("iterations", 0, "iterations: expected a positive number, got 0"),
        ("truncation", -1, "truncation: expected a positive number, got -1"),
        ("truncation", 500, "truncation: expected at most the longest horizon 120, got 500"),
        ("sigma", 0.0, "sigma: expected a positive number, got 0.0"),
        ("lr", math.nan, "lr: expected a positive number, got nan"),
        ("tasks", ("image",), r"tasks: expected some of .* got \['image'\]"),
        ("pairs", 3, r"pairs: expected a multiple of tasks_per_iteration \(2\), got 3"),
        ("horizon", (9, 3), r"horizon: expected shortest and longest length .* got \(9, 3\)"),
        ("tell_horizon", 1.5, "tell_horizon: expected a share between 0 and 1, got 1.5"),
        ("seed", -1, "seed: expected a non-negative integer, got -1"),
    ],
)
def test_a_bad_setting_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MetaTrainConfig(), **{field: value})


def test_config_survives_json_and_refuses_other_fields() -> None:
    config = dataclasses.replace(SMALL, tasks=("teacher", "teacher", "quadratic"))
    values = json.loads(json.dumps(config.to_json()))
    assert MetaTrainConfig.from_json(values) == config
    with pytest.raises(ValueError, match=r"unknown fields \['sigmas'\], missing fields \['sigma'\]"):
        MetaTrainConfig.from_json({**{k: v for k, v in values.items() if k != "sigma"}, "sigmas": 1})


def test_progress_is_plain_off_a_terminal_and_live_on_one(tmp_path: Path) -> None:
    plain, live = io.StringIO(), io.StringIO()
    trainer.run(dataclasses.replace(SMALL, iterations=3), tmp_path / "a", console=Console(file=plain))
    lines = plain.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"iteration {i}/3" for i in (1, 2, 3)]
    last = metrics(tmp_path / "a")[-1]
    assert f"meta-loss {last['meta_loss']:.4f}, validation {last['validation']:.4f}" in lines[-1]
    assert lines[-1].endswith("0 diverged, 0 s left")
    terminal = Console(file=live, force_terminal=True, width=120)
    trainer.run(dataclasses.replace(SMALL, iterations=3), tmp_path / "b", console=terminal)
    assert "3/3" in live.getvalue()
    assert f"meta-loss {last['meta_loss']:.4f}" in live.getvalue()


def test_threads_are_put_back(tmp_path: Path, set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(2)
    train(dataclasses.replace(SMALL, iterations=1), tmp_path)
    assert torch.get_num_threads() == 2


def test_running_mean_of_the_plot() -> None:
    assert plots.running_mean([0.0, 2.0, 4.0, 12.0], 2).tolist() == [1.0, 3.0, 8.0]
