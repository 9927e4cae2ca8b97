"""What all commands have in common: options checked first, any terminal, progress, ways to start the program."""

import dataclasses
import inspect
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

pytest.importorskip("tyro", reason="the command line needs tyro, which this environment lacks")

import lopt
from lopt import Theta, cli
from lopt.cli import main
from lopt.commands import progress
from lopt.commands.common import Command, check_option
from lopt.commands.console import ASCII, show_everywhere
from lopt.commands.task_facts import torch_optimizers
from lopt.commands.weights import describe_theta
from lopt.rule import shipped


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def commands(union: Any = cli.Commands, *path: str) -> Iterator[tuple[tuple[str, ...], type]]:
    """Every command with the words that call it."""
    for part in get_args(union):
        kind, setting = part.__origin__, part.__metadata__[0]
        if get_args(kind):
            yield from commands(kind, *path, setting.name)
        else:
            yield (*path, setting.name), kind


COMMANDS = dict(commands())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that refuses at once, on one line, and without having done anything."""
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before
    return captured.err


def test_all_commands_are_here() -> None:
    assert len(COMMANDS) == 17
    assert all(issubclass(kind, Command) for kind in COMMANDS.values())


# ---- Options -------------------------------------------------------------------------------------------------------


def options(kind: type, word: str) -> list[str]:
    """The options of a command that are seeds, files or folders to write."""
    types = {"seed": "Seed|SeedNumber", "file": "OutFile", "folder": "OutFolder"}
    return [
        field.name for field in dataclasses.fields(kind) if re.search(rf"\b({types[word]})\b", hint(kind, field.name))
    ]


def hint(kind: type, name: str) -> str:
    """How the type of an option is written in the source."""
    for base in kind.__mro__[:-1]:
        for line in inspect.getsource(base).splitlines():
            if line.startswith(f"    {name}: "):
                return line
    raise AssertionError(name)


REQUIRED = {
    ("experiment",): ["width"],
    ("bench",): ["step"],
    ("plot",): ["."],
    ("tasks", "show"): ["mlp"],
    ("tasks", "train"): ["mlp"],
    ("weights", "convert"): ["a.npz", "b.safetensors"],
    ("weights", "interpolate"): ["default", "adam", "b.safetensors"],
}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_output_is_tried_before_the_work(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that names something to write: what cannot be written is an error with its name, at once."""
    Path("file").write_text("x")
    Path("folder").mkdir()
    kind = COMMANDS[path]
    names = [field.name for field in dataclasses.fields(kind)]
    assert {"out", "json"} & set(names) <= {*options(kind, "file"), *options(kind, "folder")}
    arguments = [*path, *REQUIRED.get(path, [])]
    for name in options(kind, "folder"):
        said = refusal(capsys, *arguments, f"--{name}", "file/below")
        assert said == f"lopt: {name}: expected a folder, got 'file/below', where 'file' is a file; name another\n"
    for name in set(options(kind, "file")) - {"dest"}:
        said = refusal(capsys, *arguments, f"--{name}", "folder")
        assert said == f"lopt: {name}: expected a file, got the folder 'folder'; name a file in it\n"
        said = refusal(capsys, *arguments, f"--{name}", "file/x")
        assert said == f"lopt: {name}: expected a folder, got 'file', where 'file' is a file; name another\n"


@pytest.mark.parametrize("path", [path for path in COMMANDS if path[0] != "doctor"], ids=" ".join)
def test_a_seed_that_no_generator_takes_is_refused(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    kind = COMMANDS[path]
    found = options(kind, "seed")
    assert set(found) == {field.name for field in dataclasses.fields(kind) if "seed" in field.name} - (
        {"seeds"} if path in (("tasks", "time"), ("tasks", "check")) else set()  # there it is a number of seeds
    )
    for name in found:
        for seed in ("4294967296", "99999999999999999999999"):
            positional = path[0] == "tasks" and name == "seed"
            option = [seed] if positional else [f"--{name.replace('_', '-')}", seed]
            said = refusal(capsys, *path, *REQUIRED.get(path, []), *option)
            assert said == f"lopt: {name}: expected whole numbers from 0 to 4294967295, got {seed}\n"


def test_no_option_takes_nan(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--lr", "nan"], ["bench", "step", "--tolerance", "nan"]):
        assert refusal(capsys, *arguments) == f"lopt: {arguments[-2][2:]}: expected a number, got nan\n"
    interpolate = ("weights", "interpolate", "default", "adam", "mine.safetensors", "--share")
    assert refusal(capsys, *interpolate, "nan") == "lopt: share: expected a number, got nan\n"
    expected = "lopt: share: expected a number, 0 for SOURCE to 1 for OTHER, got inf\n"
    assert refusal(capsys, *interpolate, "inf") == expected
    check_option("lr", float("inf"), None)  # limits may be infinite


def help_of(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*path, "--help"])
    assert end.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_a_switch_says_what_the_switch_does(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(path, capsys)
    switches = [field.name for field in dataclasses.fields(COMMANDS[path]) if field.default is True]
    shown = re.findall(r" --no-(\w+) (Do not )?", said.partition(" options ")[2])
    assert shown == [(name, "Do not ") for name in switches]


def test_optimizers_of_torch_that_are_offered_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    offered = torch_optimizers()
    assert {"Adam", "AdamW", "SGD", "RMSprop", "NAdam"} <= set(offered)
    assert not {"Optimizer", "LBFGS", "SparseAdam", "Muon"} & set(offered)
    arguments = ["tasks", "train", "mlp", "--batch-size", "2", "--steps", "2", "--no-plot", "--optimizer"]
    for name in offered:
        assert main([*arguments, name]) == 0
    capsys.readouterr()
    said = refusal(capsys, *arguments, "LBFGS")
    assert said == f"lopt: optimizer: expected lopt or one of {', '.join(offered)}, got 'LBFGS'\n"


def test_a_theta_is_named_in_one_short_line() -> None:
    for name in shipped():
        theta = Theta.load(name)
        method = theta.provenance["method"]
        expected = f"theta {name} ({theta.num_floats:,} floats, {theta.spec.preset}, {method})"
        assert describe_theta(name, theta) == expected
        assert len(expected) < 80


# ---- The program -----------------------------------------------------------------------------------------------------


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """``python -m lopt`` in a process of its own."""
    every = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "lopt", *arguments], capture_output=True, env=every)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lopt {lopt.__version__}\n"
    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lopt {lopt.__version__}\n".encode(), b"")


PLAIN: list[dict[str, str]] = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
]
SHORT = [
    ["train", "--steps", "3", "--seeds", "0", "1", "--hidden", "5"],
    ["evaluate", "--tasks", "spirals-32-32-3", "--horizons", "4", "--seeds", "0", "1", "--workers", "1"],
    ["report", "runs/evaluate"],
    ["tasks", "list"],
    ["tasks", "show", "mlp", "--steps", "2", "--batch-size", "2"],
    ["weights", "show"],
    ["weights", "show", "default"],
    ["train", "--dataset", "mnist"],
    ["train", "--out", "\udcff/x", "--steps", "1", "--seeds", "0", "--no-plot"],
]
CODES = [0, 0, 0, 0, 0, 0, 0, 2, 0]


@pytest.mark.parametrize("environment", PLAIN, ids=["ascii", "C", "latin-1"])
def test_commands_run_where_there_is_only_ascii(environment: dict[str, str]) -> None:
    """The exit codes are those of UTF-8, what is shown has no character lost, what is written is UTF-8."""
    every = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    code = f"from lopt.cli import main; codes = [main(command) for command in {SHORT!a}]; print(codes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=every)
    shown = done.stdout.decode("latin-1")
    assert shown.splitlines()[-1] == str(CODES), done.stderr
    assert "Mean +- standard deviation" in shown.replace("±", "+-")
    assert "perceptron 64 -> 5 -> 10" in shown
    assert "?" not in shown.replace("Wrote results.json to ?/x", "")
    written = [path for path in Path().rglob("*") if path.suffix in (".json", ".csv", ".html")]
    assert len(written) == 5
    for path in written:
        path.read_text(encoding="utf-8")


def test_help_is_shown_where_there_is_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [(), *COMMANDS]:
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as end:
            main([*path, "--help"])
        file.flush()
        said = file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        assert end.value.code == 0
        assert said.startswith(f"usage: lopt {' '.join(path)}".rstrip())
        assert "?" not in said.replace("[?", ""), said


def test_every_character_of_the_messages_has_a_look_alike() -> None:
    """No message of the commands has a character that would become a question mark."""
    folders = [Path(lopt.__file__).parent / name for name in ("commands", "evaluation", "meta", "experiments", "tasks")]
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    others = {character for text in texts for character in text if ord(character) > 127} - set(ASCII)
    assert others == set()


def test_what_an_encoding_has_is_left_alone() -> None:
    for encoding, expected in {
        "ascii": b"a -> b +- c",
        "latin-1": b"a -> b \xb1 c",
        "utf-8": "a → b ± c".encode(),
    }.items():
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        show_everywhere(file)
        file.write("a → b ± c")
        file.flush()
        assert file.buffer.getvalue() == expected  # type: ignore[attr-defined]


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_off_a_terminal_lines_come_though_nothing_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    console = Console(file=io.StringIO())
    lines: list[str] = []
    with progress.progress(console, "runs") as status:
        while len(lines) < 3:
            lines += capsys.readouterr().err.splitlines()
            time.sleep(0.001)
        status.update(2, 5, "loss 1.0")
        while "loss" not in lines[-1]:
            lines += capsys.readouterr().err.splitlines()
            time.sleep(0.001)
    shown = [re.sub(r"\d+:\d\d:\d\d", "TIME", line) for line in lines]
    assert list(dict.fromkeys(shown)) == ["runs: TIME", "runs: 2 of 5, TIME, loss 1.0"]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True)
    with progress.progress(console, "runs") as status:
        status.update(5, 5, "loss 1.0")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"runs ━{14} 5/5 \S+ loss 1\.0", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown))
    assert capsys.readouterr().err == ""
