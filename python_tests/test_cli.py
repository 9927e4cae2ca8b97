"""The program lopt: exit codes, messages, and the numbers it prints and writes."""

import hashlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

pytest.importorskip("tyro", reason="the command line needs tyro, which this environment lacks")

from lopt import LearnedOptimizer, Theta
from lopt.cli import main
from lopt.commands import common, doctor, progress
from lopt.commands import train as train_command
from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.training import TrainResult, mlp, train
from lopt.rule import PRESETS, WEIGHTS, shipped
from lopt.tasks import datasets
from lopt.tasks.datasets import digits

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output folders are relative: keep them out of the repository. No lines of progress on slow machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "EVERY", 1e6)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments, code=0)``: run a command, check its exit code, return what --json wrote, and "stdout"."""

    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        path = tmp_path / "json" / "numbers.json"
        assert main([*arguments, "--json", str(path)]) == code
        captured = capsys.readouterr()
        assert captured.err == ""
        return {**json.loads(path.read_text()), "stdout": captured.out}

    return run


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail with code 2, on one line and without a traceback."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(re.sub("[│|]", " ", captured.err).split())


TINY = ("train", "--steps", "12", "--hidden", "5", "--batch-size", "16")


# ---- lopt train ------------------------------------------------------------------------------------------------------


def test_train_writes_the_numbers_of_the_training_loop(run: Run, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    numbers = run(*TINY, "--seeds", "3", "4", "--out", "there")
    assert torch.get_num_threads() == threads

    def learned(params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
        return LearnedOptimizer(params, total_steps=total_steps)

    def expected(make: Any, seed: int) -> TrainResult:
        torch.set_num_threads(1)
        try:
            return train(mlp(64, (5,), 10, seed), digits(), make, steps=12, batch_size=16, seed=seed)
        finally:
            torch.set_num_threads(threads)

    runs = {(entry["optimizer"], entry["seed"]): entry for entry in numbers["runs"]}
    assert list(runs) == [(name, seed) for name in ("lopt", "adam", "adamw-cosine") for seed in (3, 4)]
    for name, make in (("lopt", learned), ("adam", partial(make_optimizer, "adam"))):
        for seed in (3, 4):
            result, entry = expected(make, seed), runs[name, seed]
            assert entry["batch_losses"] == list(result.batch_losses)
            assert entry["records"] == [vars(record) for record in result.records]

    for name, summary in numbers["summary"].items():
        for quantity in ("train_loss", "test_loss", "test_accuracy"):
            values = [runs[name, seed]["records"][-1][quantity] for seed in (3, 4)]
            assert summary[quantity] == {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
        seconds = [runs[name, seed]["seconds"] for seed in (3, 4)]
        assert summary["ms_per_step"]["mean"] == pytest.approx(1e3 * statistics.fmean(seconds) / 12)
        loss = summary["train_loss"]
        assert f"{loss['mean']:.3f} ± {loss['std']:.3f}" in numbers["stdout"]

    # the folder holds the same numbers, and a picture
    written = json.loads((tmp_path / "there" / "results.json").read_text())
    stdout = numbers.pop("stdout")
    assert written == numbers
    assert "Wrote results.json and curves.png to there" in stdout
    from matplotlib.image import imread

    assert imread(tmp_path / "there" / "curves.png").shape[:2] == (630, 1890)

    # which theta was at work, and how it was made
    theta = Theta.load("default")
    assert numbers["learned_optimizer"]["provenance"] == theta.provenance
    assert numbers["learned_optimizer"]["implementation"] == "cpu"
    assert (
        f"lopt (learned): theta default ({theta.num_floats:,} floats, spectral, {theta.provenance['method']}), "
        "implementation cpu" in stdout
    )
    assert numbers["options"]["hidden"] == [5]
    assert numbers["dataset"] == {"name": "digits", "source": "scikit-learn load_digits", "rows": 1079}
    assert numbers["versions"]["torch"] == torch.__version__


def test_train_repeats(run: Run) -> None:
    def once() -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = run(*TINY, "--seeds", "1", "--optimizers", "lopt", "--no-plot")["runs"]
        assert all(entry.pop("seconds") > 0 for entry in entries)
        return entries

    assert once() == once()
    assert not Path("runs/train/curves.png").exists()
    assert Path("runs/train/results.json").exists()


def test_train_options_reach_the_optimizer(run: Run, tmp_path: Path) -> None:
    """lr = 0 freezes the parameters, another theta and implementation show in the numbers, epochs become steps."""
    Theta.init_adam("paper").save(tmp_path / "mine.safetensors")
    options = (
        "--optimizers",
        "lopt",
        "--seeds",
        "0",
        "--no-plot",
        "--theta",
        "mine.safetensors",
        "--impl",
        "reference",
    )
    numbers = run(*TINY, *options, "--lr", "0", "--epochs", "0.1")
    (entry,) = numbers["runs"]
    assert entry["steps"] == math.ceil(0.1 * (1079 // 16)) == 7
    assert len({record["train_loss"] for record in entry["records"]}) == 1
    assert numbers["learned_optimizer"]["implementation"] == "reference"
    assert "theta mine.safetensors (35,799 floats, paper, init_adam), implementation reference" in numbers["stdout"]
    assert "One seed:" in numbers["stdout"]


def idx_folder(folder: Path) -> Path:
    """The four files of a data set of 24 + 6 random 2 x 2 images."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for prefix, rows in (("train", 24), ("t10k", 6)):
        images = bytes([0, 0, 8, 3, 0, 0, 0, rows, 0, 0, 0, 2, 0, 0, 0, 2])
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images + random.bytes(4 * rows))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1, 0, 0, 0, rows]) + bytes([0, 1] * (rows // 2))
        )
    return folder


def test_train_on_a_folder(run: Run, tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "spots")
    numbers = run("train", "--data", str(folder), "--steps", "4", "--batch-size", "5", "--no-plot", "--seeds", "0")
    assert numbers["dataset"] == {"name": "spots", "source": f"IDX files in {folder}", "rows": 20}
    assert "perceptron 4 → 64 → 2" in numbers["stdout"]


def test_diverged_runs_are_null_in_the_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(name: str, params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e30)

    monkeypatch.setattr(train_command, "make_optimizer", explode)
    numbers = run(*TINY, "--optimizers", "adam", "--seeds", "0", "1")
    assert numbers["runs"][0]["records"][-1]["train_loss"] is None
    assert numbers["summary"]["adam"]["train_loss"]["mean"] is None
    assert "nan" in numbers["stdout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dataset", "mnist"),
            "lopt: data set mnist: not found on this machine; pass --data FOLDER with its four IDX",
        ),
        (("--dataset", "fashion-mnist"), "apt-get install dataset-fashion-mnist, or pass --data FOLDER"),
        (("--data", "absent"), "lopt: data set absent: absent is not a folder; pass --data FOLDER"),
        *((("--dataset", "cifar"), f"'{name}'") for name in ("digits", "fashion-mnist", "mnist")),
        (("--impl", "fast"), "Expected one of ('auto', 'cuda', 'cpu', 'reference', 'sim')"),
        (("--optimizers", "adam", "sgd"), "Expected one of ('lopt', 'adam', 'adamw-cosine')"),
        (("--optimizers", "adam", "adam"), "optimizers: expected at least one and none twice, got ['adam', 'adam']"),
        (("--optimizers",), "optimizers: expected at least one"),
        (("--seeds", "-1"), "seeds: expected whole numbers from 0 to 4294967295, got -1"),
        (("--steps", "0"), "steps: expected at least 1, got 0"),
        (("--epochs", "nan"), "epochs: expected a positive number, got nan"),
        (("--hidden", "0"), "hidden: expected widths of at least 1, got [0]"),
        (("--theta", "absent"), "lopt: theta: no file 'absent'"),
        (("--device", "tpu"), "lopt: device: expected one of cpu"),
        (("--lr", "-1"), "lopt: lr: expected a"),
    ],
)
def test_train_fails_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    assert message in failure(capsys, "train", *arguments)
    assert not Path("runs").exists()


def test_a_batch_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--batch-size", "1080"]) == 2
    assert "batch_size: expected between 1 and the 1079 rows" in capsys.readouterr().err


def test_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'lopt[plot]', or --no-plot" in failure(capsys, "train")


# ---- lopt doctor -----------------------------------------------------------------------------------------------------


def test_doctor(run: Run) -> None:
    numbers = run("doctor")
    assert numbers["torch"] == torch.__version__
    tests = {(test["impl"], test["preset"]): test for test in numbers["self_tests"]}
    assert list(tests) == [(impl, preset) for preset in PRESETS for impl in ("cpu", "sim", "cuda")]
    for (impl, _), test in tests.items():
        if impl != "cuda" or "error" in test:
            assert test["result"] == "ok"
            assert 0 < test["error"] <= doctor.TOLERANCE
            assert f"{test['error']:.1e}" in numbers["stdout"]
        else:
            assert test["result"].startswith("not here: ")


def test_doctor_finds_a_wrong_kernel(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = doctor._steps

    def wrong(preset: str, impl: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        params = steps(preset, impl, device, dtype)
        if (preset, impl) == ("paper", "cpu"):
            params[-1].view(-1)[-1] += 1e-4  # a twentieth of an update, in one element
        if (preset, impl) == ("compact", "sim"):
            raise RuntimeError("no such kernel")
        return params

    monkeypatch.setattr(doctor, "_steps", wrong)
    numbers = run("doctor", code=1)
    failed = [(t["impl"], t["preset"], t["result"]) for t in numbers["self_tests"] if t["result"].startswith("FAILED")]
    assert failed == [("cpu", "paper", "FAILED"), ("sim", "compact", "FAILED: no such kernel")]
    assert "FAILED: no such kernel" in numbers["stdout"]


# ---- lopt weights ----------------------------------------------------------------------------------------------------


def test_weights_show_lists_the_shipped_ones(run: Run) -> None:
    numbers = run("weights", "show")
    assert list(numbers["shipped"]) == shipped()
    for name, facts in numbers["shipped"].items():
        content = (WEIGHTS / f"{name}.safetensors").read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["num_floats"] == Theta.load(name).flatten().numel()
        assert name in numbers["stdout"]


@pytest.mark.parametrize("by_name", [True, False])
def test_weights_show_one(run: Run, by_name: bool) -> None:
    theta = Theta.load("default")
    theta.save("copy.safetensors")
    source = "default" if by_name else "copy.safetensors"
    path = WEIGHTS / "default.safetensors" if by_name else Path(source)
    numbers = run("weights", "show", source)
    assert numbers["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert numbers["shapes"] == {name: list(tensor.shape) for name, tensor in theta.tensors.items()}
    assert numbers["provenance"] == theta.provenance
    assert numbers["spec"]["mom_decays"] == list(theta.spec.mom_decays)
    lines = [line.split() for line in numbers["stdout"].splitlines()]
    assert ["step_multiplier", str(theta.spec.step_multiplier)] in lines
    rows, columns = theta.tensors["mlp.w1"].shape
    norm = f"{theta.tensors['mlp.w1'].norm():.4g}"
    assert ["mlp.w1", str(rows), "x", str(columns), f"{rows * columns:,}", norm] in lines


def test_weights_convert(run: Run, golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    source = Path(__file__).parent / "golden" / "rnn_mlp_lopt_default.npz"
    numbers = run("weights", "convert", str(source), "folder/theta.safetensors")
    theta = Theta.load("folder/theta.safetensors")
    arrays = golden("rnn_mlp_lopt_default")
    for name, key in (("mlp.w1", "ffmod_params|mlp/~/linear_0|w"), ("lstm.w", "rnn_params|rnn/linear|w")):
        assert np.array_equal(theta.tensors[name].numpy(), arrays[f"theta|{key}"])
    assert numbers["num_floats"] == 35799
    assert theta.provenance["source"] == source.name
    assert theta.provenance["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert numbers["provenance"] == theta.provenance


def test_weights_convert_of_other_rules(run: Run, golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    """PyLO's networks from two files, constants that are in none."""
    source = Path("velo.npz")
    np.savez(source, **golden("velo_bugged"))
    settings = ["bugged_losses=true", "bugged_lstm=true"]
    run("weights", "convert", str(source), "velo.safetensors", "--set", *settings)
    theta = Theta.load("velo.safetensors")
    assert (theta.spec.bugged_losses, theta.spec.bugged_lstm, theta.spec.lstm_width) == (True, True, 16)
    network = {"network.input.weight": torch.ones(8, 39), "network.input.bias": torch.ones(8)}
    torch.save(network, "one.pt")
    torch.save({"network.output.weight": torch.ones(2, 8), "network.output.bias": torch.ones(2)}, "two.pt")
    numbers = run("weights", "convert", "one.pt", "elo.safetensors", "--also", "two.pt", "--optimizer", "ELO")
    assert numbers["spec"]["rule"] == "small_fc_lopt"
    assert numbers["provenance"]["source"] == "one.pt, two.pt"
    assert Theta.load("elo.safetensors").spec.mlp_layers == 1
    assert "mlp_width" in run("weights", "show", "elo.safetensors")["stdout"]


def test_weights_interpolate(run: Run) -> None:
    """Also of its own output: the provenance of both ends goes along."""
    numbers = run("weights", "interpolate", "default", "adam", "half.safetensors", "--share", "0.5")
    half, default = Theta.load("half.safetensors"), Theta.load("default")
    adam = Theta.init_adam("spectral")
    torch.testing.assert_close(half.flatten(), (default.flatten() + adam.flatten()) / 2)
    assert half.provenance == numbers["provenance"]
    assert (half.provenance["method"], half.provenance["share"]) == ("interpolate", 0.5)
    assert (half.provenance["source"], half.provenance["other"]) == (default.provenance, adam.provenance)
    assert (
        half.provenance["source_sha256"] == hashlib.sha256((WEIGHTS / "default.safetensors").read_bytes()).hexdigest()
    )
    run("weights", "interpolate", "default", "half.safetensors", "quarter.safetensors", "--share", "0.5")
    torch.testing.assert_close(
        Theta.load("quarter.safetensors").flatten(), 0.75 * default.flatten() + 0.25 * adam.flatten()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "absent"), "lopt: theta: no file 'absent'"),
        (("show", "broken.safetensors"), "broken.safetensors is not a readable safetensors file"),
        (("convert", "broken.safetensors", "to.safetensors"), "broken.safetensors is no readable file of torch.save"),
        (("convert", "broken.state", "to.safetensors"), "broken.state is not a readable flax theta.state"),
        (("convert", "broken.state", "to.safetensors", "--also", "a.pt"), "also, optimizer: are for state dicts"),
        (("convert", "absent", "to.safetensors"), "No such file or directory: 'absent'"),
        (("convert", "absent", "to.pickle"), "dest: expected a name that ends in .safetensors, got 'to.pickle'"),
        (("convert", "absent"), "DEST File to write"),
        (("interpolate", "default", "paper", "to.safetensors"), "other: expected a theta of the same spec"),
        ((), "Expected one of {show, convert, interpolate}"),
    ],
)
def test_weights_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    for name in ("broken.safetensors", "broken.state"):
        Path(name).write_bytes(b"\x93not weights")
    assert message in failure(capsys, "weights", *arguments)


# ---- lopt meta-train -------------------------------------------------------------------------------------------------


SETTINGS = ("pairs=2", "validation_tasks=1", "validation_horizons=[5]", 'phases=[{"share": 1, "horizon": [4, 6]}]')
META = ("meta-train", "--recipe", "tiny", "--workers", "1", "--inner-steps", "40", "--set", *SETTINGS)


def test_meta_train_and_plot(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = run(*META, "--out", "one", "--seed", "3")
    assert "iteration 2, phase 1: meta-loss" in numbers["stdout"]
    saved = Theta.load("one/theta.safetensors")
    assert numbers["provenance"] == json.loads(json.dumps(saved.provenance))
    assert (saved.provenance["config"]["pairs"], saved.provenance["config"]["seed"]) == (2, 3)
    assert [line["iteration"] for line in numbers["metrics"]] == [0, 1, 2]
    again = run("meta-train", "--out", "one", "--resume", "--workers", "1", "--seed", "3", "--set", "pairs=2")
    assert again["metrics"] == numbers["metrics"]
    assert "seed: the run in 'one' was begun with 3, cannot go on with 4" in failure(
        capsys, "meta-train", "--out", "one", "--resume", "--workers", "1", "--seed", "4"
    )
    Path("one/meta_loss.png").unlink()
    assert run("plot", "one")["last"] == numbers["metrics"][-1]
    assert Path("one/meta_loss.png").stat().st_size > 1000
    further = run(*META, "--out", "two", "--from", "one/theta.safetensors")
    assert further["provenance"]["config"]["init"] == "one/theta.safetensors"


def test_hours_become_inner_steps(run: Run) -> None:
    numbers = run("meta-train", "--recipe", "tiny", "--workers", "1", "--hours", "1e-6", "--set", *SETTINGS)
    steps = numbers["provenance"]["config"]["inner_steps"]
    assert f" inner steps/s: 1e-06 h are --inner-steps {steps}\n" in numbers["stdout"]


def test_meta_train_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "pairs: expected a positive number, got 0" in failure(capsys, *META, "pairs=0")
    assert "unknown fields ['pair']" in failure(capsys, *META, "pair=1")
    assert "hours, inner_steps: expected one of them, got both" in failure(capsys, *META, "--hours", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "log: wandb is missing; pip install 'lopt[wandb]'" in failure(capsys, *META, "--log", "wandb")
    assert "metrics: 'absent' holds no metrics.jsonl" in failure(capsys, "plot", "absent")
    run(*META)
    assert "lopt: out: 'runs/meta-train' holds a meta-training run already" in failure(capsys, *META)


# ---- All commands ----------------------------------------------------------------------------------------------------


def test_debug_raises(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no file 'absent'"):
        main(["weights", "show", "absent", "--debug"])


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "self_test", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "lopt: interrupted\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "meta-train", "plot", "evaluate", "report", "experiment", "bench", "doctor", "weights"):
        assert f"• {command} " in text
    assert (
        "Expected one of {train, meta-train, plot, evaluate, report, experiment, bench, doctor, tasks, weights}"
        in failure(capsys)
    )


def test_as_a_program(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "lopt.cli", "weights", "show"]
    good = subprocess.run(program, capture_output=True, text=True, check=False)
    bad = subprocess.run([*program, "absent"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert "default" in good.stdout
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("lopt: theta: no file 'absent'")
    assert bad.stderr.count("\n") == 1


def test_tables_on_and_off_a_terminal() -> None:
    header, rows = ["name", "value"], [["a", "1.5 ± 0.1"], ["long name", "[2]"]]

    def shown(terminal: bool) -> str:
        file = io.StringIO()
        common.show_table(Console(file=file, force_terminal=terminal, width=40, no_color=True), header, rows)
        return file.getvalue()

    assert shown(False) == "name           value\na          1.5 ± 0.1\nlong name        [2]\n"
    on = [re.sub("\x1b\\[[0-9;]*m", "", line).rstrip() for line in shown(True).splitlines()]
    assert any(line.endswith("1.5 ± 0.1") and line.startswith("a ") for line in on)
    assert all(len(line) <= 40 for line in on)


def test_json_is_standard(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    common.write_json(path, {"a": (1, float("nan"), -math.inf), "b": {"c": Path("x/y"), 3: 0.1}})
    assert json.loads(path.read_text()) == {"a": [1, None, None], "b": {"c": "x/y", "3": 0.1}}
