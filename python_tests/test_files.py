"""Files: written whole and readable by others, tried before the work, and named when they are damaged."""

import csv
import dataclasses
import gzip
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopt import Theta, files, tables
from lopt.benchmark import rows
from lopt.evaluation.table import Run, RunTable
from lopt.figures import COLOURS
from lopt.meta import checkpoint, metrics
from lopt.meta.checkpoint import TrainState
from lopt.meta.recipes import recipe
from lopt.tasks.cost import CostModel
from lopt.tasks.data import readers


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def error_of(function: Callable[..., object], *arguments: object) -> str:
    """The message of the error that must come."""
    with pytest.raises((ValueError, OSError), match=r"(?s).*") as error:
        function(*arguments)
    return str(error.value)


def a_run(**changes: Any) -> Run:
    """A row whose fields have the values of their names, or numbers."""
    kinds = {field.name: field.type for field in dataclasses.fields(Run)}
    values = {name: name if kind is str else kind(1) for name, kind in kinds.items()}
    return Run(**(values | changes))


def write_checkpoint(path: Path) -> None:
    config, theta = recipe("tiny", inner_steps=10), Theta.init_adam("compact")
    checkpoint.save(path, config, theta.spec, TrainState.begin(config, theta.flatten()))


def write_table(path: Path) -> None:
    RunTable(path).append([a_run(task=name) for name in "ab"])


def write_metrics(path: Path) -> None:
    assert path.name == metrics.FILE
    path.touch()
    metrics.append(path.parent, {"iteration": 0, "inner_steps": 0})
    metrics.truncate(path.parent, 0)


def write_figure(path: Path) -> None:
    from matplotlib.figure import Figure

    files.save_figure(path, Figure())


WRITERS: dict[str, Callable[[Path], object]] = {
    "theta.safetensors": Theta.init_adam("compact").save,
    "checkpoint.pt": write_checkpoint,
    "runs.csv": write_table,
    metrics.FILE: write_metrics,
    "figure.png": write_figure,
    "numbers.json": lambda path: files.write_text(path, "{}\n"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_new_files_have_the_permissions_of_any_file(name: str, tmp_path: Path, umask: int) -> None:
    WRITERS[name](tmp_path / name)
    WRITERS[name](tmp_path / name)  # the second time it replaces the first
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert {path.name for path in tmp_path.iterdir()} <= {name, ".lock"}


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old ± →")

    def broken() -> None:
        with files.replacing(path) as file:
            file.write(b"new")
            raise ValueError("broken")

    assert error_of(broken) == "broken"
    assert path.read_text(encoding="utf-8") == "old ± →"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed_and_devices_written_as_they_are(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    files.write_text(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"
    files.write_text("/dev/null", "nowhere")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '/dev/full'"):
        files.write_text("/dev/full", "nowhere")


def test_an_output_is_tried_and_nothing_left(tmp_path: Path) -> None:
    there = tmp_path / "file"
    there.write_text("x")
    files.check_folder("out", tmp_path / "new" / "folder")
    files.check_file("json", tmp_path / "new" / "file")
    files.check_file("json", there)
    files.check_file("json", Path("/dev/stdout"))
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "x"
    for folder in (there, there / "below"):
        error = error_of(files.check_folder, "out", folder)
        expected = f"out: expected a folder, got {str(folder)!r}, where {str(there)!r} is a file; name another"
        assert error == expected
    error = error_of(files.check_file, "json", tmp_path)
    assert error == f"json: expected a file, got the folder {str(tmp_path)!r}; name a file in it"
    with pytest.raises(ValueError, match=r"out: cannot write into '/proc/x' \(.*\); name another folder, or make room"):
        files.check_folder("out", Path("/proc/x"))


def test_a_disk_that_takes_no_more_is_known_before(tmp_path: Path) -> None:
    """Files of at most 1000 bytes stand for a full disk."""
    code = (
        "import resource, pathlib, sys; from lopt import files; resource.setrlimit(resource.RLIMIT_FSIZE, (1000,) * 2)"
    )
    code += "; files.check_folder('out', pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    message = (
        f"ValueError: out: cannot write into {str(tmp_path)!r} (File too large); name another folder, or make room"
    )
    assert done.stderr.splitlines()[-1] == message


# ---- Damaged files -------------------------------------------------------------------------------------------------


def write_npz(path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez_compressed(path, x=generator.random((50, 3)), y=generator.integers(0, 2, 50))


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "theta.safetensors": (WRITERS["theta.safetensors"], Theta.load),
    "checkpoint.pt": (write_checkpoint, checkpoint.load),
    "table.npz": (write_npz, readers.npz),
    "theta.npz": (write_npz, Theta.import_jax),
    "theta.state": (lambda path: path.write_bytes(bytes([0x81, 0xA1, 0x61, 0xC4, 40]) + bytes(40)), Theta.import_jax),
    "cost.json": (lambda path: path.write_text('{"per_op": 1.0}'), lambda path: CostModel.cached(path, [])),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_was_cut_short_or_overwritten_is_named(name: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    assert len(whole) > 10
    cut = {round(len(whole) * part / 24) for part in range(24)} | {0, 1, 5, len(whole) - 1}
    damaged = [whole[:length] for length in sorted(cut)] + [b"\xff" * len(whole), b"a text\n", bytes(300)]
    for content in damaged:
        path.write_bytes(content)
        error = error_of(read, path)
        assert str(path) in error or "import_jax: no array" in error, len(content)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    for name, (_, read) in READERS.items():
        (tmp_path / name).mkdir()
        assert str(tmp_path / name) in error_of(read, tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"\xff\xfe", "{path}: not a table of runs, or damaged ('utf-8' codec can't decode byte 0xff in position"),
        (b"\0", "{path}, row 3: not a table of runs, or damaged (could not convert string to float: '\\x00.0')"),
        (b"x", "{path}, row 3: not a table of runs, or damaged (could not convert string to float: 'x.0')"),
    ],
    ids=["no UTF-8", "zero byte", "a letter"],
)
def test_a_damaged_table_is_named_with_its_row(damage: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    RunTable(path).append([a_run(task="a"), a_run(task="b", seconds=7.0)])
    content = path.read_bytes()
    assert content.count(b"7.0") == 1
    path.write_bytes(content.replace(b"7.0", damage + b".0"))
    error = error_of(RunTable, path)
    assert error.startswith(message.format(path=path))
    assert error.endswith("); mend or move the file, or choose another --out")


def test_rows_of_lopt_bench_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    tables.append_csv(path, [{"name": "step", "ns_per_param": 2.0}])
    assert rows.read_timings(path) == [{"name": "step", "ns_per_param": "2.0"}]
    for damaged, where, what in (
        (b"name,ns_per_param\nstep,1\nstep,x\n", ", row 3: not of lopt bench", "ValueError("),
        (b"a,b\n1,2\n", ", row 2: not of lopt bench", "KeyError('steps_per_second')"),
        (b"name,steps_per_second\nunroll,0\n", ", row 2: not of lopt bench", "ZeroDivisionError("),
        (b"name,\xff\n", ": not a table of rows", "'utf-8' codec can't decode"),
        (b'name,"x\ny', ": not a table of rows", "unexpected end of data"),
    ):
        path.write_bytes(damaged)
        error = error_of(rows.read_timings, path)
        assert error.startswith(f"{path}{where}, or damaged ({what}")
        assert error.endswith("; name another file")
    with pytest.raises(FileNotFoundError, match=r"missing\.csv"):
        rows.read_timings(tmp_path / "missing.csv")


def test_metrics_are_read_up_to_the_first_damage(tmp_path: Path) -> None:
    lines = [{"iteration": n, "inner_steps": 10 * n} for n in range(3)]
    for damage in (b'{"iteration": 3', b"7", b"\xff\xff", b"{}", b"null"):
        whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        (tmp_path / metrics.FILE).write_bytes(whole + damage + b"\n" + whole)
        assert metrics.read_metrics(tmp_path) == lines
    metrics.truncate(tmp_path, 1)
    assert metrics.read_metrics(tmp_path) == lines[:2]
    (tmp_path / metrics.FILE).unlink()
    metrics.truncate(tmp_path, 1)
    assert metrics.read_metrics(tmp_path) == []


def test_a_theta_that_is_not_finite_is_neither_written_nor_read(tmp_path: Path) -> None:
    theta = Theta.init_adam("compact")
    theta.save(tmp_path / "theta.safetensors")
    content = (tmp_path / "theta.safetensors").read_bytes()
    flat = theta.flatten()
    flat[[-2, -3]] = torch.tensor([float("nan"), float("inf")])
    bad, name = theta.unflatten(flat), list(theta.tensors)[-2]
    numel = theta.tensors[name].numel()
    error = error_of(bad.save, tmp_path / "bad.safetensors")
    assert error == f"theta[{name!r}]: 2 of {numel} values are not finite and are not written"
    assert not (tmp_path / "bad.safetensors").exists()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content[:-4] + np.float32("nan").tobytes())
    with pytest.raises(
        ValueError, match=r"values are not finite in .*damaged\.safetensors; it is damaged: copy or make"
    ):
        Theta.load(damaged)


def test_csv_files_are_plain(tmp_path: Path) -> None:
    RunTable(tmp_path / "runs.csv").append([a_run(task="ä →")])
    with (tmp_path / "runs.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["task"] == "ä →"


#: What `python benchmarks/pack.py` is run on.
PACK = Path(__file__).parents[1] / "benchmarks/pack.py"


def test_a_packed_table_is_read_and_goes_on(tmp_path: Path) -> None:
    """Rows that are packed are those that were measured, to six digits; what they are found again by is not touched."""
    path, third = tmp_path / "runs.csv", 1 / 3
    curve = json.dumps([[0, third, 2 * third]])
    some = {"lr": third, "train_loss": third, "settings": "0.3333333333", "curve": curve}
    measured = [a_run(task_sha256=name, **some) for name in "ab"]
    RunTable(path).append(measured)
    whole = path.stat().st_size
    subprocess.run([sys.executable, str(PACK), str(path)], check=True, capture_output=True)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["runs.csv.gz"]
    assert path.with_name("runs.csv.gz").stat().st_size < whole
    kept = list(RunTable(path).rows.values())
    short = {"train_loss": 0.333333, "curve": "[[0, 0.333333, 0.666667]]"}
    assert kept == [dataclasses.replace(run, **short) for run in measured]
    assert list(RunTable(path.with_name("runs.csv.gz")).rows.values()) == kept
    assert tables.read_csv(path)[1]["task_sha256"] == "b"
    assert not path.exists()
    RunTable(path).append([a_run(task_sha256="c")])  # unpacks it
    assert list(RunTable(path).rows.values()) == [*kept, a_run(task_sha256="c")]
    path.unlink()
    path.with_name("runs.csv.gz").write_bytes(gzip.compress(b"suite")[:-3])
    assert "runs.csv.gz: not packed by gzip, or damaged (" in error_of(RunTable, path)


def test_packed_metrics_are_read(tmp_path: Path) -> None:
    line = {"iteration": 1, "inner_steps": 7, "meta_loss": -1.5}
    (tmp_path / f"{metrics.FILE}.gz").write_bytes(gzip.compress(json.dumps(line).encode() + b"\n"))
    assert metrics.read_metrics(tmp_path) == [line]


def test_a_figure_in_few_colours_is_the_figure(tmp_path: Path) -> None:
    """No pixel of lines in every colour, also half transparent, is off by more than an eighth, and lines have
    their colours."""
    figure_module = pytest.importorskip("matplotlib.figure")
    image_module = pytest.importorskip("PIL.Image")
    figure = figure_module.Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    for place, colour in enumerate(COLOURS):
        axes.plot([0, 1, 2], [place, place + 1, 0], color=colour, alpha=1.0 if place % 2 else 0.6)
        axes.fill_between([0, 1, 2], place, place + 0.4, color=colour, alpha=0.2)
    figure.savefig(tmp_path / "whole.png")
    files.save_figure(tmp_path / "few.png", figure)
    whole, few = (
        np.asarray(image_module.open(tmp_path / name).convert("RGB"), dtype=int) for name in ("whole.png", "few.png")
    )
    assert np.abs(whole - few).max() <= 255 / 8
    for colour in COLOURS[1::2]:
        rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (few == rgb).all(axis=2).sum() >= (whole == rgb).all(axis=2).sum() > 100
    assert (tmp_path / "few.png").stat().st_size < (tmp_path / "whole.png").stat().st_size / 1.5
