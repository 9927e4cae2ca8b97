"""The held-out suite, the runs of an evaluation, its scores, and ``lopt evaluate`` from end to end."""

import csv
import dataclasses
import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopt import LearnedOptimizer, kernels, provenance
from lopt.cli import main
from lopt.evaluation import jobs
from lopt.evaluation.adam_grid import GRID, LRS, adam_results
from lopt.evaluation.comparison import Comparison, ratio
from lopt.evaluation.jobs import Learned, Plan, execute
from lopt.evaluation.runs import limit, result, train_task
from lopt.evaluation.scores import REFERENCES, Reference, Score, score
from lopt.evaluation.suites import suite
from lopt.evaluation.table import Run, RunTable
from lopt.rule import Theta
from lopt.tasks import datasets, held_out
from lopt.tasks.adam import AdamConfig, train_adam
from lopt.tasks.held_out import HeldOutTask, load
from lopt.tasks.task import SPLITS

WINE = HeldOutTask(data="wine", sizes=(13, 6, 3), batch_size=16)
FRIEDMAN = HeldOutTask(data="friedman1", sizes=(10, 6, 1), activation="tanh")
TINY = (WINE, FRIEDMAN)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run writes into the repository, and Fashion-MNIST is missing even where it is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "no-such-folder")


@pytest.fixture
def plan() -> Plan:
    """Two tasks, two seeds, 20 steps, both hints."""
    theta = Theta.init_adam("compact")
    learned = Learned(theta=theta, theta_sha256="t", code_sha256="c", impl="cpu")
    names = ("adam-grid", "lopt", "lopt-untold")
    return Plan(suite="small", tasks=TINY, horizons=(20,), seeds=(0, 1), optimizers=names, learned=learned)


# ---- The suite ------------------------------------------------------------------------------------------------------


def available() -> list[HeldOutTask]:
    return [task for task in suite("small") if task.unavailable is None]


def test_suite_is_thirteen_tasks_and_fashion_mnist() -> None:
    names = [task.name for task in suite("small")]
    assert len(set(names)) == len(names) == 16
    assert len(available()) == 13
    missing = [task for task in suite("small") if task.unavailable is not None]
    assert {task.data for task in missing} == {"fashion-mnist", "fashion-mnist-7x7"}
    assert all("apt-get install dataset-fashion-mnist" in str(task.unavailable) for task in missing)


@pytest.mark.parametrize("task", available(), ids=lambda task: task.name)
def test_task_fits_its_data(task: HeldOutTask) -> None:
    rows = task.splits["train"]
    loss = task.loss(task.init(0), rows)
    assert rows.inputs.shape[1] == task.sizes[0]
    assert math.isfinite(loss)
    if rows.targets.is_floating_point():
        assert rows.targets.shape[1] == task.sizes[-1]
        assert rows.targets.var() == pytest.approx(1.0, abs=0.01)
    else:
        assert int(rows.targets.max()) + 1 == task.sizes[-1]
        assert loss == pytest.approx(math.log(task.sizes[-1]), abs=0.25)


@pytest.mark.parametrize(("data", "rows"), [("digits", 1797), ("breast-cancer", 569), ("wine", 178), ("diabetes", 442)])
def test_splits_have_the_promised_shares_and_are_deterministic(data: held_out.DataName, rows: int) -> None:
    first = load(data)
    assert [len(first[name].targets) for name in SPLITS] == pytest.approx(
        [0.6 * rows, 0.1 * rows, 0.1 * rows, 0.2 * rows], abs=1
    )
    assert sum(len(split.targets) for split in first.values()) == rows
    load.cache_clear()
    for name, split in load(data).items():
        assert torch.equal(split.inputs, first[name].inputs)
        assert torch.equal(split.targets, first[name].targets)


def test_splits_are_disjoint() -> None:
    splits = held_out._split(torch.arange(178), torch.arange(178))
    rows = torch.cat([splits[name].inputs for name in SPLITS])
    assert torch.equal(rows, torch.arange(178))
    # in real data: no input row of one split is in another (these sets have no duplicate rows)
    for data in ("breast-cancer", "wine", "diabetes", "spirals", "friedman1"):
        rows = torch.cat([split.inputs for split in load(data).values()])  # type: ignore[arg-type]
        assert len(rows.unique(dim=0)) == len(rows)


def test_tables_are_standardised_by_their_training_rows() -> None:
    from sklearn.datasets import load_wine

    order = np.random.RandomState(0).permutation(178)
    values = load_wine().data[order]
    expected = (values - values[:107].mean(0)) / values[:107].std(0, ddof=1)
    inputs = torch.cat([load("wine")[name].inputs for name in SPLITS])
    torch.testing.assert_close(inputs, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(load("wine")["test"].targets, torch.tensor(load_wine().target[order][142:]))


def test_spirals_and_friedman_follow_their_formulas() -> None:
    points, arms = held_out._spirals()
    radius = np.hypot(points[:, 0], points[:, 1])
    angle = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) - arms / 3 - radius
    distance = np.abs(angle - np.round(angle)) * 2 * np.pi * radius
    assert np.sqrt(np.mean(distance**2)) < 0.3 * 2 * np.pi * 0.03 * 4  # noise .03 only, arms are 1/3 of a turn apart
    x, y = held_out._friedman1()
    noise = y - (10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4])
    assert noise.mean() == pytest.approx(0.0, abs=0.1)
    assert noise.std() == pytest.approx(1.0, abs=0.05)


def test_character_windows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = held_out._windows("Ab\n\n c" * 10)  # "ab cab cab c...": period "ab c", of 4 characters
    rows = torch.cat([splits[name].inputs for name in SPLITS]).view(-1, 3, 28)
    targets = torch.cat([splits[name].targets for name in SPLITS])
    text = [0, 1, 26, 2] * 10
    assert rows.argmax(2).tolist() == [text[i : i + 3] for i in range(37)]
    assert targets.tolist() == text[3:40]
    assert torch.equal(rows.sum(2), torch.ones(37, 3))
    assert held_out._windows("?!" * 20)["train"].targets.unique().tolist() == [27]


def test_minibatches_are_epochs_and_can_start_anywhere() -> None:
    batches = list(itertools.islice(WINE.batches(3, "train"), 13))  # 107 rows: 6 batches of 16 an epoch
    for epoch in (batches[:6], batches[6:12]):
        inputs = torch.cat([batch.inputs for batch in epoch])
        assert len(inputs.unique(dim=0)) == 96
    for start in (1, 6, 11, 12):
        again = next(WINE.batches(3, "train", start))
        assert torch.equal(again.inputs, batches[start].inputs)
        assert torch.equal(again.targets, batches[start].targets)
    assert not torch.equal(next(WINE.batches(4, "train")).inputs, batches[0].inputs)
    assert len(next(HeldOutTask(data="wine", sizes=(13, 3), batch_size=64).batches(0, "inner_valid")).inputs) == 18


def test_init_is_that_of_torch() -> None:
    params = HeldOutTask(data="digits", sizes=(64, 400, 10)).init(0)
    assert {name: tuple(value.shape) for name, value in params.items()} == {
        "w0": (64, 400),
        "b0": (400,),
        "w1": (400, 10),
        "b1": (10,),
    }
    assert float(params["w0"].abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(params["w0"].std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
    assert float(params["b1"].abs().max()) < 1 / 20


def test_fingerprint_is_that_of_data_and_task() -> None:
    same = dataclasses.replace(WINE, folder=Path("elsewhere"))
    others = [
        dataclasses.replace(WINE, **change)
        for change in ({"activation": "tanh"}, {"sizes": (13, 7, 3)}, {"batch_size": 8})
    ]
    assert same.fingerprint == WINE.fingerprint
    assert len({task.fingerprint for task in (WINE, *others)}) == 4
    assert {task.data_sha256 for task in others} == {WINE.data_sha256} != {FRIEDMAN.data_sha256}


def test_fashion_mnist_from_idx_files(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for (images, labels), rows in zip(datasets.IDX_FILES, (36, 12), strict=True):
        pixels = random.randint(256, size=(rows, 28, 28)).astype(np.uint8)
        (tmp_path / images).write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", *pixels.shape) + pixels.tobytes())
        (tmp_path / labels).write_bytes(
            b"\0\0\x08\x01" + struct.pack(">I", rows) + bytes(range(10)) * (rows // 10) + bytes(rows % 10)
        )
    tasks = {task.name: task for task in suite("small", tmp_path) if task.data.startswith("fashion")}
    assert all(task.unavailable is None for task in tasks.values())
    full, pooled = (tasks[name].splits["train"].inputs for name in ("fashion-mnist-32-10", "fashion-mnist-7x7-32-10"))
    assert full.shape == (30, 784)
    assert float(full.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(full.std()) == pytest.approx(1.0, abs=1e-5)
    squares = full.view(30, 7, 4, 7, 4).mean(dim=(2, 4)).view(30, 49)
    torch.testing.assert_close(pooled, (squares - squares.mean()) / squares.std(), rtol=1e-4, atol=1e-4)


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TINY, ids=lambda task: task.name)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_batched_adam_is_adam_of_torch(task: HeldOutTask, schedule: Any) -> None:
    steps = 60
    configs = [AdamConfig(lr, schedule, decay) for lr, decay in zip(LRS, itertools.cycle((0.3, 0.0)), strict=False)]
    found, shapes = train_adam(task, 5, steps, [*configs, AdamConfig(1e-3)])
    for row, config in zip(found[:-1], configs, strict=True):
        params = {name: value.requires_grad_() for name, value in task.init(5).items()}
        optimizer = torch.optim.AdamW(params.values(), lr=config.lr, weight_decay=config.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        for batch in itertools.islice(task.batches(5, "train"), steps):
            optimizer.zero_grad()
            task.loss(params, batch).backward()
            optimizer.step()
            if schedule == "cosine":
                scheduler.step()
        expected = torch.cat([value.detach().reshape(-1) for value in params.values()])
        # Gradients of a batched product differ by rounding; Adam can turn that into a part of its step.
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-3 * config.lr + 1e-6)
    assert sum(shape.numel() for shape in shapes.values()) == found.shape[1]


def test_first_adam_step_has_the_size_of_the_learning_rate() -> None:
    configs = [AdamConfig(0.25), AdamConfig(0.5, "cosine")]
    found, _ = train_adam(FRIEDMAN, 0, 1, configs)
    start = torch.cat([value.reshape(-1) for value in FRIEDMAN.init(0).values()])
    torch.testing.assert_close((found - start).abs(), torch.tensor([[0.25], [0.5]]).expand_as(found), rtol=1e-3, atol=0)


def test_results_are_losses_on_whole_splits() -> None:
    theta = Theta.init_adam("compact")
    curve = train_task(WINE, lambda p, n: LearnedOptimizer(p, theta, total_steps=n), 2, 15)
    found = result(curve)
    for name in SPLITS:
        assert found.losses[name] == pytest.approx(float(WINE.loss(curve.params, WINE.splits[name])), rel=1e-5)
        assert found.initial[name] == pytest.approx(float(WINE.loss(WINE.init(2), WINE.splits[name])), rel=1e-5)
    assert found.losses["train"] < found.initial["train"]
    assert not found.diverged
    grid = adam_results(WINE, 2, 15)
    assert len(grid) == len(GRID) == 2 * len(LRS)
    assert all(one.initial == pytest.approx(found.initial, rel=1e-6) for one in grid)


def test_learned_run_is_a_loop_that_tells_both_losses() -> None:
    theta = Theta.init_adam("compact")
    params = {name: value.requires_grad_() for name, value in FRIEDMAN.init(0).items()}
    optimizer = LearnedOptimizer(list(params.values()), theta, total_steps=25, impl="reference")
    train, valid = FRIEDMAN.batches(0, "train"), FRIEDMAN.batches(0, "inner_valid")
    for step in range(25):
        if step in (0, 10, 20):
            optimizer.observe(valid_loss=FRIEDMAN.loss(params, next(valid)).detach())
        loss = FRIEDMAN.loss(params, next(train))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    found = train_task(
        FRIEDMAN, lambda p, n: LearnedOptimizer(p, theta, total_steps=n, impl="reference"), 0, 25, record_every=7
    ).params
    for name, value in params.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("losses", "counted", "diverged"),
    [
        ((1.0, 2.0, 30.0), (1.0, 2.0, 20.0), False),  # overfitting is not divergence
        ((20.0, 2.0, 3.0), (20.0, 2.0, 3.0), False),
        ((20.5, 2.0, 3.0), (20.0, 2.0, 3.0), True),
        ((1.0, math.inf, 3.0), (1.0, 20.0, 3.0), True),
        ((math.nan, math.nan, math.nan), (20.0, 20.0, 20.0), True),
    ],
)
def test_divergence_counts_as_ten_initial_losses(losses: Any, counted: Any, diverged: bool) -> None:
    assert limit(losses, (2.0, 2.0, 2.0)) == (counted, diverged)


def scored(runs: list[Run], loss: Any, choice: Any) -> Score:
    found = score(runs, 7, False, loss, Reference("adam", "constant", choice))
    assert found is not None
    return found


# ---- Scores ---------------------------------------------------------------------------------------------------------


def a_run(task: str, seed: int, losses: tuple[float, float, float], **changes: Any) -> Run:
    """A run from the initial loss 10, with losses on train, valid and test."""
    text = dict.fromkeys(
        ("impl", "task_sha256", "theta_sha256", "code_sha256", "commit", "lopt", "torch", "numpy", "python"), ""
    )
    names = ("train_loss", "valid_loss", "test_loss")
    values: dict[str, Any] = dict(zip(names, losses, strict=True)) | {f"initial_{name}": 10.0 for name in names}
    values |= {
        "suite": "small",
        "task": task,
        "seed": seed,
        "horizon": 7,
        "hint": False,
        "diverged": False,
        "seconds": 0.0,
    }
    return Run(**{**text, **values, "optimizer": "adam", "schedule": "constant", "lr": 1e-3, **changes})


def learned_run(task: str, seed: int, losses: tuple[float, float, float], hint: bool = False) -> Run:
    return a_run(task, seed, losses, optimizer="lopt", schedule="learned", lr=1.0, hint=hint)


RUNS = [
    # task a: 1e-3 trains best, 1e-2 is best on valid, 1e-1 is best on test
    a_run("a", 0, (0.9, 5.0, 3.9)),
    a_run("a", 1, (1.1, 5.0, 1.9)),
    a_run("a", 0, (1.9, 4.0, 1.9), lr=1e-2),
    a_run("a", 1, (1.9, 4.0, 1.9), lr=1e-2),
    a_run("a", 0, (2.9, 6.0, 0.9), lr=1e-1),
    a_run("a", 1, (2.9, 6.0, 0.9), lr=1e-1),
    a_run("a", 0, (0.1, 0.1, 0.1), schedule="cosine"),
    a_run("a", 1, (0.1, 0.1, 0.1), schedule="cosine"),
    # task b: 1e-2 is best everywhere
    a_run("b", 0, (4.0, 4.0, 4.0)),
    a_run("b", 1, (4.0, 4.0, 4.0)),
    a_run("b", 0, (1.9, 1.9, 1.9), lr=1e-2),
    a_run("b", 1, (1.9, 1.9, 1.9), lr=1e-2),
    a_run("b", 0, (5.0, 5.0, 5.0), lr=1e-1),
    a_run("b", 1, (5.0, 5.0, 5.0), lr=1e-1),
    learned_run("a", 0, (0.4, 0.0, 3.9)),
    learned_run("a", 1, (0.6, 0.0, 1.9)),
    learned_run("b", 0, (3.9, 0.0, 1.9)),
    learned_run("b", 1, (3.9, 0.0, 1.9)),
    # neither the other hint nor another horizon counts
    *(learned_run(task, seed, (9.0, 9.0, 9.0), hint=True) for task in "ab" for seed in (0, 1)),
    a_run("a", 0, (0.0, 0.0, 0.0), horizon=8),
]


def test_ratio_by_hand() -> None:
    assert ratio(0.0, 0.0, 5.0) == 1.0
    assert ratio(1.9, 0.9, 10.0) == pytest.approx(2.0)
    assert ratio(0.0, 0.1, 10.0) == pytest.approx(0.5)


def test_summary_by_hand() -> None:
    ratios = {"a": 1.0, "b": 1.02, "c": 1.021, "d": 0.5}
    found = Comparison(name="x", other="y", horizon=7, measure="train", per="step", ratios=ratios, losses={})
    assert found.ratio == pytest.approx((1.0 * 1.02 * 1.021 * 0.5) ** 0.25)
    assert (found.no_worse, found.worst) == (0.75, "c")


@pytest.mark.parametrize(
    ("loss", "choice", "expected"),
    [
        ("train_loss", "train_loss", {"a": 0.6 / 1.1, "b": 2.0}),
        ("train_loss", 1e-3, {"a": 0.6 / 1.1, "b": 4.0 / 4.1}),
        ("test_loss", "test_loss", {"a": 3.0 / 1.0, "b": 1.0}),
        ("test_loss", "valid_loss", {"a": 3.0 / 2.0, "b": 1.0}),
    ],
)
def test_score_by_hand(loss: Any, choice: Any, expected: dict[str, float]) -> None:
    found = scored(RUNS, loss, choice)
    assert found.ratios == pytest.approx(expected)
    assert found.summary.ratio == pytest.approx(math.sqrt(expected["a"] * expected["b"]))
    assert found.summary.worst == max(expected, key=lambda task: expected[task])
    assert found.summary.no_worse == sum(value <= 1.02 for value in expected.values()) / 2


def test_spread_over_seeds_by_hand() -> None:
    found = scored(RUNS, "train_loss", "train_loss")
    means = [math.sqrt(0.5 / 1.0 * 2.0), math.sqrt(0.7 / 1.2 * 2.0)]
    assert found.spread == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    one_seed = [run for run in RUNS if run.seed == 0]
    assert math.isnan(scored(one_seed, "train_loss", "train_loss").spread)


# ---- Evaluations ----------------------------------------------------------------------------------------------------


def without_time(runs: list[Run]) -> list[Run]:
    return [dataclasses.replace(run, seconds=0.0, steps_per_second=0.0, times="") for run in runs]


def test_workers_and_cache_change_no_result(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = execute(plan.jobs, RunTable(tmp_path / "one.csv"), workers=1)
    assert len(alone) == 2 * 2 * (len(GRID) + 2)
    assert without_time(execute(plan.jobs, RunTable(tmp_path / "two.csv"), workers=2)) == without_time(alone)

    monkeypatch.setattr(jobs, "_measure", lambda *_: pytest.fail("everything is in the table"))
    assert execute(plan.jobs, RunTable(tmp_path / "one.csv"), workers=1) == alone


def test_another_theta_costs_only_its_own_runs(plan: Plan, tmp_path: Path) -> None:
    before = execute(plan.jobs, RunTable(tmp_path / "runs.csv"), workers=1)
    theta = plan.learned.theta.with_spec(step_multiplier=0.01)
    other = dataclasses.replace(plan, learned=dataclasses.replace(plan.learned, theta=theta, theta_sha256="u"))
    counts: list[tuple[int, int]] = []
    after = execute(other.jobs, RunTable(tmp_path / "runs.csv"), 1, lambda done, total: counts.append((done, total)))
    assert counts == [(done, 8) for done in range(9)]  # 2 tasks, 2 seeds, with and without the hint
    for old, new in zip(before, after, strict=True):
        assert (old == new) == (old.optimizer == "adam")


def test_killed_evaluation_goes_on(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    whole = execute(plan.jobs, RunTable(path), workers=1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + lines[20][:100])  # killed within a row
    todo: list[int] = []
    again = execute(plan.jobs, RunTable(path), 1, lambda _, total: todo.append(total))
    assert without_time(again) == without_time(whole)
    assert 0 < todo[0] < len(plan.jobs)
    assert execute(plan.jobs, RunTable(path), 1, lambda _, total: todo.append(total)) == again
    assert todo[-1] == 0


def test_table_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"runs\.csv: expected the columns suite, task, .*--out"):
        RunTable(tmp_path / "runs.csv")


def evaluate(*options: str) -> list[str]:
    return ["evaluate", "--horizons", "10", "--seeds", "0", "--workers", "1", "--tasks", *options]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *evaluate("wine-16-3", "friedman1-32-1", "fashion-mnist-32-10"),
        "--per-task",
        "--hint",
        "without",
        "--json",
        "numbers.json",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "Skipped fashion-mnist-32-10: data set fashion-mnist" in shown
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers["tasks"]) == ["wine-16-3", "friedman1-32-1"]
    assert list(numbers["skipped"]) == ["fashion-mnist-32-10"]
    with (tmp_path / "runs/evaluate/runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(numbers["runs"]) == 2 * (len(GRID) + 1)

    def best(task: str, schedule: str) -> dict[str, str]:
        same = [row for row in rows if row["task"] == task and row["schedule"] == schedule]
        return min(same, key=lambda row: float(row["train_loss"]))

    product = 1.0
    for task in numbers["tasks"]:
        learned, adam = best(task, "learned"), best(task, "constant")
        floor = 0.01 * float(adam["initial_train_loss"])
        product *= (float(learned["train_loss"]) + floor) / (float(adam["train_loss"]) + floor)
    tuned = REFERENCES["train_loss"][0].name
    (found,) = (
        found["summary"]["ratio"]
        for found in numbers["scores"]["all"]
        if (found["loss"], found["reference"]) == ("train_loss", tuned)
    )
    assert found == pytest.approx(math.sqrt(product))
    assert f"{found:.3f}" in shown

    assert main(arguments) == 0  # now from the table
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert again["scores"] == numbers["scores"]
    assert again["runs"] == numbers["runs"]


def test_command_without_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the learned optimizer runs; shown are final losses relative to the initial ones."""
    assert main([*evaluate("wine-16-3"), "--no-references", "--json", "numbers.json"]) == 0
    shown = capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {run["optimizer"] for run in numbers["runs"]} == {"lopt"}
    assert numbers["scores"] == {}
    for run in numbers["runs"]:
        assert f"{run['test_loss'] / run['initial_test_loss']:.4f}" in shown
    assert "Diverged, learned optimizer without hint: 0 of 1 runs" in shown


def test_code_is_known_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments and docstrings are not code; the sources that were compiled are, not the file they were compiled to."""
    text = '"""About."""\nX = 1\n\n\ndef f(x: int) -> int:\n    """Twice."""\n    return 2 * x\n'
    monkeypatch.setattr(provenance.lopt, "__file__", str(tmp_path / "__init__.py"))

    (tmp_path / "rule").mkdir()
    (tmp_path / "kernels").mkdir()

    def code(text: str, module: str = "rule/module.py") -> str:
        (tmp_path / module).write_text(text)
        return provenance.code_sha256()

    same, other = code(text), code(text.replace("2 * x", "3 * x"))
    assert len({same, other, code(text.replace("X = 1", "X = 2")), code(text.replace("int:", "float:"))}) == 4
    assert code(text.replace("Twice.", "Two times.").replace("X = 1", "X = 1  # one")) == same
    (tmp_path / "cli.py").write_text("Y = 1")
    assert code(text) == same
    assert len({same, code(text, "kernels/module.py"), code(text, "optimizer.py")}) == 3
    (tmp_path / "kernels" / "module.py").unlink()
    (tmp_path / "optimizer.py").unlink()
    monkeypatch.setattr(kernels, "source_sha256", lambda: "another")
    assert code(text) != same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (evaluate("no-such-task"), "no-such-task not in suite small, which has digits-32-10"),
        (evaluate("fashion-mnist-32-10"), "suite small: no task is available; data set fashion-mnist"),
        (evaluate("wine-16-3", "--data", "nowhere"), "nowhere is not a folder"),
        (["evaluate", "--horizons", "0"], "horizons: expected numbers from 1 on"),
        (["evaluate", "--seeds", "1", "1"], "seeds: expected numbers from 0 on"),
        (["evaluate", "--optimizers", "lopt", "--hint", "without"], "hint: expected none beside optimizers"),
        (["evaluate", "--theta", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_explained(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(options)
    except SystemExit as exit_:  # from the parser
        code = exit_.code
    assert code == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err


def test_missing_scikit_learn_skips_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    reasons = {task.name: task.unavailable for task in suite("small")}
    load.cache_clear()
    assert {name for name, reason in reasons.items() if reason is None} == {
        "spirals-32-32-3",
        "friedman1-32-1",
        "characters-32-28",
    }
    assert "scikit-learn is missing; pip install scikit-learn" in str(reasons["wine-16-3"])
