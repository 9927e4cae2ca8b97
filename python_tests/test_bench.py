"""lopt bench: rows that can be read again, and errors; never how quick something is."""

import csv
import json

import pytest

pytest.importorskip("tyro", reason="the command line needs tyro, which this environment lacks")

from lopt.cli import main
from lopt.commands import bench


def test_unroll_rows_are_complete_and_append(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PROBLEMS", (((4, 3), 2),))
    monkeypatch.setattr(bench, "wall_seconds", lambda processes, *_: 1.0 + 0.25 * (processes - 1))
    out, numbers = tmp_path / "rows.csv", tmp_path / "numbers.json"
    options = ["bench", "unroll", "--steps", "50", "--repeats", "2", "--presets", "compact", "--out", str(out)]
    assert main([*options, "--json", str(numbers)]) == 0
    assert main(options) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    written = json.loads(numbers.read_text())["rows"][0]
    assert rows[0]["problem"] == written["problem"] == "4-3 batch 2"
    assert written["two_processes"] == 2 * 1.0 / 1.25
    assert written["steps_per_second_20"] <= written["steps_per_second"] <= written["steps_per_second_80"]
    assert {"machine", "simd", "load", "time", "commit", "version_lopt", "version_torch"} <= set(rows[0])
    assert "4-3 batch 2" in capsys.readouterr().out


def test_bad_sizes_are_named(capsys):
    assert main(["bench", "unroll", "--steps", "3"]) == 2
    assert "at least 50" in capsys.readouterr().err
