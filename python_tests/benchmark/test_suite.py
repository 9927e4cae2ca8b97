"""kernel and step: rows whose numbers fit together, and what is said about them."""

from pathlib import Path

import pytest
import torch

from lopt.benchmark import __main__, kernels, peaks, peers, plots, shapes, steps, suite
from lopt.benchmark.timing import Timer, Timing
from lopt.benchmark.variants import Variant, variants

CPU = torch.device("cpu")
PEAKS = peaks.Peaks(copy=1e11, flops=1e12)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """Runs every operation once and says that it took 2 microseconds."""

    def measure(_: Timer, operation: object) -> Timing:
        assert callable(operation)
        operation()
        return Timing(2e-6, 1e-6, 3e-6)

    monkeypatch.setattr(Timer, "measure", measure)
    return Timer(CPU, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_rows_add_up(timer: Timer, dtype: torch.dtype) -> None:
    found = kernels.measure(Variant("paper"), shapes.even(100, 2), dtype, timer, PEAKS)
    assert [row["name"] for row in found] == ["accumulate", "apply"]
    for row, moved, flops in zip(found, (88, 52), (None, 3648), strict=True):
        moved -= 0 if dtype == torch.float32 else 4 + 2 * (row["name"] == "apply")
        assert (row["tensors"], row["parameters"], row["bytes_per_param"]) == (2, 100, moved)
        assert row["ns_per_param"] == pytest.approx(20.0)
        assert row["gb_per_s"] == pytest.approx(moved * 100 / 2e-6 / 1e9)
        assert row["copy_share"] == pytest.approx(row["gb_per_s"] / 100)
        assert row["flops_per_param"] == flops
        assert row["peak_share"] == (None if flops is None else pytest.approx(flops * 100 / 2e-6 / 1e12))


def test_kernel_rows_of_variants(timer: Timer) -> None:
    """Bytes by hand: the accumulators of compact are 20, in bfloat16 10; one sweep reads all and writes all."""
    for variant, names, moved in (
        (Variant("compact", state_dtype="bfloat16"), ["accumulate", "apply"], [8 + 2 * 10, 8 + 10 + 4]),
        (Variant("compact", "lagged"), ["sweep"], [52]),
        (Variant("compact", "lagged", "bfloat16", "fast"), ["sweep"], [32]),
    ):
        found = kernels.measure(variant, shapes.even(100, 2), torch.float32, timer, PEAKS)
        assert [row["name"] for row in found] == names
        assert [row["bytes_per_param"] for row in found] == moved
        for row in found:
            for name in ("preset", "stats", "state_dtype", "precision"):
                assert row[name] == getattr(variant, name)


def test_step_rows_of_variants(timer: Timer) -> None:
    ways = variants(("compact",), ("current", "lagged"), ("float32", "bfloat16"))
    found, _ = steps.measure(ways, shapes.even(12, 3), torch.float32, timer, PEAKS, False)
    assert [row["name"] for row in found] == ["AdamW fused", "AdamW foreach", *["lopt"] * 4]
    assert [row["bytes_per_param"] for row in found[2:]] == [80, 50, 52, 32]
    assert [row["stats"] for row in found] == ["", "", *["current"] * 2, *["lagged"] * 2]
    with pytest.raises(ValueError, match="precisions: expected some of high, fast, got 'exact'"):
        variants(("compact",), precisions=("exact",))


def test_rules_of_others_are_stepped_whole(timer: Timer) -> None:
    variant = Variant("small_fc_lopt")
    rows, _ = steps.measure([variant], shapes.even(100, 2), torch.float32, timer, PEAKS, False)
    assert [(row["preset"], row["bytes_per_param"]) for row in rows] == [("", 28), ("", None), ("small_fc_lopt", 76)]
    with pytest.raises(ValueError, match="presets: kernels of 'small_fc_lopt' are measured as a whole; use lopt bench"):
        kernels.measure(variant, shapes.even(100, 2), torch.float32, timer, PEAKS)
    with pytest.raises(ValueError, match="presets: 'velo' has stats='current' and a state in"):
        Variant("velo", "lagged")


def test_host_time_is_a_column_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(CPU, 1)
    timer.device = torch.device("cuda", 0)
    found = [
        kernels.row("kernel", "apply", Variant("paper"), shapes.even(100, 1), torch.float32, timer, timing, PEAKS, 52)
        for timing in (Timing(2e-6, 1e-6, 3e-6, 4e-5), Timing(2e-6, 1e-6, 3e-6, 4e-5, alone=False))
    ]
    assert [row["seconds"] for row in found] == [2e-6] * 2
    assert [row["host_seconds"] for row in found] == [4e-5] * 2
    columns, cells = suite.result_table(found)
    assert (columns[-1], [line[-1] for line in cells]) == ("host us", ["40", "40 waits"])


def test_step_rows_have_adamw_first(timer: Timer) -> None:
    found, notes = steps.measure(variants(("compact", "paper")), shapes.even(12, 3), torch.float32, timer, PEAKS, True)
    assert [row["name"] for row in found][:4] == ["AdamW fused", "AdamW foreach", "lopt", "lopt"]
    assert [row["bytes_per_param"] for row in found][:4] == [28, None, 80, 140]
    assert all(row["times_adamw"] == 1.0 for row in found)
    assert [note.split(":")[0] for note in notes if "cuda only" in note] == ["PyLO small_fc", "PyLO VeLO"]


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> object:
        raise KeyError("no weights\nsecond line")

    monkeypatch.setitem(peers.PEERS, "broken", ("cpu", broken))
    monkeypatch.setitem(peers.PEERS, "absent", ("cpu", lambda _: peers.import_module("no_such_module_at_all")))
    params = steps.random_params(shapes.even(4, 1), torch.float32, CPU)
    assert peers.build("broken", params) == "KeyError: 'no weights\\nsecond line'"
    assert peers.build("absent", params) == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert peers.build("PyLO VeLO", params) == "timed on cuda only"


def test_a_peer_is_run_once_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setitem(peers.PEERS, "good", ("cpu", lambda _: lambda: ran.append(1)))
    step = peers.build("good", steps.random_params(shapes.even(4, 1), torch.float32, CPU))
    assert not isinstance(step, str)
    step()
    assert len(ran) == 2


def test_remarks_by_hand() -> None:
    def row(parameters: int, tensors: int, ns: float) -> dict[str, object]:
        return {"preset": "paper", "name": "lopt", "parameters": parameters, "tensors": tensors, "ns_per_param": ns} | {
            "layout": f"{tensors} x {parameters // tensors}"
        }

    found = [row(10_000, 1, 99.0), row(10**5, 1, 4.0), row(10**5, 10, 5.0), row(10**6, 1, 6.0)]
    assert suite.remarks(found) == [
        "paper lopt: 10 x 10000 takes 1.25 times as long as one tensor",
        "paper lopt: time per parameter varies by a factor of 1.50 from 100,000 to 1,000,000 parameters",
    ]


def test_layouts_that_do_not_fit_are_left_out(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measure_peaks", lambda *_: PEAKS)
    monkeypatch.setattr(suite, "available_bytes", lambda _: 10_000)
    layouts = (shapes.even(100, 1), shapes.even(1000, 1))
    chosen = suite.Suite("kernel", variants(("paper",)), layouts, torch.float32, CPU, 1, peers=False)
    said: list[str] = []
    found = list(chosen.run(said.append))
    assert [[row["layout"] for row in some] for some in found] == [["1 x 100", "1 x 100"]]
    assert "1 x 1,000: left out, needs 0.0 GiB" in said
    with pytest.raises(ValueError, match="at least one layout"):
        list(
            suite.Suite("kernel", variants(("paper",)), layouts[1:], torch.float32, CPU, 1, peers=False).run(
                said.append
            )
        )


def test_peaks_are_finite() -> None:
    """One thread, smallest effort: numbers that a machine can have."""
    found = peaks._cpu_rate(1)
    assert 1e7 < found < 1e16


def test_module_without_the_command_line(timer: Timer, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "measure_peaks", lambda *_: PEAKS)
    out = tmp_path / "rows.csv"
    options = ["step", "--sizes", "1000", "--tensors", "1", "10", "--presets", "compact", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmark", *options])
    __main__.main()
    printed = capsys.readouterr().out
    assert "compact lopt 10 x 100" in printed
    assert "AdamW fused" in printed
    assert len(out.read_text().splitlines()) == 1 + 2 * 3


def test_plot_draws_evenly_cut_parameters(timer: Timer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [
        row
        for size in (100, 1000)
        for tensors in (1, 10)
        for row in kernels.measure(Variant("compact"), shapes.even(size, tensors), torch.float32, timer, PEAKS)
    ]
    path = tmp_path / "sub" / "time.png"
    plots.time_per_parameter(found, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="evenly cut"):
        plots.time_per_parameter([{**found[0], "layout": "vit-b16"}], path)
