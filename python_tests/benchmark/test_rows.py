"""Rows: files of them, and comparison with older ones."""

from pathlib import Path

import pytest
import torch

from lopt import tables
from lopt.benchmark import rows

ROW = {"benchmark": "kernel", "name": "apply", "preset": "paper", "layout": "1 x 10", "machine": "this", "threads": 2}


def timed(ns: float, **changes: object) -> rows.Row:
    return {**ROW, "ns_per_param": ns, "time": "today", "commit": "0123456789abcdef", **changes}


def test_files_give_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "rows.csv"
    tables.append_csv(path, [timed(1.5)])
    tables.append_csv(path, [timed(2.5), timed(3.5)])
    read = tables.read_csv(path)
    assert [float(row["ns_per_param"]) for row in read] == [1.5, 2.5, 3.5]
    assert rows.identity(read[0]) == rows.identity(timed(1.5))


def test_files_of_other_columns_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    tables.append_csv(path, [timed(1.5)])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"rows\.csv: has the columns .* name another file"):
        tables.append_csv(path, [{"steps": 1}])
    assert path.read_text() == before


def test_comparison_takes_the_latest_row_of_the_same_thing() -> None:
    old = [timed(8.0), timed(4.0), timed(1.0, layout="1 x 20"), timed(1.0, machine="other"), timed(1.0, threads=1)]
    (found,) = rows.compare([timed(5.0), timed(5.0, preset="compact")], old)
    assert found == rows.Comparison("paper apply 1 x 10", 1.25, "today at 0123456789")


def test_variants_are_compared_with_their_like() -> None:
    """A row of before there were variants measured the usual one."""
    usual = {"stats": "current", "state_dtype": "float32", "precision": "high"}
    (found,) = rows.compare([timed(5.0, **usual), timed(5.0, **usual | {"stats": "lagged"})], [timed(4.0)])
    assert found.ratio == 1.25
    changed = timed(1.0, stats="lagged", state_dtype="bfloat16", precision="high")
    assert rows.describe(changed) == "paper lagged bfloat16 apply 1 x 10"
    assert rows.describe(timed(1.0, preset="", stats="", state_dtype="", precision="")) == "apply 1 x 10"


def test_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, where nvidia-ml-py is missing."""

    def missing(_: object) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda _: 1980)
    assert rows.environment(torch.device("cuda", 0))["clock_mhz"] == 1980
    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    found = rows.environment(torch.device("cuda", 0))
    assert (found["machine"], found["clock_mhz"]) == ("a GPU", None)


def test_comparison_of_throughput_is_a_ratio_of_times_too() -> None:
    def row(rate: float) -> rows.Row:
        return {"benchmark": "unroll", "preset": "paper", "problem": "4-3 batch 2", "steps_per_second": rate}

    (found,) = rows.compare([row(50.0)], [{name: str(value) for name, value in row(100.0).items()}])
    assert (found.what, found.ratio) == ("paper 4-3 batch 2", 2.0)


def test_environment_says_where() -> None:
    found = rows.environment(torch.device("cpu"))
    names = {"machine", "simd", "clock_mhz", "load", "time", "commit", "version_lopt", "version_torch"}
    assert names <= set(found)
    assert found["machine"]
    assert found["version_torch"] == torch.__version__
