"""What is made of the rows of an evaluation: choice of trials, ratios, intervals, equal time, the report."""

import dataclasses
import html
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_texts import assert_same_but_for_rounding

from lopt.cli import main
from lopt.evaluation.comparison import Runs, at_equal_time, bootstrap
from lopt.evaluation.opponents import OPPONENTS
from lopt.evaluation.report import Report
from lopt.evaluation.sampled_suites import ENVELOPE, envelope_task
from lopt.evaluation.step_times import StepTime, StepTimes
from lopt.evaluation.table import Run, RunTable
from lopt.provenance import code_sha256

RESULTS = Path(__file__).parents[1] / "benchmarks/results/families"


def a_run(optimizer: str, task: str, train: float, test: float, **changes: Any) -> Run:
    """A run from the initial loss 10; ``valid`` is the test loss if nothing else is said."""
    values: dict[str, Any] = dict.fromkeys(("impl", "code_sha256", "commit", "lopt", "torch", "numpy", "python"), "x")
    values |= {
        "suite": "families",
        "task": task,
        "task_sha256": task,
        "optimizer": optimizer,
        "schedule": "",
        "lr": 1.0,
    }
    values |= {
        "lr": 1.0,
        "seed": 0,
        "horizon": 100,
        "hint": optimizer == "lopt",
        "train_loss": train,
        "test_loss": test,
    }
    values |= {"valid_loss": test, "diverged": False, "seconds": 1.0, "family": "mlp", "data": "wine"}
    values |= {f"initial_{name}_loss": 10.0 for name in ("train", "valid", "test")}
    values |= {"theta_sha256": "t" if optimizer == "lopt" else "", "settings": f'{{"lr": {changes.get("lr", 1.0)}}}'}
    values |= {"state_bytes_per_param": 8.0}
    return Run(**{**values, **changes})


def curve(*points: tuple[int, float, float, float]) -> dict[str, str]:
    """The columns of a curve of step, seconds, training and test loss."""
    return {
        "curve": json.dumps([(step, train, test) for step, _, train, test in points]),
        "times": json.dumps([seconds for _, seconds, _, _ in points]),
    }


def tuned(task: str, trial: int, valid: tuple[float, float], test: tuple[float, float]) -> list[Run]:
    """Two seeds of one trial."""
    return [
        a_run("sgd-tuned", task, 1.0, test[seed], seed=seed, trial=trial, lr=float(trial), valid_loss=valid[seed])
        for seed in (0, 1)
    ]


# ---- Numbers --------------------------------------------------------------------------------------------------------


def test_ratios_by_hand() -> None:
    runs = [a_run("lopt", "a", 0.9, 4.9), a_run("lopt", "b", 1.9, 1.0), a_run("lopt", "c", 1.0, 1.0)]
    runs += [a_run("adam", "a", 1.9, 0.9), a_run("adam", "b", 0.9, 1.0), a_run("adam", "d", 1.0, 1.0)]
    compared = Runs(runs)
    train, test = (compared.compare("lopt", "adam", 100, measure) for measure in ("train", "test"))  # type: ignore[arg-type]
    assert train is not None
    assert test is not None
    assert train.ratios == pytest.approx({"a": 0.5, "b": 2.0})  # the floor is 1% of 10
    assert (train.better, train.won, train.lost) == (0.5, 0.5, 0.5)
    assert train.losses == {"a": (0.9, 1.9), "b": (1.9, 0.9)}  # as they are
    runs += [a_run("lopt", "a", 0.8, 1.0, horizon=200), a_run("adam", "a", 0.4, 1.0, horizon=200)]
    every = Runs(runs).compare("lopt", "adam", None, "train")
    assert every is not None
    assert every.losses == {"a, 100 steps": (0.9, 1.9), "b, 100 steps": (1.9, 0.9), "a, 200 steps": (0.8, 0.4)}
    header, rows = Report(runs=Runs(runs), title="", facts={}).final_losses()
    assert header[1:] == ["lopt, 100 steps", "lopt, 200 steps", "lopt, all lengths"]
    assert rows == [["adam", f"{math.sqrt(4.9 / 0.9):.3f}", "1.000", f"{(4.9 / 0.9) ** (1 / 3):.3f}"]]
    assert train.of_losses == pytest.approx(1.0)
    assert test.of_losses == pytest.approx(math.sqrt(4.9 / 0.9))
    assert train.ratio == pytest.approx(1.0)
    assert test.ratios == pytest.approx({"a": 5.0, "b": 1.0})
    assert (test.better, test.won, test.lost, test.median) == (0.0, 0.0, 0.5, pytest.approx(3.0))
    assert compared.compare("lopt", "adam", 200, "train") is None
    assert compared.compare("lopt", "adam", 100, "train", "second") is None  # no curves


def test_losses_below_zero_count_from_the_lowest() -> None:
    """The lowest loss is -30, along the way of the opponent: initial 40 above it, floor .4."""
    points = curve((0, 0.0, 10.0, 10.0), (50, 1.0, -30.0, 0.0), (100, 2.0, -20.0, 0.0))
    compared = Runs([a_run("lopt", "a", -10.0, 1.0), a_run("adam", "a", -20.0, 1.0, **points)])
    found = compared.compare("lopt", "adam", 100, "train")
    assert found is not None
    assert found.ratios["a"] == pytest.approx((20 + 0.4) / (10 + 0.4))


def test_only_common_seeds_count() -> None:
    runs = [a_run("lopt", "a", 0.9, 1.0, seed=seed) for seed in (0, 1)]
    runs += [a_run("adam", "a", 1.9, 1.0, seed=1), a_run("adam", "a", 9.0, 1.0, seed=2)]
    found = Runs(runs).compare("lopt", "adam", 100, "train")
    assert found is not None
    assert found.ratios["a"] == pytest.approx(0.5)


def test_trials_are_chosen_on_outer_valid_within_the_budget() -> None:
    """Trial 0 has the best test loss, 1 the best valid loss of two, 2 of all; seeds are averaged before choosing."""
    runs = [*tuned("a", 2, (0.5, 0.5), (3.0, 3.0)), *tuned("a", 0, (0.1, 4.0), (0.5, 0.5))]
    runs += tuned("a", 1, (1.0, 1.0), (2.0, 2.0))
    for budget, loss in ((1, 0.5), (2, 2.0), (3, 3.0)):
        compared = Runs(runs, {"sgd-tuned": budget})
        assert [run.test_loss for run in compared.chosen["sgd-tuned"]["a", 100]] == [loss, loss]
        assert compared.label("sgd-tuned") == ("sgd-tuned" if budget == 1 else f"sgd-tuned@{budget}")
    assert Runs(runs).budgets["sgd-tuned"] == 3
    with pytest.raises(ValueError, match="budget: sgd-tuned has 3 trials on every task, got 4"):
        Runs(runs, {"sgd-tuned": 4})


def test_grids_of_both_schedules_are_one_optimizer_too() -> None:
    """On one task the best Adam, by outer_valid, is a constant one, on the other one with cosine."""
    runs = [a_run("lopt", task, 1.0, 1.0) for task in "ab"]
    for task, losses in (("a", (0.5, 0.7, 0.6, 0.8)), ("b", (0.7, 0.6, 0.5, 0.8))):
        for loss, (schedule, lr) in zip(losses, itertools.product(("constant", "cosine"), (1e-3, 1e-2)), strict=True):
            runs.append(a_run("adam", task, 2.0 * loss, loss, schedule=schedule, lr=lr, settings=""))
    compared = Runs(runs)
    assert {name: compared.label(name) for name in compared.chosen} == {
        "lopt": "lopt",
        "adam-grid": "adam-grid@2",
        "adam-cosine-grid": "adam-cosine-grid@2",
        "adam-grids": "adam-grids@4",
    }
    for name, losses in (("adam-grid", [0.5, 0.6]), ("adam-cosine-grid", [0.6, 0.5]), ("adam-grids", [0.5, 0.5])):
        assert [compared.chosen[name][task, 100][0].test_loss for task in "ab"] == losses
    assert "adam-grids" not in Runs([run for run in runs if run.schedule != "cosine"]).chosen


def test_horizons_are_those_of_the_learned_optimizer() -> None:
    runs = [
        a_run(name, "a", 1.0, 1.0, horizon=horizon) for name, horizon in (("lopt", 100), ("adam", 100), ("adam", 9))
    ]
    assert Report(runs=Runs(runs), title="", facts={}).horizons == [100]
    assert Report(runs=Runs(runs[1:]), title="", facts={}).horizons == [9, 100]
    assert "9 steps" not in Report(runs=Runs(runs), title="", facts={}).markdown()


def test_budget_is_what_every_task_has() -> None:
    runs = [*tuned("a", 0, (1.0, 1.0), (1.0, 1.0)), *tuned("a", 1, (0.5, 0.5), (2.0, 2.0))]
    runs += tuned("b", 0, (1.0, 1.0), (1.0, 1.0))
    compared = Runs(runs)
    assert compared.budgets["sgd-tuned"] == 1
    assert compared.chosen["sgd-tuned"]["a", 100][0].trial == 0


def test_losses_below_zero_have_a_ratio_only_from_the_lowest_that_was_seen() -> None:
    runs = [a_run("lopt", "a", -3.0, 1.0), a_run("adam", "a", 1.0, 1.0)]
    found = Runs(runs).compare("lopt", "adam", 100, "train")
    assert found is not None
    assert found.ratios == pytest.approx({"a": 0.13 / 4.13})
    assert found.losses == {"a": (-3.0, 1.0)}
    assert found.of_losses is None
    runs += [a_run("lopt", "b", 3.0, 1.0), a_run("adam", "b", 1.5, 1.0)]
    found = Runs(runs).compare("lopt", "adam", 100, "train")
    assert found is not None
    assert found.of_losses == 2.0


def test_suites_are_told_apart() -> None:
    """Tasks of one name in two suites are two tasks, each compared within its suite."""
    runs = [a_run("lopt", "a", 0.9, 1.0), a_run("adam", "a", 1.9, 1.0), a_run("lopt", "b", 0.9, 1.0)]
    runs += [a_run("lopt", "a", 1.9, 1.0, suite="text"), a_run("adam", "a", 0.4, 1.0, suite="text")]
    runs.append(a_run("adam", "b", 0.4, 1.0))
    found = Runs(runs).compare("lopt", "adam", 100, "train")
    assert found is not None
    assert found.ratios == pytest.approx({"families: a": 1 / 2, "b": 1 / 0.5, "text: a": 2 / 0.5})


def test_equal_time() -> None:
    """Ours ends after 2 seconds; by then the other, half as fast, is between its points of 1 and 3 seconds."""
    ours = a_run("lopt", "a", 1.0, 2.0, **curve((0, 0.0, 10.0, 10.0), (100, 2.0, 1.0, 2.0)))
    points = curve((0, 0.0, 10.0, 10.0), (50, 1.0, 5.0, 6.0), (100, 3.0, 3.0, 4.0), (150, 4.0, 0.5, 0.5))
    other = a_run("adam", "a", 0.5, 0.5, **points)
    assert at_equal_time(ours.points, other.points, "train") == pytest.approx((1.0, 4.0))
    assert at_equal_time(other.points, ours.points, "test") == pytest.approx((5.0, 2.0))
    found = Runs([ours, other]).compare("lopt", "adam", 100, "test", "second")
    assert found is not None
    assert found.ratios["a"] == pytest.approx(2.1 / 5.1)
    elsewhere = Runs([ours, dataclasses.replace(other, machine="another")])
    assert elsewhere.compare("lopt", "adam", 100, "test", "second") is None  # seconds of two machines


def test_step_times_measured_apart_take_the_place_of_the_runs_own() -> None:
    """Steps of 2 and 1 s: after 100 s ours is half way, at 5.5, and the other, of another machine, at its end."""
    ours = a_run("lopt", "a", 1.0, 2.0, **curve((0, 0.0, 10.0, 10.0), (100, 2.0, 1.0, 2.0)))
    other = a_run("adam", "a", 4.0, 0.5, machine="another", **curve((0, 0.0, 10.0, 10.0), (100, 9.0, 4.0, 0.5)))
    times = {("families", "a", "lopt"): 2.0, ("families", "a", "adam"): 1.0}
    runs = Runs([ours, other], step_times=times)
    found = runs.compare("lopt", "adam", 100, "train", "second")
    assert found is not None
    assert found.ratios["a"] == pytest.approx((5.5 + 0.1) / (4.0 + 0.1))
    _, rows = Report(runs=runs, title="", facts={}).costs(100)
    assert [(row[0], row[2]) for row in rows] == [("lopt", "2000.00"), ("adam", "1000.00")]
    del times["families", "a", "adam"]
    assert Runs([ours, other], step_times=times).compare("lopt", "adam", 100, "train", "second") is None


def test_step_times_are_those_of_the_machine_with_most(tmp_path: Path) -> None:
    values = dict.fromkeys(("impl", "task_sha256", "date", "commit", "lopt", "torch", "numpy", "python"), "x")
    rows = [
        StepTime(
            **{**values, "suite": "s", "task": "a", "least": 0.5, "most": 2.0},  # type: ignore[arg-type]
            optimizer=name,
            machine=machine,
            seconds=seconds,
        )
        for name, machine, seconds in (("adam", "m", 1.0), ("adam", "n", 2.0), ("lopt", "n", 3.0))
    ]
    assert StepTimes(tmp_path).machine is None
    StepTimes(tmp_path).append(rows)
    assert StepTimes(tmp_path).machine == "n"
    assert StepTimes(tmp_path).seconds() == {("s", "x", "adam"): 2.0, ("s", "x", "lopt"): 3.0}


def test_normalised_losses_are_the_papers() -> None:
    runs = [a_run("lopt", "a", 4.0, 1.0), a_run("adam", "a", 7.0, 3.0), *tuned("a", 0, (1.0, 1.0), (0.0, 0.0))]
    compared = Runs(runs)
    assert compared.normalised("lopt", 100, "train") == pytest.approx({"a": (4 - 1) / (10 - 1)})
    assert compared.normalised("adam", 100, "test") == pytest.approx({"a": 0.3})
    assert compared.normalised("sgd-tuned", 100, "test") == {"a": 0.0}


def test_bootstrap_is_the_normal_interval_for_many_tasks() -> None:
    logs = np.random.RandomState(0).standard_normal(400)
    low, high = bootstrap(np.exp(logs).tolist())
    middle, half = logs.mean(), 1.96 * logs.std() / math.sqrt(400)
    assert math.log(low) == pytest.approx(middle - half, abs=0.01)
    assert math.log(high) == pytest.approx(middle + half, abs=0.01)


# ---- The report -----------------------------------------------------------------------------------------------------


def several() -> list[Run]:
    """Four tasks of two families: lopt loses flows to adam, and one task of its own worst."""
    runs = []
    for at, task in enumerate("abcd"):
        family = "maf" if at > 1 else "mlp"
        loss = (0.4, 0.4, 2.1, 1.5)[at]
        points = curve((0, 0.0, 10.0, 10.0), (100, 1.0, loss, loss))
        for seed in (0, 1):
            runs.append(a_run("lopt", task, loss, loss, seed=seed, family=family, **points))
            runs.append(a_run("lopt", task, 9.9, 9.9, seed=seed, family=family, hint=False, **points))
            points = curve((0, 0.0, 10.0, 10.0), (100, 1.0, 0.9, 0.9))
            runs.append(a_run("adam", task, 0.9, 0.9, seed=seed, family=family, **points))
    return runs


def test_report_says_where_we_lose() -> None:
    pytest.importorskip("matplotlib")
    report = Report(runs=Runs(several()), title="A < B", facts={"seeds": "0, 1"})
    assert report.ours == ["lopt", "lopt-untold"]
    lines = report.losses(100, "lopt")
    assert "train: ahead of adam on the whole, behind on maf 1.88" in lines
    assert "test: 2.20 times the loss of adam on c" in lines
    (line,) = (line for line in report.losses(100, "lopt-untold") if line.startswith("train: behind"))
    assert line == "train: behind adam, ratio 10.000 (10.000 to 10.000), lost 100%, won 0% of 4 tasks"
    ratio = (0.5 * 0.5 * 2.2 * 1.6) ** 0.25
    header, rows = report.against(100, "lopt")
    assert header[1:4] == ["train: ratio (95%)", "median", "better / won / lost"]
    assert rows[0][1].startswith(f"{ratio:.2f} (")
    assert rows[0][2:4] == [f"{(0.5 + 1.6) / 2:.2f}", "50% / 50% / 50%"]
    header, rows = report.headline("lopt")
    assert header == ["lopt against", "train, 100 steps", "test, 100 steps"]
    assert re.fullmatch(rf"{ratio:.2f} \(0\.5\d to \d\.\d\d\), 50%", rows[0][1])
    header, rows = report.final_losses()
    assert header == ["test loss over that of", "lopt, 100 steps", "lopt-untold, 100 steps"]
    told = (0.4 * 0.4 * 2.1 * 1.5) ** 0.25
    assert rows[0] == ["adam", f"{told / 0.9:.3f}", f"{9.9 / 0.9:.3f}"]
    assert rows[1:] == [["lopt", "", f"{9.9 / told:.3f}"], ["lopt-untold", f"{told / 9.9:.3f}", ""]]
    header, rows = report.every_loss(100, "test")
    assert header == ["test loss", "lopt", "lopt-untold", "adam"]
    assert rows[2] == ["c", "2.1", "9.9", "0.9"]
    header, rows = report.by_family(100, "lopt", "test")
    assert header == ["test: ratio to", "adam"]
    assert rows == [["maf", f"{(2.2 * 1.6) ** 0.5:.2f}"], ["mlp", "0.50"]]
    header, rows = report.normalised(100)
    assert rows[0][:3] == ["lopt", f"{(1.2 + 0.6) / 9.1 / 4:.4f}", f"{0.6 / 9.1 / 2:.4f}"]
    text = report.html()
    assert text.startswith("<!doctype html>")
    assert "A &lt; B" in text
    assert len(re.findall("<svg ", text)) == 1
    assert not re.search(r"(src|href)=[\"']?(?!#)", re.sub(r"xlink:href=\"#[^\"]*\"", "", text))  # needs nothing else
    assert report.html() == text


def test_markdown_has_the_tables_of_the_html_file() -> None:
    """Every cell of the HTML file, in the same order; a colour, a figure and a fold are its own."""
    pytest.importorskip("matplotlib")
    report = Report(runs=Runs(several()), title="A < B", facts={"seeds": "0, 1"}, warnings=["a *warning* | `x`"])
    text = report.markdown()
    cells = re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", report.html())
    tables = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [cell for line in tables for cell in line[2:-2].split(" | ")] == cells
    assert text.startswith("# A \\< B\n\n* seeds: 0, 1\n\n**a \\*warning\\* | \\`x\\`**\n\nA ratio is")
    assert text.count("<details>") == 10
    assert report.html().count("<details>") == 11  # what was run, too


def test_summary_says_who_is_ahead() -> None:
    """By the interval: of tasks with one ratio it is that ratio; where some are won and some lost, 1 is in it."""
    runs = [a_run("lopt", task, 0.9, loss) for task, loss in (("a", 0.4), ("b", 1.9))]
    runs += [a_run(name, task, loss, 0.9) for task in "ab" for name, loss in (("adam", 1.9), ("dog", 0.4))]
    lines = Report(runs=Runs(runs), title="", facts={}).summary()
    assert lines[0] == f"100 steps, test loss, 2 tasks: lopt is level with adam ({0.5**0.5 * 2**0.5:.2f}), dog (1.00)."
    assert lines[1] == "100 steps, training loss, 2 tasks: lopt is ahead of adam (0.50); behind dog (2.00)."
    assert lines[2:] == ["Runs that diverged: none."]
    runs.append(a_run("dog", "c", 9.9, 9.9, diverged=True))
    assert Report(runs=Runs(runs), title="", facts={}).summary()[2] == "Runs that diverged: dog 1 of 3."


def with_curves() -> Report:
    """Two tasks; adam is at 10, 1 and .1, the mean of two seeds, lopt at 10, .1 and .01."""
    runs = []
    for task in ("a", "b <i>"):
        points = curve((0, 0.0, 10.0, 10.0), (50, 1.0, 0.1, 5.0), (100, 2.0, 0.01, math.nan))
        runs.append(a_run("lopt", task, 0.01, 5.0, **points))
        for seed, last in enumerate((0.05, 0.15)):
            points = curve((0, 0.0, 10.0, 10.0), (50, 1.0, 1.0, 1.0), (100, 2.0, last, last))
            runs.append(a_run("adam", task, last, last, seed=seed, **points))
        runs.append(a_run("dog", task, 1.0, 1.0))  # has no curve
    return Report(runs=Runs(runs), title="", facts={})


def test_curves_are_means_over_seeds() -> None:
    found = with_curves().curves(100)
    assert list(found) == ["a", "b <i>"]
    assert found["a"]["adam"] == {"steps": [0, 50, 100], "train": [10, 1, 0.1], "test": [10, 1, 0.1]}
    assert found["a"]["lopt"] == {"steps": [0, 50, 100], "train": [10, 0.1, 0.01], "test": [10, 5, None]}
    assert set(found["a"]) == {"lopt", "adam"}
    runs = [a_run(name, "a", 1.0, 1.0) for name in ("lopt", "lopt-untold", *OPPONENTS)]
    strokes = [tuple(sorted(style.items())) for style in Report(runs=Runs(runs), title="", facts={}).styles().values()]
    assert len(set(strokes)) == len(strokes) == 2 + len(OPPONENTS)


#: Clicks on the report, and what there is to see then.
CLICKS = """
const seen = {}, table = document.querySelector("table"), heads = table.tHead.rows[0].cells;
const column = (index) => [...table.tBodies[0].rows].map((row) => row.cells[index].textContent);
seen.before = column(0);
heads[1].click();
seen.rising = column(1).map(parseFloat);
heads[1].dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
seen.falling = column(1).map(parseFloat);
seen.sort = [...heads].map((head) => head.getAttribute("aria-sort"));
heads[0].click();
seen.names = column(0);
const [task, measure] = document.querySelectorAll(".curves select");
seen.tasks = [...task.options].map((option) => option.text);
seen.empty = document.querySelectorAll("polyline").length;
const choose = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
const lines = () => Object.fromEntries([...document.querySelectorAll("polyline")].map((line) =>
  [line.dataset.name, line.getAttribute("points").split(" ").map((point) => point.split(",").map(parseFloat))]));
choose(task, "b <i>");
choose(measure, "train");
seen.train = lines();
choose(measure, "test");
seen.test = lines();
document.querySelector(".legend button").click();
seen.hidden = Object.keys(lines());
document.body.textContent = "";
document.body.dataset.seen = JSON.stringify(seen);
"""


def test_in_a_browser(tmp_path: Path) -> None:
    """Tables are sorted by numbers and by names, either way; curves are drawn when asked for, on a log scale."""
    pytest.importorskip("matplotlib")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    page = tmp_path / "report.html"
    page.write_text(with_curves().html().replace("</body>", f"<script>{CLICKS}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    said = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert said is not None, done.stdout[-2000:]
    seen = json.loads(html.unescape(said[1]))
    assert seen["before"] == ["adam", "dog"]
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == seen["rising"][::-1] != seen["rising"]
    assert seen["sort"] == ["none", "descending", "none"]
    assert seen["names"] == ["adam", "dog"]
    assert seen["tasks"] == ["choose a task", "a", "b <i>"]
    assert seen["empty"] == 0
    adam, lopt = seen["train"]["adam"], seen["train"]["lopt"]
    heights = {10: adam[0][1], 1: adam[1][1], 0.1: adam[2][1], 0.01: lopt[2][1]}
    decade = heights[1] - heights[10]  # downwards
    assert decade > 50
    assert heights == pytest.approx({loss: heights[10] - math.log10(loss / 10) * decade for loss in heights}, abs=0.02)
    assert lopt[1][1] == adam[2][1]
    assert adam[1][0] - adam[0][0] == pytest.approx(adam[2][0] - adam[1][0], abs=0.02)
    assert [len(seen["test"][name]) for name in ("lopt", "adam")] == [2, 3]  # what is no number is left out
    assert seen["hidden"] == ["adam"]


def test_opponents_stand_in_the_order_of_their_table() -> None:
    names = ("lopt", "zz", "dog", "adam-tuned", "prodigy", "adam")
    report = Report(runs=Runs([a_run(name, "a", 1.0, 1.0) for name in names]), title="", facts={})
    assert report.others == ["adam", "prodigy", "dog", "adam-tuned", "zz"]


@pytest.mark.results
def test_the_tables_that_are_kept_are_what_the_runs_kept_say(tmp_path: Path) -> None:
    """report.md is what `lopt report` makes of the rows beside it."""
    assert main(["report", str(RESULTS), "--theta", "default", "--out", str(tmp_path / "report.md")]) == 0
    assert_same_but_for_rounding((tmp_path / "report.md").read_text(), (RESULTS / "report.md").read_text())


def test_published_envelope_stands_beside_our_losses() -> None:
    task = envelope_task().name
    runs = [a_run("lopt", task, 0.11, 0.4, horizon=10_000), a_run("adam", task, 0.2, 0.4, horizon=10_000)]
    table = Report(runs=Runs(runs), title="", facts={}).envelope()
    assert table is not None
    header, rows = table
    assert header[1:] == ["10000 steps"]
    assert rows == [["published envelope", f"{ENVELOPE[10_000]:.4f}"], ["lopt", "0.1100"], ["adam", "0.2000"]]
    assert Report(runs=Runs(several()), title="", facts={}).envelope() is None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    RunTable(tmp_path / "runs.csv").append(several())
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "numbers.json")]) == 0
    shown = capsys.readouterr().out
    assert "100 steps, 4 tasks" in shown
    assert "50% / 50%" in shown
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    told = [one for one in numbers["comparisons"] if (one["name"], one["measure"]) == ("lopt", "train")]
    assert [one["per"] for one in told] == ["step", "second"]
    assert told[0]["ratio"] == pytest.approx((0.5 * 0.5 * 2.2 * 1.6) ** 0.25)
    assert told[0]["interval"][0] < told[0]["ratio"] < told[0]["interval"][1]
    assert numbers["normalised"]["100"]["adam"]["train"]["median"] == pytest.approx(0.5 / 9.6 / 2)
    assert (tmp_path / "report.html").read_text().count("<table>") >= 6
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "a/report.md")]) == 0
    assert (tmp_path / "a/report.md").read_text().startswith("# Evaluation of a learned optimizer\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "folder: no runs in nowhere"),
        (["--theta", "u"], "theta: no runs of|u"),
        (["--optimizers", "prodigy"], "optimizers: no runs of prodigy"),
        (["--optimizers", "adam@2"], "optimizer: expected adam@1 to adam@1"),
        (["--suite", "images"], "no runs of the learned optimizer"),
    ],
)
def test_mistakes_are_explained(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    RunTable(tmp_path / "runs/evaluate/runs.csv").append(several())
    assert main(["report", *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_several_thetas_must_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    other = a_run("lopt", "a", 5.0, 5.0, theta_sha256="uvw")
    RunTable(tmp_path / "runs.csv").append([*several(), other])
    assert main(["report", str(tmp_path)]) == 2
    assert "theta: the table has several, say which: t, uvw" in " ".join(capsys.readouterr().err.split())
    assert main(["report", str(tmp_path), "--theta", "uv"]) == 0
    assert "100 steps" in capsys.readouterr().out


def test_rows_of_different_origin_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several versions, commits or packages are compared, and named; other code of the same theta is left out."""
    pytest.importorskip("matplotlib")
    one = several()  # 24 runs, 16 of them of lopt
    RunTable(tmp_path / "one/runs.csv").append(one)
    changes = {"seed": 7, "commit": "0123456789abcdef", "torch": "3.0", "impl": "y"}
    more = [a_run("adam", "a", 1.0, 1.0, **changes), a_run("lopt", "a", 1.0, 1.0, seed=7, commit="")]
    RunTable(tmp_path / "two/runs.csv").append([*one, *more, a_run("lopt", "a", 1.0, 1.0, seed=8, code_sha256="c")])
    said = {}
    for name in ("one", "two"):
        assert main(["report", str(tmp_path / name), "--json", str(tmp_path / "numbers.json")]) == 0
        said[name] = capsys.readouterr().out.splitlines()
    assert not [line for line in said["one"] if line.startswith(("Compared", "Left"))]
    expected = [
        "Compared although of several versions: lopt x, torch x, numpy x, python x (25 runs); "
        "lopt x, torch 3.0, numpy x, python x (1 runs)",
        "Compared although of several commits: x (24 runs); 0123456789 (1 runs); unknown (1 runs)",
        "Compared although of several code of adam: x (8 runs); y (1 runs)",
        "Left out: theta t with code c (1 runs)",
    ]
    assert said["two"][:4] == expected
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["warnings"] == expected
    assert numbers["facts"]["theta, SHA-256"] == "t (17 runs)"
    assert numbers["facts"]["commits"] == "x (24 runs); 0123456789 (1 runs); unknown (1 runs)"
    assert all(f"<p class=lost>{line}</p>" in (tmp_path / "two/report.html").read_text() for line in expected)


def test_every_horizon_has_one_code_of_the_learned_optimizer(tmp_path: Path) -> None:
    """The code that ran most tasks at that horizon, and of two that ran as many the one that runs now."""
    pytest.importorskip("matplotlib")
    now = code_sha256()
    codes = {100: {"old": "ab", now: "a"}, 200: {"old": "ab", now: "ab"}, 300: {"older": "a", "old": "a"}}
    runs = [
        run
        for horizon, by_code in codes.items()
        for task in "ab"
        for run in (
            a_run("adam", task, 1.0, 1.0, horizon=horizon),
            *(
                a_run("lopt", task, 1.0 if code == now else 2.0, 1.0, horizon=horizon, code_sha256=code)
                for code, tasks in by_code.items()
                if task in tasks
            ),
        )
    ]
    RunTable(tmp_path / "runs.csv").append(runs)
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    expected = f"old (3 runs); {now} (2 runs)"
    assert numbers["facts"]["code of lopt, SHA-256"] == expected
    ratios = {
        one["horizon"]: set(one["ratios"].values())
        for one in numbers["comparisons"]
        if (one["measure"], one["per"]) == ("train", "step")
    }
    assert ratios == {100: {2.1 / 1.1}, 200: {1.0}, 300: {2.1 / 1.1}}
