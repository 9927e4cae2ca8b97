"""lopt/meta: what an outer iteration computes, that a run learns, and that stopping it changes nothing."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meta_cases
import pytest
import torch
from rich.console import Console

from lopt import Theta
from lopt.meta import checkpoint, outer, pairs, plots, progress, trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import Executor, LocalProcesses, Serial
from lopt.meta.pairs import Shared
from lopt.meta.recipes import RECIPES, recipe
from lopt.tasks.distribution import TaskDistribution

#: Three phases, two iterations each or so; states are carried over in the second, the LSTM joins in the third.
SMALL = dataclasses.replace(
    meta_cases.SMALL,
    inner_steps=600,
    phases=(
        Phase(0.3, (10, 30), "mlp"),
        Phase(0.4, (20, 40), "mlp", "pes", window=10),
        Phase(0.3, (20, 40), "all", "nres", window=10),
    ),
    checkpoint_every=3,
)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(SMALL, out)
    return out


def train(config: MetaTrainConfig, out: Path, resume: bool = False, executor: Executor | None = None) -> Theta:
    return trainer.run(config, out, resume=resume, executor=executor, console=Console(file=io.StringIO()))


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the clocks."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def same(a: Path, b: Path) -> bool:
    """Whether two runs left the same numbers behind, to the bit."""
    ends = [checkpoint.load(out / "checkpoint.pt")[2] for out in (a, b)]
    files = ("theta.safetensors", "theta_last.safetensors")
    return (
        metrics(a) == metrics(b)
        and all(torch.equal(*(Theta.load(out / name).flatten() for out in (a, b))) for name in files)
        and all(torch.equal(*pair) for pair in zip(ends[0].moments, ends[1].moments, strict=True))
        and repr(ends[0].carries) == repr(ends[1].carries)
    )


def test_metrics_say_what_families_add_to_the_noise(whole: Path) -> None:
    lines = [line for line in metrics(whole) if "families" in line]
    assert [line["iteration"] for line in lines] == [*range(1, len(lines) + 1)]
    for line in lines:
        assert sum(found["pairs"] for found in line["families"].values()) == SMALL.pairs
        assert all(0.0 < found["delta"] <= SMALL.delta_clip for found in line["families"].values())
        assert set(line["families"]) <= set(SMALL.tasks)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["adam", "default"])
def test_a_theta_is_trained_for_lagged_statistics(init: str, tmp_path: Path) -> None:
    phases = (Phase(1.0, (10, 20), "linear"),)
    config = dataclasses.replace(
        SMALL, init=init, stats="lagged", phases=phases, inner_steps=200, warmup=0, warmup_from_file=0, pairs=1
    )
    theta = train(config, tmp_path)
    assert theta.spec.stats == "lagged"
    start = Theta.load("default") if init == "default" else Theta.init_adam("compact", stop_early=1.0)
    assert not torch.equal(theta.flatten(), start.flatten())
    assert MetaTrainConfig.from_json(json.loads((tmp_path / "config.json").read_text())["config"]) == config


def test_the_signal_is_one_for_noise_and_more_for_a_constant_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    trained = torch.ones(2000, dtype=torch.bool)
    for share, low, high in ((0.0, 0.8, 1.2), (1.0, 8.0, 12.0)):  # of the constant: with it 1 + 1 in place of 1 / 19
        moments = outer.Moments.zeros(2000)
        for number in range(200):
            if number == 3 and share == 0.0:
                assert 0.8 < outer.signal(moments, trained, (0.9, 0.99)) < 1.2
            gradient = share + torch.randn(2000, generator=random)
            moments, _ = outer.adam(moments, gradient, trained, (0.9, 0.99))
        assert low < outer.signal(moments, trained, (0.9, 0.99)) < high


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledAt(Serial):
    """Ends in the middle of an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def map(self, function: Any, shared: Any, items: Any) -> Any:
        if shared.iteration == self.iteration and function is pairs.unroll_group:
            super().map(function, shared, items[:2])
            raise Killed
        return super().map(function, shared, items)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_killed_and_resumed_run_is_bit_identical_to_one_that_never_stopped(
    stop: int, whole: Path, tmp_path: Path
) -> None:
    """In every phase, after lines that no checkpoint covers, one of them cut short."""
    with pytest.raises(Killed):
        train(SMALL, tmp_path, executor=KilledAt(stop))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "meta_lo')
    resumed = train(SMALL, tmp_path, resume=True)
    assert same(tmp_path, whole)
    assert torch.equal(resumed.flatten(), Theta.load(whole / "theta.safetensors").flatten())


def test_runs_on_a_mixture_resume_as_well(tmp_path: Path) -> None:
    """With pairs that share tasks, some in the engine and some in torch, and workers instead of this process."""
    tasks = TaskDistribution({"quadratic": 1.0, "teacher": 1.0}, max_params=200, max_seconds=0.002, reparametrise=0.5)
    config = dataclasses.replace(SMALL, tasks=tasks, pairs=4, pairs_per_task=2, inner_steps=500)
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", executor=KilledAt(2))
    workers = LocalProcesses(1)
    train(config, tmp_path / "killed", resume=True, executor=workers)
    workers.close()
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_sigkill_of_the_program_loses_nothing_but_time(tmp_path: Path) -> None:
    """``lopt meta-train`` in a process of its own, killed as soon as it has a checkpoint of iteration 3."""
    config = dataclasses.replace(SMALL, inner_steps=3000, recipe="tiny")
    train(config, tmp_path / "whole")
    changes = [f"{k}={json.dumps(v)}" for k, v in config.to_json().items() if k not in ("inner_steps", "seed", "init")]
    settings = ["--inner-steps", "3000", "--seed", "11", "--set", *changes]
    command = [sys.executable, "-m", "lopt.cli", "meta-train", "--workers", "1", "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, env=environment)
    file = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (file.is_file() and len(file.read_bytes().splitlines()) > 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")[2].iteration
    assert reached > 0
    train(config, tmp_path / "killed", resume=True)
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_a_second_process_in_the_folder_is_refused(tmp_path: Path) -> None:
    """While a run goes on here, ``lopt meta-train --resume`` in another process changes nothing and says why."""
    refused = []

    class Meanwhile(Serial):
        def map(self, function: Any, shared: Any, items: Any) -> Any:
            if not refused and shared.iteration == 2:
                before = {path: path.read_bytes() for path in tmp_path.iterdir()}
                command = [sys.executable, "-m", "lopt", "meta-train", "--workers", "1", "--out", str(tmp_path)]
                refused.append(subprocess.run([*command, "--resume"], capture_output=True, text=True))
                assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
            return super().map(function, shared, items)

    train(dataclasses.replace(SMALL, checkpoint_every=1), tmp_path, executor=Meanwhile())
    message = f"another process is meta-training in {str(tmp_path)!r}; wait for its end, or choose another folder"
    assert [(one.returncode, one.stdout, one.stderr) for one in refused] == [(2, "", f"lopt: out: {message}\n")]
    assert [line["iteration"] for line in metrics(tmp_path)] == list(range(len(metrics(tmp_path))))
    with pytest.raises(FileExistsError, match="holds a meta-training run already"):
        train(SMALL, tmp_path)  # the folder is free again


def test_a_checkpoint_goes_on_without_its_metrics(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(SMALL, tmp_path, executor=KilledAt(2))
    reached = checkpoint.load(tmp_path / "checkpoint.pt")[2].iteration
    (tmp_path / "metrics.jsonl").unlink()
    train(SMALL, tmp_path, resume=True)
    assert checkpoint.load(tmp_path / "checkpoint.pt")[2].theta.equal(checkpoint.load(whole / "checkpoint.pt")[2].theta)
    assert [line["iteration"] for line in metrics(tmp_path)] == [
        line["iteration"] for line in metrics(whole) if line["iteration"] > reached
    ]


class Assassin(LocalProcesses):
    """Kills a worker before every third iteration."""

    armed = False

    def map(self, function: Any, shared: Any, items: Any) -> Any:
        if self.armed and shared.iteration % 3 == 1:
            pid = self.workers[0].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        return super().map(function, shared, items)


def test_executors_and_numbers_of_workers_give_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """This process, one and two others; the two also while they are killed."""
    one, two = LocalProcesses(1), Assassin(2)
    train(SMALL, tmp_path / "one", executor=one)
    train(SMALL, tmp_path / "two", executor=two)
    two.armed = True
    before = two.workers[0].process.pid
    train(SMALL, tmp_path / "killed", executor=two)
    assert two.workers[0].process.pid != before
    for name in ("one", "two", "killed"):
        assert same(tmp_path / name, whole)
    one.close()
    two.close()


def test_an_iteration_is_scaled_clipped_adam_on_the_estimate(tmp_path: Path) -> None:
    """By hand, from the units of work: the first step of Adam is lr times the sign of the gradient."""
    phase = Phase(1.0, (10, 20), "mlp", lr=0.5)
    config = dataclasses.replace(SMALL, inner_steps=1, phases=(phase,), gradient_clip=0.05, lr=0.01, average=0.75)
    train(config, tmp_path)
    theta = Theta.init_adam("compact", seed=config.seed)
    scale = outer.scales(theta.spec, "prior", "mlp")
    shared = Shared(config, theta.spec, theta.flatten(), scale, 0, 0, 0)
    gradient, losses = torch.zeros(theta.num_floats), []
    for pair in range(3):
        result = pairs.unroll_group(shared, (pair, None))
        gradient += pairs.perturbation(config, 0, pair, theta.num_floats) * result.deltas[0] / (3 * 2 * config.sigma)
        losses.append(result.meta_loss)
    gradient = (gradient * (scale > 0)).clamp(-0.05, 0.05)
    state = checkpoint.load(tmp_path / "checkpoint.pt")[2]
    last, mean = state.theta, Theta.load(tmp_path / "theta_last.safetensors").flatten()
    expected = theta.flatten() - 0.005 * scale * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-6)
    assert int((last != theta.flatten()).sum()) > 300
    assert torch.equal(last[scale == 0], theta.flatten()[scale == 0])
    torch.testing.assert_close(mean, 0.75 * theta.flatten() + 0.25 * last, rtol=0, atol=1e-7)
    torch.testing.assert_close(state.moments.mean, 0.1 * gradient, rtol=1e-5, atol=1e-7)
    assert 0.05 < float((gradient[scale > 0].abs() == 0.05).double().mean()) < 0.95  # both sides of the clip
    line = metrics(tmp_path)[1]
    assert line["meta_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert line["lr"] == 0.005


def test_training_lowers_the_loss_on_tasks_never_trained_on(tmp_path: Path) -> None:
    phases = (Phase(1.0, (20, 60), "mlp"),)
    config = recipe("tiny", inner_steps=40_000, phases=phases, validation_horizons=(60,), validate_every=10**9)
    theta = train(config, tmp_path)
    first, best = (theta.provenance["validation"][name] for name in ("first", "best"))
    assert best < first - 0.05


def test_what_a_run_leaves_behind(whole: Path) -> None:
    best, last = (Theta.load(whole / f"{name}.safetensors") for name in ("theta", "theta_last"))
    lines = metrics(whole)
    scores = {line["iteration"]: line["validation"] for line in lines if "validation" in line}
    steps = [line["inner_steps"] for line in lines]
    crossed = [i for i in range(1, len(steps)) if steps[i] // 250 > steps[i - 1] // 250]
    assert list(scores) == [0, *dict.fromkeys([*crossed, len(lines) - 1])]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    assert sorted({line["phase"] for line in lines[1:]}) == [0, 1, 2]
    assert steps[-2] < 600 <= steps[-1]
    chosen = min(scores, key=lambda iteration: scores[iteration])
    assert best.provenance["iteration"] == chosen
    assert best.provenance["validation"] == {"first": scores[0], "best": scores[chosen]}
    shared = Shared(SMALL, last.spec, last.flatten(), torch.zeros(0), 0, 0, 0)
    again = [pairs.validate_task(shared, index)[0] for index in range(2)]
    mean = sum(score.final for found in again for score in found) / 4
    assert lines[-1]["validation"] == pytest.approx(mean, abs=1e-12)
    mean = sum(score.mean for found in again for score in found) / 4
    assert lines[-1]["validation_mean"] == pytest.approx(mean, abs=1e-12)
    assert lines[-1]["final_20_told"] == pytest.approx((again[0][0].final + again[1][0].final) / 2, abs=1e-12)
    for theta, name in ((best, "theta"), (last, "theta_last")):
        assert json.loads((whole / f"{name}.json").read_text()) == theta.provenance
        assert MetaTrainConfig.from_json(theta.provenance["config"]) == SMALL
        assert theta.provenance["inner_steps"] == steps[-1]
        assert theta.provenance["cpu_seconds"] > 0
    assert MetaTrainConfig.from_json(json.loads((whole / "config.json").read_text())["config"]) == SMALL
    assert (whole / "meta_loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_starting_from_a_file_warms_up_adam_first(whole: Path, tmp_path: Path) -> None:
    source = whole / "theta.safetensors"
    config = dataclasses.replace(SMALL, init=str(source), warmup_from_file=1000)
    theta = train(config, tmp_path)
    assert torch.equal(theta.flatten(), Theta.load(source).flatten())
    moments = checkpoint.load(tmp_path / "checkpoint.pt")[2].moments
    assert float(moments.gradients.max()) == len(metrics(tmp_path)) - 1
    assert float(moments.square.min()) > 0
    assert len(theta.provenance["start_sha256"]) == 64


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    theta = Theta.init("compact")
    state = checkpoint.TrainState.begin(SMALL, theta.flatten())
    checkpoint.save(path, SMALL, theta.spec, state)
    before = path.read_bytes()

    def save(content: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise Killed

    for patched, name, replacement in ((torch, "save", save), (os, "replace", lambda *_: save(None, io.BytesIO()))):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, replacement)
            with pytest.raises(Killed):
                checkpoint.save(path, SMALL, theta.spec, state)
    assert path.read_bytes() == before


def test_resume_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="to resume from; start anew, in an empty folder"):
        train(SMALL, tmp_path, resume=True)
    short = dataclasses.replace(SMALL, inner_steps=1)
    train(short, tmp_path)
    with pytest.raises(FileExistsError, match="holds a meta-training run already; resume it or choose another folder"):
        train(short, tmp_path)
    with pytest.raises(ValueError, match=r"sigma: the run in .* was begun with 0\.05, cannot go on with 0\.1"):
        train(dataclasses.replace(short, sigma=0.1), tmp_path, resume=True)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 1}, path)
    with pytest.raises(ValueError, match="has version 1, this version of lopt reads version 4"):
        checkpoint.load(path)
    torch.save({**content, "version": 3}, path)
    assert checkpoint.load(path)[2].iteration == 1
    torch.save({**content, "version": 3, "carries": [{"begun": 1, "step": 10}]}, path)
    with pytest.raises(ValueError, match="has version 3, this version of lopt reads version 4"):
        checkpoint.load(path)
    torch.save({name: value for name, value in content.items() if name != "moments"}, path)
    with pytest.raises(ValueError, match=r"has no entries \['moments'\]"):
        checkpoint.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or no checkpoint of meta-training"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preset", "huge", "preset: expected one of .* got 'huge'"),
        ("objective", "test", "objective: expected one of .* got 'test'"),
        ("inner_steps", 0, "inner_steps: expected a positive number, got 0"),
        ("valid_rows", 0, "valid_rows: expected a positive number, got 0"),
        ("sigma", 0.0, "sigma: expected a positive number, got 0.0"),
        ("lr", math.nan, "lr: expected a positive number, got nan"),
        ("tasks", ("image",), r"tasks: expected some of .* got \['image'\]"),
        ("tell_horizon", 1.5, "tell_horizon: expected a share between 0 and 1, got 1.5"),
        ("average", 1.0, r"average: expected a decay in \[0, 1\), got 1.0"),
        ("seed", -1, "seed: expected a non-negative integer, got -1"),
        ("betas", (0.9, 1.0), r"betas: expected two decays in \[0, 1\), got \(0.9, 1.0\)"),
        ("phases", (Phase(0.5, (1, 2)),), r"phases: expected shares that add up to 1, got \[0.5\]"),
        ("validation_horizons", (), r"validation_horizons: expected positive lengths, got \(\)"),
    ],
)
def test_a_bad_setting_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "spsa"}, "estimator: expected one of .* got 'spsa'"),
        ({"groups": "bias"}, "groups: expected one of .* got 'bias'"),
        ({"horizon": (9, 3)}, r"horizon: expected shortest and longest length .* got \(9, 3\)"),
        ({"window": 5}, "window: expected None for es and backprop, a number of steps for others, got 5"),
        ({"estimator": "pes"}, "window: expected None for es and backprop, a number of steps for others, got None"),
        ({"estimator": "pes", "window": 21}, "window: expected 1 to the longest horizon 20, got 21"),
        ({"share": 0}, "share: expected a positive number, got 0"),
        ({"max_params": 0}, "max_params: expected a positive number, got 0"),
    ],
)
def test_a_bad_phase_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**{"share": 1.0, "horizon": (10, 20), **settings})


def test_config_survives_json_and_refuses_other_fields() -> None:
    values = json.loads(json.dumps(SMALL.to_json()))
    assert MetaTrainConfig.from_json(values) == SMALL
    with pytest.raises(ValueError, match=r"unknown fields \['sigmas'\], missing fields \['sigma'\]"):
        MetaTrainConfig.from_json({**{k: v for k, v in values.items() if k != "sigma"}, "sigmas": 1})


def test_phases_and_learning_rate_follow_the_budget() -> None:
    assert [SMALL.phase_at(steps) for steps in (0, 179, 180, 419, 420, 600, 700)] == [0, 0, 1, 1, 2, 2, 2]
    half = dataclasses.replace(SMALL, phases=(Phase(0.5, (1, 2)), Phase(0.5, (1, 2), lr=0.5)), lr=1.0)
    assert [half.lr_at(steps) for steps in (0, 150, 300, 600)] == pytest.approx([1.0, 0.775, 0.275, 0.05])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole(name: str) -> None:
    config = recipe(name, inner_steps=100)
    assert (config.recipe, config.inner_steps) == (name, 100)
    assert config.objective == ("train" if name == "train-loss" else "held_out")
    assert config.preset == ("paper" if name == "paper" else "compact")
    with pytest.raises(ValueError, match="recipe: expected one of"):
        recipe("Default")
    with pytest.raises(ValueError, match=r"recipe: unknown fields \['pair'\]"):
        recipe(name, pair=3)
    with pytest.raises(ValueError, match=r"average: expected a number, as in 3 or 0.5, got '.9'"):
        recipe(name, inner_steps=1, average=".9")
    if name != "tiny":
        with pytest.raises(ValueError, match=r"inner_steps: recipe '.*' needs a budget"):
            recipe(name)


def test_progress_is_plain_off_a_terminal_and_live_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    plain, live = io.StringIO(), io.StringIO()
    trainer.run(SMALL, tmp_path / "a", console=Console(file=plain))
    lines, last = plain.getvalue().splitlines(), metrics(tmp_path / "a")[-1]
    assert len(lines) == last["iteration"]
    assert lines[-1].startswith(f"100% iteration {last['iteration']}, phase 3: meta-loss ")
    assert f"validation {last['validation']:.4f}, " in lines[-1]
    assert lines[-1].endswith(" inner steps/s, 0 diverged, 0:00:00 left")
    trainer.run(SMALL, tmp_path / "b", console=Console(file=live, force_terminal=True, width=160))
    assert "100%" in live.getvalue()
    assert f"validation {last['validation']:.4f}" in live.getvalue()


def test_the_speed_is_measured_without_training() -> None:
    assert trainer.measure_speed(SMALL, Serial(), seconds=0.2) > 100.0


def test_threads_are_put_back(tmp_path: Path, set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(2)
    train(dataclasses.replace(SMALL, inner_steps=1), tmp_path)
    assert torch.get_num_threads() == 2


def test_running_mean_of_the_plot() -> None:
    assert plots.running_mean([0.0, 2.0, 4.0, 12.0], 2).tolist() == [1.0, 3.0, 8.0]
