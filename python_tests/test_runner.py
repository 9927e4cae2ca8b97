"""Evaluations with any optimizers: suites, budgets, what a killed evaluation leaves, tables of earlier versions."""

import csv
import dataclasses
import gzip
import importlib.util
import json
import math
import os
import pickle
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt import tables
from lopt.cli import main
from lopt.commands.evaluate import LINE_UP
from lopt.evaluation import jobs, opponents, sampled_suites, table
from lopt.evaluation.jobs import Learned, Plan, execute, missing_packages
from lopt.evaluation.opponents import OPPONENTS, TUNING_FREE, make_optimizer
from lopt.evaluation.runs import EVALUATION, Result, evaluation_batches, train_task
from lopt.evaluation.suites import data_of, family_of, fingerprint, suite, unavailable
from lopt.evaluation.table import LEARNED, LOSSES, TIMED, Run, RunTable
from lopt.tasks import datasets, sample_task
from lopt.tasks.data import catalogue
from lopt.tasks.held_out import HeldOutTask
from lopt.tasks.image_tasks import ImageTask
from lopt.tasks.task import SPLITS, Task

COLUMNS = [field.name for field in dataclasses.fields(Run)]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WINE = HeldOutTask(data="wine", sizes=(13, 6, 3), batch_size=16)
WINE_FLOW = sampled_suites.held_out("maf", "wine", 5)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run writes into the repository, and Fashion-MNIST is missing even where it is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "no-such-folder")
    catalogue._load.cache_clear()  # what another test has read


def a_plan(*optimizers: str, seeds: tuple[int, ...] = (0, 1)) -> Plan:
    """Two tasks of 16 steps, without the learned optimizer."""
    tasks = (WINE, WINE_FLOW)
    return Plan(suite="families", tasks=tasks, horizons=(16,), seeds=seeds, optimizers=optimizers, learned=None)


def untimed(path: Path) -> list[dict[str, str]]:
    """The rows of a table but for what is measured in seconds."""
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


# ---- Suites ---------------------------------------------------------------------------------------------------------


def test_headline_suite_has_what_it_promises() -> None:
    """40 tasks, 8 families and 6 real data sets at least without R's tables and WordNet; 30 also without Fashion-MNIST,
    which comes from Debian."""
    tasks = suite("families")
    assert len({task.name for task in tasks}) == len(tasks)
    everywhere = [task for task in tasks if data_of(task) not in ("letter", "satellite", "wordnet")]
    assert len(everywhere) >= 40
    assert len({family_of(task) for task in everywhere}) >= 8
    assert len({data_of(task) for task in everywhere}) >= 6
    assert sum(data_of(task) != "fashion-mnist" for task in everywhere) >= 30


@pytest.mark.parametrize("name", ["families", "images", "text", "language", "vision", "scripts"])
def test_suites_are_held_out(name: Any) -> None:
    for task in suite(name):
        assert data_of(task) in catalogue.HELD_OUT
        assert data_of(task) not in (*catalogue.META_TRAIN, *catalogue.CORE)
        if not isinstance(task, HeldOutTask):
            rows = task.data  # type: ignore[attr-defined]
            assert (rows.train_share, rows.just_train) == (1.0, False)
            assert not isinstance(task, ImageTask) or rows.augmentation is None


def test_tasks_for_choosing_share_no_data_and_no_shape_with_held_out_ones() -> None:
    chosen_by, reported = suite("language-validation"), suite("language")
    assert {data_of(task) for task in chosen_by} == set(catalogue.VALIDATION)
    assert {family_of(task) for task in chosen_by} == {family_of(task) for task in reported}
    sizes = [{task.num_params for task in tasks} for tasks in (chosen_by, reported)]
    assert not sizes[0] & sizes[1]
    for tasks in (chosen_by, reported):
        assert len({task.name for task in tasks}) == len(tasks)
        assert len({data_of(task) for task in tasks}) == 2


def test_a_task_travels_without_its_text() -> None:
    task = suite("language")[0]
    next(task.batches(0, "train"))
    again = pickle.loads(pickle.dumps(task))
    assert len(pickle.dumps(task)) < 50_000
    assert again == task
    assert torch.equal(next(again.batches(3, "test")).inputs, next(task.batches(3, "test")).inputs)


def test_sampled_tasks_stay_the_same() -> None:
    """The samplers must go on making these from the seeds in the table."""
    sizes = {task.name: task.num_params for task in suite("families") if data_of(task) in ("digits", "topics", "wine")}
    assert sizes == {
        "mlp-digits-64-25-114-44-102-10": 15_269,
        "mlp-digits-64-29-75-10": 4895,
        "mlp_ae-digits-119-67-linear_center-l1": 20_127,
        "mlp_ae-digits-75-sigmoid-l1": 9739,
        "mlp_ae-digits-90-79-70-44-60-sigmoid-l2": 28_367,
        "mlp_vae-digits-124-44-43-33": 23_234,
        "mlp_vae-digits-39-33-36-32-92": 22_523,
        "conv_pooling-digits-32-28-14": 12_104,
        "conv_pooling-digits-12-11": 1416,
        "conv_fc-digits-47": 8000,
        "conv_fc-digits-9-34-42-19": 25_263,
        "nvp-digits-1x24": 2392,
        "nvp-digits-1x41-59": 7671,
        "maf-digits-1x45-53": 12_275,
        "maf-digits-3x19": 11_385,
        "vit-digits-1x32-4x4": 13_770,
        "vit-digits-3x12-4x4": 4258,
        "mlp-wine-13-22-20-23-3": 1323,
        "mlp-wine-13-29-75-3": 2884,
        "maf-wine-4x46": 7464,
        "char_rnn_language_model-topics-vrnn-33": 12_427,
        "char_rnn_language_model-topics-gru-94": 71_554,
        "word_rnn_language_model-topics-vrnn-38": 104_219,
        "transformer_language_model-topics-4x20": 24_516,
        "transformer_language_model-topics-3x26": 39_360,
    }


def test_missing_data_is_named() -> None:
    reasons = {data_of(task): unavailable(task) for task in suite("images")}
    assert reasons["digits"] is None
    assert "apt-get install dataset-fashion-mnist" in str(reasons["fashion-mnist"])


def test_fingerprint_knows_the_task() -> None:
    assert fingerprint(WINE) == WINE.fingerprint
    other = sampled_suites.held_out("maf", "wine", 4)
    assert len({fingerprint(WINE_FLOW), fingerprint(other), fingerprint(WINE)}) == 3
    assert fingerprint(sampled_suites.held_out("maf", "wine", 5)) == fingerprint(WINE_FLOW)


def test_losses_of_sampled_tasks_are_means_over_fixed_minibatches() -> None:
    task = sample_task(1, ["mlp"])
    curve = train_task(task, lambda p, n: make_optimizer("adam", p, n), 3, 4)
    for split in SPLITS:
        batches = list(evaluation_batches(task, split))
        rows = [len(batch.inputs) for batch in batches]
        assert sum(rows[:-1]) < EVALUATION.rows <= sum(rows)
        losses = [float(task.loss(curve.params, batch)) * count for batch, count in zip(batches, rows, strict=True)]
        assert curve.final[split] == pytest.approx(sum(losses) / sum(rows), rel=1e-5)


def test_envelope_task_begins_where_the_published_one_does() -> None:
    """log 10 and a little, as in the published curve (2.298 at step 0); 784-128-128-10 has these parameters."""
    task = sampled_suites.envelope_task()
    assert task.num_params == 784 * 128 + 128 + 128 * 128 + 128 + 1280 + 10
    values = list(sampled_suites.ENVELOPE.values())
    assert values == sorted(values, reverse=True)


# ---- Plans ----------------------------------------------------------------------------------------------------------


def test_budgets_are_counted_and_nested() -> None:
    few, more = a_plan("adam8p@2"), a_plan("adam8p@2", "adam8p@3", "adam")
    assert len(few.jobs) == 2 * 2 * 2
    assert len(more.jobs) == 2 * 2 * 4  # the two trials are among the three
    keys = [key for job in more.jobs for key in job.keys]
    assert len(set(keys)) == len(keys)
    assert {key for job in few.jobs for key in job.keys} < set(keys)


def test_scripts_have_lengths_of_their_own() -> None:
    tasks = suite("scripts")
    plan = Plan(suite="scripts", tasks=tasks, horizons=(), seeds=(0, 1), optimizers=("script", "adam"), learned=None)
    lengths = {task.name: {job.horizon for job in plan.jobs if job.task == task} for task in tasks}
    assert lengths["nanogpt"] == {360, 1080}
    assert lengths["gcn"] == {200}
    assert len(plan.jobs) == (len(tasks) + 1) * 2 * 2
    given = dataclasses.replace(plan, horizons=(7,))
    assert {job.horizon for job in given.jobs} == {7}
    assert dataclasses.replace(plan, suite="x", tasks=(WINE,)).jobs == []  # no other task has


def test_runs_of_the_learned_one_go_by_its_names() -> None:
    plan = dataclasses.replace(a_plan(*LEARNED), learned=Learned.load("default"))
    result = Result(losses=dict.fromkeys(SPLITS, 1.0), initial=dict.fromkeys(SPLITS, 2.0), diverged=False, seconds=1.0)
    assert {run.name for job in plan.jobs for run in job.rows([result])} == set(LEARNED)
    assert len({key for job in plan.jobs for key in job.keys}) == len(plan.jobs)


def test_line_up_needs_no_tuning() -> None:
    assert set(LINE_UP) <= set(TUNING_FREE)
    assert len(LINE_UP) == 11


def test_learned_without_theta() -> None:
    plan = a_plan("lopt")
    with pytest.raises(ValueError, match="lopt needs a theta"):
        assert plan.jobs[0].keys


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(OPPONENTS["prodigy"], package="no-such-distribution")
    monkeypatch.setitem(OPPONENTS, "prodigy", absent)
    assert missing_packages(["adam", "lopt", "adam-grid"]) == {}
    (reason,) = missing_packages(["adam", "prodigy"]).values()
    assert "no-such-distribution is missing; pip install" in reason


# ---- Runs -----------------------------------------------------------------------------------------------------------


def test_rows_say_what_happened(tmp_path: Path) -> None:
    plan = a_plan("sgd-tuned@2", seeds=(4,))
    runs = execute(plan.jobs, RunTable(tmp_path / "runs.csv"), workers=1)
    assert [(run.task, run.trial, run.lr) for run in runs] == [
        (task.name, trial, pytest.approx(lr))
        for task in plan.tasks
        for trial, lr in enumerate((1e-2, 1e-2 * 10 ** (-1 / 3)))
    ]
    for run, task in zip(runs, (WINE, WINE, WINE_FLOW, WINE_FLOW), strict=True):
        assert json.loads(run.settings) == {"lr": run.lr, "momentum": 0.9}
        assert (run.family, run.data, run.num_params) == (family_of(task), "wine", task.num_params)
        assert run.impl == f"torch {torch.__version__}"
        assert run.state_bytes_per_param == 4.0
        assert run.steps_per_second == pytest.approx(16 / run.seconds)
        curve = train_task(
            task,
            lambda p, n, run=run: torch.optim.SGD(p, lr=run.lr, momentum=0.9),  # type: ignore[misc]
            4,
            16,
            record_every=4,
        )
        assert (run.train_loss, run.valid_loss) == (curve.final["train"], curve.final["outer_valid"])
        assert (run.test_loss, run.inner_valid_loss) == (curve.final["test"], curve.final["inner_valid"])
        assert [(step, train) for step, _, train, _ in run.points] == list(
            zip(curve.steps, curve.losses["train"], strict=True)
        )
        assert run.points[-1][3] == run.test_loss
        assert run.points[-1][1] == pytest.approx(run.seconds, abs=1e-6)


def test_repeated_runs_have_the_same_bits(tmp_path: Path) -> None:
    names = [name for name in (*LINE_UP, "adam8p@2") if not missing_packages([name])]
    plan = a_plan(*names, seeds=(0,))
    for folder in ("one", "two"):
        execute(plan.jobs, RunTable(tmp_path / folder / "runs.csv"), workers=1)
    first, second = (untimed(tmp_path / folder / "runs.csv") for folder in ("one", "two"))
    assert first == second
    assert len(first) == 2 * (len(names) + 1)


def test_killed_and_resumed_gives_the_same_table(tmp_path: Path) -> None:
    """The process is killed without warning while runs come in."""
    arguments = ["evaluate", "--tasks", "wine-16-3", "spirals-32-32-3", "--horizons", "150", "--seeds", "0", "1"]
    arguments += ["--optimizers", "lopt", "sgd-tuned@4", "adam", "--workers", "1", "--out"]
    killed, path = tmp_path / "killed", tmp_path / "killed" / "runs.csv"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from lopt.cli import main; main(sys.argv[1:])", *arguments, str(killed)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while (not path.is_file() or path.read_bytes().count(b"\n") < 4) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes().count(b"\n") - 1
    assert 3 <= before < 24
    assert main([*arguments, str(killed)]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert untimed(path) == untimed(tmp_path / "whole" / "runs.csv")
    assert len(untimed(path)) == 24


def test_a_broken_run_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    broken = opponents.Opponent("broken", ({"lr": 1.0},), None, break_)
    monkeypatch.setitem(OPPONENTS, "broken", broken)
    with pytest.raises(RuntimeError, match=r"2 of 4 jobs failed; the first: broken on .*RuntimeError: out of luck"):
        execute(a_plan("broken", "adam", seeds=(0,)).jobs, RunTable(tmp_path / "runs.csv"), workers=1)
    assert [row["optimizer"] for row in untimed(tmp_path / "runs.csv")] == ["adam", "adam"]


@pytest.mark.parametrize(
    "task",
    [
        WINE_FLOW,
        sampled_suites.held_out("conv_pooling", "digits", 1),
        sampled_suites.held_out("mlp_vae", "digits", 2),
        sampled_suites.held_out("transformer_language_model", "topics", 0),
        sampled_suites.held_out("char_rnn_language_model", "topics", 2),
    ],
    ids=family_of,
)
def test_grid_on_other_families_is_adam_of_torch(tmp_path: Path, task: Task) -> None:
    """Losses of every split before and after some steps, of the Adams that are opponents by themselves, too."""
    plan = dataclasses.replace(a_plan("adam-grid", "adam", "adam-cosine-3e-2", seeds=(3,)), tasks=(task,))
    rows = execute(plan.jobs, RunTable(tmp_path / "runs.csv"), workers=1)
    for single, schedule in (("adam", "constant"), ("adam-cosine-3e-2", "cosine")):
        (alone,) = (row for row in rows if row.optimizer == single and not row.schedule)
        (batched,) = (row for row in rows if row.schedule == schedule and row.lr == alone.lr)
        for loss in (*LOSSES.values(), *(f"initial_{name}" for name in LOSSES.values())):
            assert getattr(batched, loss) == pytest.approx(getattr(alone, loss), rel=2e-3), loss
        assert batched.train_loss != batched.initial_train_loss
        assert (batched.diverged, batched.family) == (alone.diverged, alone.family)


class Listener(torch.optim.SGD):
    """SGD that writes down the validation losses it is told."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, lr=0.0)
        self.heard: list[float] = []

    def observe(self, valid_loss: Tensor) -> None:
        self.heard.append(float(valid_loss))

    def step(self, closure: None = None, *, loss: Tensor) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize(
    "task",
    [
        WINE,
        WINE_FLOW,
        sample_task(0, ["char_rnn_language_model"]),
        sample_task(0, ["mlp_vae"]),
        sample_task(2, ["quadratic"]),
        sample_task(10, ["losg_tasks"]),
    ],
    ids=lambda task: task.name,
)
@pytest.mark.parametrize("rows", [1, 100])
def test_validation_losses_are_of_so_many_rows(task: Task, rows: int) -> None:
    """What the optimizer is told is the mean over the minibatches that have so many rows, with noise or without."""
    made = []

    def make(params: list[Tensor], steps: int) -> torch.optim.Optimizer:
        made.append(Listener(params))
        return made[0]

    train_task(task, make, seed=1, steps=4, valid_every=2, valid_rows=rows)
    params, stream = task.init(1), task.batches(1, "inner_valid")
    size = len(next(task.batches(1, "inner_valid"))[0])
    count = task.num_batches(rows)
    assert count == (1 if "quadratic" in task.name else math.ceil(rows / size))
    for heard in made[0].heard:
        expected = [float(task.loss(params, next(stream))) for _ in range(count)]
        assert heard == pytest.approx(statistics.fmean(expected), rel=1e-5, abs=1e-6)
    assert len(made[0].heard) == 2


# ---- Tables ---------------------------------------------------------------------------------------------------------


def test_table_of_an_earlier_version_is_read_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are not run again, and keep their numbers when the file gets its new columns."""
    path = tmp_path / "runs.csv"
    plan = dataclasses.replace(a_plan("adam-grid", seeds=(0,)), tasks=(WINE,))
    whole = execute(plan.jobs, RunTable(path), workers=1)
    old = COLUMNS[:25]
    assert old[-1] == "python"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, old, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    before = path.read_text()
    with monkeypatch.context() as context:
        context.setattr(jobs, "_measure", lambda *_: pytest.fail("everything is in the table"))
        again = execute(plan.jobs, RunTable(path), workers=1)
    assert path.read_text() == before  # nothing new, nothing written
    assert [run.train_loss for run in again] == [run.train_loss for run in whole]
    assert {(run.name, run.family, run.curve) for run in again} == {
        ("adam-grid", "", ""),
        ("adam-cosine-grid", "", ""),
    }
    execute(dataclasses.replace(plan, optimizers=("adam",)).jobs, RunTable(path), workers=1)
    found = untimed(path)
    assert list(found[0]) == [name for name in COLUMNS if name not in TIMED]
    assert len(found) == len(rows) + 1
    kept = [{name: row[name] for name in old if name not in TIMED} for row in found if row["impl"] == "torch"]
    assert sorted(map(str, kept)) == sorted(str({n: row[n] for n in old if n not in TIMED}) for row in rows)


def test_suites_in_one_table_have_rows_of_their_own(tmp_path: Path) -> None:
    """A task that two suites have is run for each, and no row takes the place of the other's."""
    plans = [dataclasses.replace(a_plan("adam", seeds=(0,)), suite=name) for name in ("families", "text")]
    for plan in plans:
        assert {run.suite for run in execute(plan.jobs, RunTable(tmp_path / "runs.csv"), workers=1)} == {plan.suite}
    rows = RunTable(tmp_path / "runs.csv").rows.values()
    assert [(run.suite, run.task) for run in rows] == [(p.suite, t.name) for p in plans for t in p.tasks[::-1]]


@pytest.mark.results
@pytest.mark.parametrize(("file", "suite"), [("evaluate_small", "small"), ("families/runs", "families")])
def test_published_tables_are_read_whole(file: str, suite: str) -> None:
    """Every line of the file is a run of its own; the csv module counts them."""
    path = RESULTS / f"{file}.csv"
    with gzip.open(f"{path}.gz", "rt", newline="") as lines:
        count = sum(1 for _ in csv.DictReader(lines))
    runs = RunTable(path).rows.values()
    assert len(runs) == count > 900
    assert {run.suite for run in runs} == {suite}


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    (one, two), (three, four) = (
        execute(a_plan(name, seeds=(0,)).jobs, RunTable(tmp_path / f"{name}.csv"), workers=1)
        for name in ("adam", "nadam")
    )
    first, second = RunTable(path), RunTable(path)
    first.append([one])
    second.append([three])
    first.append([two])
    first.tidy()
    second.append([four])
    found = RunTable(path).rows
    assert set(found) == {run.key for run in (one, two, three, four)}
    assert all(isinstance(run, Run) and run == found[run.key] for run in (one, two, three, four))


def test_a_writer_waits_until_the_other_is_killed(tmp_path: Path) -> None:
    (run, _) = execute(a_plan("adam", seeds=(0,)).jobs, RunTable(tmp_path / "other.csv"), workers=1)
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        writer = threading.Thread(target=RunTable(tmp_path / "runs.csv").append, args=([run],))
        writer.start()
        writer.join(0.2)
        assert not (tmp_path / "runs.csv").exists()
        process.kill()
        writer.join(60)
    assert list(RunTable(tmp_path / "runs.csv").rows.values()) == [run]


@pytest.mark.results
def test_tables_need_nothing_of_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    spec = importlib.util.spec_from_file_location("elsewhere", str(tables.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    spec.loader.exec_module(module)
    path = RESULTS / "evaluate_small.csv"
    assert module.CsvTable(path, Run).rows == RunTable(path).rows


def test_sorting_does_not_depend_on_the_order_of_the_runs(tmp_path: Path) -> None:
    runs = execute(a_plan("adam", "nadam").jobs, RunTable(tmp_path / "runs.csv"), workers=1)
    for name, order in (("a", runs), ("b", runs[::-1])):
        for run in order:
            RunTable(tmp_path / name / "runs.csv").append([run])
        RunTable(tmp_path / name / "runs.csv").tidy()
    assert (tmp_path / "a/runs.csv").read_text() == (tmp_path / "b/runs.csv").read_text()
    assert table.LOSSES == {
        "train": "train_loss",
        "outer_valid": "valid_loss",
        "test": "test_loss",
        "inner_valid": "inner_valid_loss",
    }


def test_command_compares_with_opponents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Budgets are named, a missing task is skipped with its remedy, and what is shown follows from the rows."""
    options = ["--suite", "families", "--tasks", "maf-wine-4x46", "diabetes-16-16-1", "mlp-fashion-mnist-784-29-75-10"]
    options += ["--optimizers", "lopt", "sgd-tuned@2", "--horizons", "8", "--seeds", "1", "--workers", "1"]
    assert main(["evaluate", *options, "--out", str(tmp_path), "--json", str(tmp_path / "numbers.json")]) == 0
    shown = capsys.readouterr().out
    assert "Skipped mlp-fashion-mnist-784-29-75-10: data set fashion-mnist: not found on this machine" in shown
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers["runs"]) == 2 * 3
    assert list(numbers["tasks"]) == ["maf-wine-4x46", "diabetes-16-16-1"]
    logs = []
    for task in numbers["tasks"]:
        here = [run for run in numbers["runs"] if run["task"] == task]
        (ours,) = (run for run in here if run["optimizer"] == "lopt")
        other = min((run for run in here if run["optimizer"] != "lopt"), key=lambda run: run["valid_loss"])
        floor = 0.01 * ours["initial_train_loss"]
        logs.append(math.log((ours["train_loss"] + floor) / (other["train_loss"] + floor)))
    (line,) = (line for line in shown.splitlines() if line.startswith("sgd-tuned@2"))
    assert line.split()[1] == f"{math.exp(sum(logs) / 2):.2f}"
