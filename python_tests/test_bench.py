"""lopt bench: rows that can be read again, and errors; never how quick something is."""

import csv
import json

import pytest

pytest.importorskip("tyro", reason="the command line needs tyro, which this environment lacks")

from lopt import tables
from lopt.benchmark import peaks, suite, unroll
from lopt.cli import main


def test_unroll_rows_are_complete_and_append(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unroll, "PROBLEMS", (((4, 3), 2),))
    monkeypatch.setattr(unroll, "wall_seconds", lambda processes, *_: 1.0 + 0.25 * (processes - 1))
    out, numbers = tmp_path / "rows.csv", tmp_path / "numbers.json"
    options = ["bench", "unroll", "--steps", "50", "--repeats", "2", "--presets", "compact", "--out", str(out)]
    assert main([*options, "--json", str(numbers)]) == 0
    assert main(options) == 0
    with out.open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2
    written = json.loads(numbers.read_text())["rows"][0]
    assert read[0]["problem"] == written["problem"] == "4-3 batch 2"
    assert written["two_processes"] == 2 * 1.0 / 1.25
    assert written["steps_per_second_20"] <= written["steps_per_second"] <= written["steps_per_second_80"]
    assert {"machine", "simd", "clock_mhz", "load", "time", "commit", "version_lopt", "version_torch"} <= set(read[0])
    assert "4-3 batch 2" in capsys.readouterr().out


def test_torch_unroll_rows_are_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unroll, "TORCH_TASKS", {"mlp_ae": 15})
    monkeypatch.setattr(unroll, "RUNS", 3)
    out = tmp_path / "rows.csv"
    options = ["bench", "torch-unroll", "--steps", "1000", "--repeats", "2", "--presets", "compact", "--out", str(out)]
    assert main(options) == 0
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["name"], row["parameters"], row["runs"], row["steps"]) == ("mlp_ae", "454", "3", "10")
    ratio = float(row["steps_per_second"]) / float(row["steps_per_second_alone"])
    assert float(row["over_alone"]) == pytest.approx(ratio)
    assert row["problem"] in capsys.readouterr().out


@pytest.mark.parametrize("what", ["kernel", "step"])
def test_layouts_are_measured_written_and_compared(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "measure_peaks", lambda *_: peaks.Peaks(1e10, 1e11))
    out = tmp_path / "rows.csv"
    options = ["bench", what, "--sizes", "100", "1000", "--tensors", "1", "10", "--repeats", "2", "--no-peers"]
    options += ["--threads", "1"]
    assert main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "bytes per parameter" in printed
    assert "paper" in printed
    read = tables.read_csv(out)
    assert len(read) == 4 * 4  # layouts; two presets and two operations, or four optimizers
    assert {row["layout"] for row in read} == {"1 x 100", "10 x 10", "1 x 1,000", "10 x 100"}
    for row in read:
        assert float(row["ns_per_param_20"]) <= float(row["ns_per_param"]) <= float(row["ns_per_param_80"])
        row["ns_per_param"] = "1e-30"  # so that whatever is measured now is slower
    (tmp_path / "quick.csv").write_text("")
    with (tmp_path / "quick.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(read[0]))
        writer.writeheader()
        writer.writerows(read)
    assert main([*options, "--compare", str(tmp_path / "quick.csv")]) == 1
    assert "16 of 16 rows are in" in capsys.readouterr().out
    assert main([*options, "--compare", str(tmp_path / "quick.csv"), "--tolerance", "1e60"]) == 0


def test_bad_options_are_named(capsys):
    for options, said in (
        (["unroll", "--steps", "3"], "at least 50"),
        (["kernel", "--presets", "huge"], "presets: expected some of paper, compact, spectral, small_fc_lopt, velo"),
        (["step", "--sizes", "10", "--tensors", "20"], "tensors: expected 1 to 10"),
        (["step", "--models", "bert"], "vit-b16, gpt2-355m, got 'bert'"),
        (["kernel", "--compare", "no-such-file.csv"], "no-such-file.csv"),
    ):
        assert main(["bench", *options]) == 2
        assert said in capsys.readouterr().err
