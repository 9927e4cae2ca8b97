"""lopt/experiments: closed forms where there are some, and that stopping, repeating and resuming change nothing."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from kept_texts import assert_same_but_for_rounding
from rich.console import Console
from torch.nn import functional

from lopt import LearnedOptimizer, Theta, cli
from lopt.commands.experiment import Name
from lopt.evaluation.jobs import Job, Learned, TaskJob, execute
from lopt.evaluation.opponents import FACTORS
from lopt.evaluation.runs import RECORDED, Result, train_task
from lopt.evaluation.table import LEARNED, TIMED, Run, RunTable
from lopt.experiments import EXPERIMENTS, implicit_regularization, normalised_table, self_training
from lopt.experiments.axes import FewRows
from lopt.experiments.implicit_regularization import Valley
from lopt.experiments.rows import best, relative, select, values
from lopt.experiments.self_training import MetaRun
from lopt.experiments.setting import Setting
from lopt.meta import checkpoint, es, outer, pairs, trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import Serial
from lopt.meta.metrics import read_metrics
from lopt.meta.pairs import Shared
from lopt.rule import unflatten
from lopt.tasks import datasets
from lopt.tasks.held_out import HeldOutTask
from lopt.tasks.resnet import Drawings, ResNet
from lopt.tasks.task import SplitName

#: A meta-training whose outer optimizer is learned; only the tensors of the second phase's group move in it.
SELF = MetaTrainConfig(
    inner_steps=360,
    phases=(Phase(0.5, (10, 10), "all"), Phase(0.5, (10, 10), "mlp")),
    init="random",
    outer="default",
    tasks=("mixture",),
    pairs=3,
    gradient_clip=0.2,
    average=0.0,
    validation_tasks=1,
    validation_horizons=(10,),
)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


class KilledAt(Serial):
    """Ends in the middle of an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def map(self, function: Any, shared: Any, items: Any) -> Any:
        if shared.iteration == self.iteration:
            raise KeyboardInterrupt
        return super().map(function, shared, items)


def meta_train(out: Path, resume: bool = False, executor: Serial | None = None) -> None:
    trainer.run(SELF, out, resume=resume, executor=executor, console=Console(file=io.StringIO()))


def test_a_learned_outer_optimizer_is_one_stepped_by_hand(tmp_path: Path) -> None:
    """Six iterations: gradients clipped in z, divided by the scale, the mean loss ratio given as training loss."""
    meta_train(tmp_path)
    spec = Theta.init("compact").spec
    params = {name: value.clone().requires_grad_() for name, value in Theta.init("compact", 0).tensors.items()}
    optimizer = LearnedOptimizer([{"params": list(params.values()), "transposed": True}])
    before = {}
    for iteration in range(6):
        phase = iteration // 3
        scale = outer.scales(spec, "prior", SELF.phases[phase].groups)
        theta = torch.cat([value.detach().reshape(-1) for value in params.values()])
        shared = Shared(SELF, spec, theta, scale, phase, 3 * phase, iteration)
        results = [pairs.unroll_group(shared, (pair, None)) for pair in range(3)]
        eps = torch.stack([pairs.perturbation(SELF, iteration, pair, len(theta)) for pair in range(3)])
        delta = torch.tensor([result.deltas[0] for result in results])
        gradient = (es.es_gradient(eps, delta, SELF.sigma) * (scale > 0)).clamp(-0.2, 0.2)
        for (name, value), grad, unit in zip(
            params.items(), unflatten(spec, gradient).values(), unflatten(spec, scale).values(), strict=True
        ):
            before[name] = value.detach().clone()
            value.grad = grad / unit if unit.any() else None
        loss = math.exp(sum(result.meta_loss for result in results) / 3)
        optimizer.step(loss=loss)
    expected = torch.cat([value.detach().reshape(-1) for value in params.values()])
    assert torch.equal(checkpoint.load(tmp_path / "checkpoint.pt")[2].theta, expected)
    moved = {name for name, value in params.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in params if name.startswith(outer.MLP)}


def test_a_learned_outer_optimizer_resumes_to_the_bit(tmp_path: Path) -> None:
    meta_train(tmp_path / "whole")
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            meta_train(tmp_path / f"{stop}", executor=KilledAt(stop))
        meta_train(tmp_path / f"{stop}", resume=True)
        ends = [checkpoint.load(tmp_path / name / "checkpoint.pt")[2].theta for name in ("whole", f"{stop}")]
        assert torch.equal(*ends)


# ---- Runs ------------------------------------------------------------------------------------------------------------


LEARNED_DEFAULT = Learned.load("default")


def learned_if(optimizer: str) -> Learned | None:
    return LEARNED_DEFAULT if optimizer in LEARNED else None


def valley(optimizer: str, trial: int = 0, steps: int = 60, start: tuple[float, float] = (1.0, 0.25)) -> Valley:
    fields: dict[str, Any] = {"optimizer": optimizer, "trials": (trial,), "learned": learned_if(optimizer)}
    return Valley(suite="valleys", **fields, horizon=steps, seed=0, start=start)


def result_of(job: Job) -> Result:
    """Of a job of one run."""
    (found,) = job.measure()
    return found


def row_of(job: Job, result: Result) -> Run:
    (row,) = job.rows([result])
    return row


def test_sgd_in_the_valley_keeps_the_sum_and_is_the_recursion() -> None:
    """With d = x - y the momentum v of x is .9 v + d and that of y is -v: x + y stays."""
    result = result_of(valley("sgd-tuned"))
    sums = [x + y for x, y in zip(result.curve["x"], result.curve["y"], strict=True)]
    assert max(abs(value - 1.25) for value in sums) < 1e-6
    x, y, v = 1.0, 0.25, 0.0
    for _ in range(60):
        v = 0.9 * v + (x - y)
        x, y = x - 0.01 * v, y + 0.01 * v
    assert (result.curve["x"][-1], result.curve["y"][-1]) == pytest.approx((x, y), abs=1e-5)
    assert result.initial["train"] == 0.75**2 / 2
    assert result.losses["test"] == pytest.approx((x - y) ** 2 / 2, abs=1e-5)


def test_adam_in_the_valley_lands_where_float64_does() -> None:
    trial = FACTORS.index(10.0)
    result = result_of(valley("adam-tuned", trial, steps=400))
    x, y, m, s = 1.0, 0.25, 0.0, 0.0
    for t in range(1, 401):
        d = x - y
        m, s = 0.9 * m + 0.1 * d, 0.999 * s + 0.001 * d * d
        change = 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(s / (1 - 0.999**t)) + 1e-8)
        x, y = x - change, y + change
    assert (result.curve["x"][-1], result.curve["y"][-1]) == pytest.approx((x, y), abs=1e-5)
    nearest, landed, off = implicit_regularization.landing(row_of(valley("adam-tuned", trial), result))
    assert (nearest, landed) == pytest.approx((1.25 / math.sqrt(2),) * 2, abs=1e-5)
    assert off == pytest.approx(abs(x - y) / math.sqrt(2), abs=1e-5)


def test_the_learned_optimizer_in_the_valley_is_one_stepped_by_hand() -> None:
    result = result_of(valley("lopt"))
    point = torch.tensor([1.0, 0.25], requires_grad=True)
    optimizer = LearnedOptimizer([point], total_steps=60)
    for step in range(60):
        loss = (point[0] - point[1]) ** 2 / 2
        (point.grad,) = torch.autograd.grad(loss, point)
        if step % 10 == 0:
            optimizer.observe(valid_loss=loss)
        optimizer.step(loss=loss)
    assert [result.curve[name][-1] for name in ("x", "y")] == point.tolist()


WINE = HeldOutTask(data="wine", sizes=(13, 4, 3), batch_size=16)


def wine(optimizer: str, trial: int = 0, **fields: Any) -> TaskJob:
    fields = {"horizon": 20, "seed": 0, "points": 0, "task": WINE, "trials": (trial,), **fields}
    return TaskJob(suite="wines", name="wine", optimizer=optimizer, learned=learned_if(optimizer), **fields)


def test_a_task_run_records_the_losses_of_the_training_loop() -> None:
    row = row_of(run := wine("adam", points=4), result_of(run))
    params = {name: value.requires_grad_() for name, value in WINE.init(0).items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-3)
    batches = WINE.batches(0, "train")
    for _ in range(20):
        optimizer.zero_grad()
        WINE.loss(params, next(batches)).backward()
        optimizer.step()
    for split, column in (("train", "train"), ("outer_valid", "valid"), ("test", "test")):
        final, initial = (float(WINE.loss(at, WINE.splits[split]).detach()) for at in (params, WINE.init(0)))
        assert getattr(row, f"{column}_loss") == pytest.approx(final, rel=1e-6)
        assert getattr(row, f"initial_{column}_loss") == pytest.approx(initial, rel=1e-6)
        if column != "valid":
            assert row.along(split)[::4] == pytest.approx([initial, final], rel=1e-5)
    assert row.along("step") == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("name", ["adam-tuned", "adamw-cosine-tuned"])
def test_adams_of_a_batch_are_those_by_themselves(name: str) -> None:
    trials = 0, FACTORS.index(10.0)
    batch = wine(name, trials=trials)
    for trial, found, row in zip(trials, batch.measure(), batch.rows(batch.measure()), strict=True):
        alone = wine(name, trial)
        expected = result_of(alone)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert found.initial == pytest.approx(expected.initial, rel=1e-6)
        assert (found.diverged, found.curve) == (False, {})
        assert (row.key,) == tuple(alone.keys)
        assert (row.trial, row.lr) == (trial, pytest.approx((1e-3, 1e-2)[trial > 0]))


def test_which_adams_are_a_batch() -> None:
    """Those of one optimizer, place and seed, where losses along the run are not asked for and models are small."""
    large = HeldOutTask(data="wine", sizes=(13, 6000, 3), batch_size=16)
    setting, optimizers = Setting(seeds=(0, 1)), [("lopt", (0,)), ("adam-tuned", (3, 5)), ("adam", (0,))]
    for task, points, expected in ((WINE, 0, [1, 2, 1]), (WINE, 2, [1, 1, 1, 1]), (large, 0, [1, 1, 1, 1])):
        found = setting.jobs("x", [("wine", task, 0.0, 20)], optimizers, points)
        assert [len(job.trials) for job in found] == [size for size in expected for _ in (0, 1)]
        assert [job.seed for job in found] == [0, 1] * len(expected)
    keys = [key for job in setting.jobs("x", [("wine", WINE, 0.0, 20)], optimizers) for key in job.keys]
    assert len(set(keys)) == len(keys) == 8


def test_a_blind_optimizer_is_one_that_was_never_told() -> None:
    losses = [result_of(run).losses for run in (wine("lopt"), wine("lopt-blind"))]
    assert losses[0] != losses[1]
    params = {name: value.requires_grad_() for name, value in WINE.init(0).items()}
    optimizer = LearnedOptimizer([WINE.group(list(params.values()))], total_steps=20)
    batches = WINE.batches(0, "train")
    for _ in range(20):
        loss = WINE.loss(params, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    assert losses[1]["train"] == pytest.approx(float(WINE.loss(params, WINE.splits["train"]).detach()), rel=1e-6)


def test_few_rows_are_the_first_of_the_training_split() -> None:
    few = FewRows(data="wine", sizes=(13, 4, 3), batch_size=16, rows=20)
    assert torch.equal(few.splits["train"].inputs, WINE.splits["train"].inputs[:20])
    assert torch.equal(few.splits["test"].inputs, WINE.splits["test"].inputs)
    seen = torch.cat([batch.inputs for batch in itertools.islice(few.batches(0, "train"), 30)])
    rows = {tuple(row.tolist()) for row in few.splits["train"].inputs}
    assert {tuple(row.tolist()) for row in seen} == rows
    assert wine("adam").keys != wine("adam", task=few).keys


def test_resnet_is_the_network_of_torch_modules() -> None:
    """The same weights in torch.nn modules, batch normalisation in training mode; 14 layers have weights."""
    blocks = ((16, 4, 1), (16, 4, 2), (16, 8, 1), (24, 8, 2))
    task = ResNet(blocks=blocks, stem=8, data=Drawings(batch_size=6))
    params, batch = task.init(3), next(task.batches(0, "train"))
    params = {name: value + 0.1 * torch.randn(value.shape) for name, value in params.items()}

    def norm(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gain, bias = params[f"{prefix}gain"], params[f"{prefix}bias"]
        return torch.relu(functional.batch_norm(x, None, None, gain, bias, training=True))

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = params[name]
        module = torch.nn.Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[2], stride, weight.shape[2] // 2, bias=False
        )
        module.weight.data = weight
        return module(x)

    x = torch.nn.MaxPool2d(3, 2, 1)(conv(batch.inputs * 2 - 1, "stem.w", 2))
    for number, (_, _, stride) in enumerate(blocks):
        block = f"block{number}."
        y = norm(x, f"{block}norm0.")
        shortcut = conv(y, f"{block}shortcut", stride) if f"{block}shortcut" in params else x
        y = norm(conv(y, f"{block}w0"), f"{block}norm1.")
        y = norm(conv(y, f"{block}w1", stride), f"{block}norm2.")
        x = shortcut + conv(y, f"{block}w2")
    x = norm(x, "norm.").mean((2, 3))
    expected = functional.cross_entropy(x @ params["w0"] + params["b0"], batch.targets)
    torch.testing.assert_close(task.loss(params, batch), expected, rtol=1e-5, atol=1e-6)
    weights = [name for name in params if params[name].ndim >= 2 and "shortcut" not in name]
    assert len(weights) == 14
    assert [name for name in params if "shortcut" in name] == [f"block{number}.shortcut" for number in (0, 1, 3)]
    assert x.shape == (6, 24)


def test_a_meta_run_is_the_meta_training(tmp_path: Path) -> None:
    config = dataclasses.replace(SELF, inner_steps=240, validate_every=60, weighting="mean")
    fields: dict[str, Any] = {"suite": "s", "optimizer": "lopt", "learned": LEARNED_DEFAULT, "horizon": 4, "seed": 0}
    run = MetaRun(**fields, start="random", config=config)
    result = result_of(run)
    trainer.run(config, tmp_path, console=Console(file=io.StringIO()))
    lines = read_metrics(tmp_path)
    assert result.curve["validation"] == [line["validation_mean"] for line in lines if "validation" in line]
    assert result.curve["meta_loss"] == [line["meta_loss"] for line in lines[1:]]
    assert result.initial["test"] == lines[0]["validation_mean"]
    assert result.losses["test"] == pytest.approx(sum(result.curve["validation"][-4:]) / 4, rel=1e-12)
    other = dataclasses.replace(run, config=dataclasses.replace(config, sigma=0.1))
    assert other.keys != run.keys


# ---- Rows and resuming -----------------------------------------------------------------------------------------------

RUNS = [*(wine(name, seed=seed) for name in ("lopt", "adam") for seed in (0, 1)), valley("lopt", steps=10)]


def results(rows: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything but the clocks."""
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in TIMED} for row in rows]


def test_stopped_repeated_and_parallel_runs_give_the_same_rows(tmp_path: Path) -> None:
    whole = execute(RUNS, RunTable(tmp_path / "whole.csv"), in_order=True)
    assert [(row.name, row.seed) for row in whole] == [(run.optimizer, run.seed) for run in RUNS]
    table = RunTable(tmp_path / "stopped.csv")

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(RUNS, table, on_done=stop, in_order=True)
    with table.path.open("a") as file:
        file.write("wines,wine,lopt,learned,1.0")  # cut short
    assert len(table.rows) == 2
    counts: list[tuple[int, int]] = []
    table = RunTable(table.path)
    resumed = execute(RUNS, table, workers=2, on_done=lambda *count: counts.append(count), in_order=True)
    assert counts == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert results(resumed) == results(whole)
    files = [list(RunTable(tmp_path / f"{name}.csv").rows.values()) for name in ("whole", "stopped")]
    assert results(files[0]) == results(files[1]) == results(whole)
    again = execute(RUNS, RunTable(table.path), on_done=lambda *count: counts.append(count))
    assert counts[4:] == [(0, 0)]
    assert again == resumed


def test_a_batch_is_measured_whole_or_not_at_all(tmp_path: Path) -> None:
    runs = [wine("lopt"), wine("adam-tuned", trials=(0, 2))]
    counts: list[tuple[int, int]] = []
    whole = execute(runs, RunTable(tmp_path / "whole.csv"), in_order=True)
    lines = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    (tmp_path / "part.csv").write_text("".join(lines[:3]))
    part = execute(runs, RunTable(tmp_path / "part.csv"), on_done=lambda *count: counts.append(count))
    assert counts == [(0, 1), (1, 1)]
    assert results(part) == results(whole)
    assert len((tmp_path / "part.csv").read_text().splitlines()) == 4


def test_what_a_result_depends_on_is_in_the_key(tmp_path: Path) -> None:
    Theta.init_adam("compact", 1).save(tmp_path / "other.safetensors")
    base = wine("lopt")
    other = Learned.load(tmp_path / "other.safetensors")
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"horizon": 21},
        {"learned": other},
        {"learned": dataclasses.replace(LEARNED_DEFAULT, code_sha256="other")},
        {"task": dataclasses.replace(WINE, batch_size=8)},
        {"optimizer": "lopt-blind"},
    ]
    keys = {tuple(job.keys) for job in (base, *(dataclasses.replace(base, **change) for change in changes))}
    assert len(keys) == 7
    assert dataclasses.replace(base).keys == base.keys


# ---- Texts and figures -----------------------------------------------------------------------------------------------


def a_result(initial: Sequence[float], losses: Sequence[float], seconds: float = 1.0, **more: Any) -> Result:
    """Losses of train, outer_valid and test rows."""
    ends: tuple[dict[SplitName, float], ...] = tuple(
        dict(zip(RECORDED, values, strict=True)) for values in (initial, losses)
    )
    return Result(initial=ends[0], losses=ends[1], diverged=False, seconds=seconds, **more)


def fake(run: Job, factor: float) -> list[Run]:
    """Rows with made-up losses, those of the learned optimizer ``factor`` times those of an Adam at its best."""
    ours = run.optimizer in ("lopt", "lopt-untold")
    loss = 0.5 * factor if ours else 0.5
    names = (
        "step",
        "seconds",
        "train",
        "outer_valid",
        "test",
        "iteration",
        "validation",
        "block_iteration",
        "meta_loss",
    )
    curve = {name: [0.0, 1.0, 2.0] if name in names[:2] or "iter" in name else [2.0, loss, loss] for name in names}
    if isinstance(run, Valley):
        x, y = run.start
        end = (x + y) / 2 * (factor if ours else 1.0)
        curve = {"step": [0.0, 1.0], "x": [x, end], "y": [y, end]}
    if isinstance(run, MetaRun):
        loss = loss - 2
        curve = {name: curve[name] for name in names[5:]}
    result = a_result((2.0,) * 3, (loss,) * 3, seconds=2.0 if ours else 1.0, curve=curve)
    return run.rows([result] * len(run.trials))


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Job]]:
    return {name: list(found.jobs(Setting())) for name, found in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_wins_and_losses_are_said_with_the_same_words(name: str, planned: dict[str, list[Job]], tmp_path: Path) -> None:
    """Made-up rows in which the learned optimizer is twice as good as the others, and twice as bad."""
    experiment = EXPERIMENTS[name]
    won, lost = ([row for job in planned[name] for row in fake(job, factor)] for factor in (0.5, 2.0))
    figure, text = experiment.write(won, tmp_path)
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    good, bad = text.read_text(), "\n".join(experiment.text(lost))
    assert good != bad
    tasks = len({row.task for row in won})
    told = {
        "implicit-regularization": ("lopt ends 50% nearer to the origin", "lopt ends 100% further from the origin"),
        "horizon": ("lower in 10 of 10", "higher in 10"),
        "width": ("48% lower than that of the best", "96% higher than that of the best"),
        "batch-size": ("48% lower than that of the best", "96% higher than that of the best"),
        "dataset-size": ("48% lower than that of the best", "96% higher than that of the best"),
        "time": ("50% lower than that of Adam", "2 times that of Adam"),
        "validation-ablation": (f"lower in {tasks} of {tasks}", f"equal within 2% in 0, higher in {tasks}"),
        "self-training": ("of 14 (Adam, lr 0.003", "of 14 (Adam, lr 0.003"),
        "transformer": ("48% lower than that of Adam", "96% higher than that of Adam"),
        "resnet": ("48% lower than that of Adam", "96% higher than that of Adam"),
        "table": ("lopt is number 1 and lopt-untold is number 2", "; adam is first"),
    }[name]
    assert told[0] in good
    assert told[1] in bad


def test_what_tuning_picks_and_what_is_compared() -> None:
    """A trial is picked by the training or the validation loss, a mean over seeds, never by the test loss."""

    def row(optimizer: str, trial: int, seed: int, train: float, valid: float, test: float) -> Run:
        run = wine(optimizer, trial, seed=seed)
        return row_of(run, a_result((1.0, 2.0, 3.0), (train, valid, test)))

    rows = [
        *(row("adam-tuned", 0, seed, 0.2, 0.4 + 0.2 * seed, 0.1) for seed in (0, 1)),
        *(row("adam-tuned", 1, seed, 0.1, 0.6, 0.9) for seed in (0, 1)),
        *(row("adam-tuned", 2, seed, 0.3, 0.1 + 0.6 * seed, 0.7) for seed in (0, 1)),
        *(row("lopt", 0, seed, 0.4, 0.4, 0.2 + 0.4 * seed) for seed in (0, 1)),
    ]
    adams = select(rows, name="adam-tuned")
    assert [found.trial for found in best(adams, "train_loss")] == [1, 1]
    assert [found.trial for found in best(adams, "test_loss")] == [2, 2]
    assert relative(rows, "lopt", "adam-tuned", "train_loss") == pytest.approx((0.4 + 0.01) / (0.1 + 0.01))
    assert relative(rows, "lopt", "adam-tuned", "test_loss") == pytest.approx((0.4 + 0.03) / (0.7 + 0.03))
    assert values(rows, "name") == ["adam-tuned", "lopt"]
    assert len(select(rows, name="adam-tuned", trial=(0, 2), seed=1)) == 2


def test_normalised_losses_of_a_table() -> None:
    """0 for the lowest loss on a task, 1 for the start and whatever is worse."""

    def row(task: str, optimizer: str, trial: int, valid: float, test: float) -> Run:
        run = dataclasses.replace(wine(optimizer, trial), name=task)
        return row_of(run, a_result((2.0,) * 3, (1.0, valid, test)))

    rows = [row("a", "lopt", 0, 1.0, 0.5), row("b", "lopt", 0, 1.0, 3.0), row("a", "adam-tuned", 0, 0.7, 1.0)]
    rows += [row("a", "adam-tuned", 1, 0.8, 0.0), row("b", "adam-tuned", 0, 0.9, 0.1)]
    rows += [row("b", "adam-tuned", 1, 0.3, 1.0)]
    found = normalised_table.normalised(rows, "test_loss")
    assert found["lopt"] == pytest.approx({"a": 0.25, "b": 1.0})
    assert found["adam-tuned, 2 trials"] == pytest.approx({"a": 0.5, "b": 0.9 / 1.9})


def test_the_share_of_the_best_adam_in_self_training() -> None:
    def row(optimizer: str, trial: int, end: float) -> Run:
        config = dataclasses.replace(SELF, outer="adam", lr=0.01 * (trial + 1))
        fields: dict[str, Any] = {"optimizer": optimizer, "trials": (trial,), "learned": learned_if(optimizer)}
        run = MetaRun(suite="s", start="random", config=config, horizon=6, seed=0, **fields)
        return row_of(run, a_result((-0.1,) * 3, (end,) * 3))

    rows = [row("lopt", 0, -1.0), row("adam", 0, -0.6), row("adam", 1, -1.1), row("adam-decay", 0, -0.9)]
    said = "\n".join(self_training.text([*rows, row("adam-decay", 1, -0.5)]))
    assert "makes 90% of the improvement of the best Adam of 4 (Adam, lr 0.02" in said
    assert "which meets the bar of 90%. It is ahead of or level with 3 of the 4 Adams." in said
    rows[0] = row("lopt", 0, -0.98)
    assert "makes 88%" in (said := "\n".join(self_training.text([*rows, row("adam-decay", 1, -0.5)])))
    assert "which misses the bar of 90%" in said


def test_the_command_runs_resumes_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dataclasses.replace(
        EXPERIMENTS["implicit-regularization"],
        jobs=lambda setting: [
            dataclasses.replace(run, horizon=5)
            for run in implicit_regularization.jobs(setting)
            if run.x == setting.seeds[0]
        ],
    )
    monkeypatch.setitem(EXPERIMENTS, "implicit-regularization", short)
    command = ["experiment", "implicit-regularization", "--seeds", "3", "--workers", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == [".lock", "README.md", "implicit-regularization.csv", "implicit-regularization.png"]
    assert files["README.md"].decode().strip() in said
    assert "5 runs, 0 of them in" in said
    assert cli.main(command) == 0
    assert "5 runs, 5 of them in" in capsys.readouterr().out
    assert (tmp_path / "implicit-regularization.csv").read_bytes() == files["implicit-regularization.csv"]
    (tmp_path / "README.md").unlink()
    assert cli.main([*command, "--no-runs", "--theta", "train-loss"]) == 0
    assert (tmp_path / "README.md").read_bytes() == files["README.md"]
    assert cli.main([*command[:-1], str(tmp_path / "empty"), "--no-runs"]) == 2
    assert "runs: no rows in" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["experiment", "width", "--seeds", "1", "1"])
    assert "seeds: expected numbers from 0 on" in capsys.readouterr().err
    assert get_args(Name) == tuple(EXPERIMENTS)


def test_the_folder_of_fashion_mnist_holds_for_every_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For what is sampled (as by ``table``), and in the processes that run it."""
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    for (images, labels), rows in zip(datasets.IDX_FILES, (36, 8), strict=True):
        pixels = np.random.RandomState(rows).randint(0, 256, rows * 28 * 28).astype(np.uint8).tobytes()
        header = b"".join(size.to_bytes(4, "big") for size in (rows, 28, 28))
        (tmp_path / images).write_bytes(bytes([0, 0, 8, 3]) + header + pixels)
        (tmp_path / labels).write_bytes(bytes([0, 0, 8, 1]) + header[:4] + bytes(row % 10 for row in range(rows)))

    def made(setting: Setting) -> list[Job]:
        assert tmp_path == datasets.FASHION_MNIST_FOLDER
        problem = HeldOutTask(data="fashion-mnist-7x7", sizes=(49, 10))
        return [wine("adam", task=problem, horizon=2, seed=seed) for seed in (0, 1)]

    monkeypatch.setitem(
        EXPERIMENTS,
        "table",
        dataclasses.replace(
            EXPERIMENTS["table"], jobs=made, figure=lambda rows, path: path.touch(), text=lambda rows: []
        ),
    )
    command = ["experiment", "table", "--workers", "2", "--out", str(tmp_path / "out"), "--data"]
    assert cli.main([*command, str(tmp_path)]) == 0
    problem = HeldOutTask(data="fashion-mnist-7x7", sizes=(49, 10), folder=tmp_path)
    for row in RunTable(tmp_path / "out/table.csv").rows.values():
        curve = train_task(problem, lambda params, steps: torch.optim.Adam(params, 1e-3), row.seed, 2)
        assert row.train_loss == pytest.approx(curve.final["train"], rel=1e-6)
    assert cli.main([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.results
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_text_that_is_kept_is_what_the_rows_kept_say(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "benchmarks/results/experiments" / name
    assert folder.is_dir(), f"lopt experiment {name} --out {folder} makes what is kept"
    without_figure = dataclasses.replace(EXPERIMENTS[name], figure=lambda rows, path: None)
    _, text = without_figure.write(list(RunTable(folder / f"{name}.csv").rows.values()), tmp_path)
    assert_same_but_for_rounding(text.read_text(), (folder / "README.md").read_text())
