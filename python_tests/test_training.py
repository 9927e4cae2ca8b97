"""lopt/evaluation: the training loop against loops written by hand, and what it records against numpy."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt import LearnedOptimizer
from lopt.evaluation import plots, training
from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.runs import OptimizerFactory
from lopt.evaluation.training import Record, TrainResult, batches, evaluate, mlp, train
from lopt.tasks.datasets import Dataset, Split


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny models are quickest on one thread, by far on a busy machine."""
    set_num_threads(1)


def blobs(rows: int = 40) -> Dataset:
    """Three Gaussian blobs in the plane."""
    generator = torch.Generator().manual_seed(3)

    def split(rows: int) -> Split:
        targets = torch.arange(rows) % 3
        centres = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        return Split(centres[targets] + 0.5 * torch.randn(rows, 2, generator=generator), targets)

    return Dataset("blobs", "this test", 3, split(rows), split(12), split(12), split(20))


def sgd(params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


adam, adamw_cosine = partial(make_optimizer, "adam"), partial(make_optimizer, "adamw-cosine")


def params_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


# ---- Minibatches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (7, 7), (10, 5), (11, 4)])
def test_an_epoch_is_a_permutation_without_its_rest(rows: int, batch_size: int) -> None:
    per_epoch = rows // batch_size
    found = list(islice(batches(rows, batch_size, seed=5), 3 * per_epoch))
    assert all(batch.shape == (batch_size,) for batch in found)
    for epoch in range(3):
        seen = torch.cat(found[epoch * per_epoch : (epoch + 1) * per_epoch]).tolist()
        assert len(set(seen)) == per_epoch * batch_size
        assert set(seen) <= set(range(rows))


def test_batches_depend_on_the_seed_alone() -> None:
    def first(seed: int) -> list[list[int]]:
        return [batch.tolist() for batch in islice(batches(50, 8, seed), 20)]

    torch.manual_seed(0)
    one = first(1)
    torch.manual_seed(1)
    assert first(1) == one
    assert first(2) != one
    epochs = [[row for batch in one[i : i + 6] for row in batch] for i in (0, 6, 12)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_size", [0, 41])
def test_batch_that_does_not_fit(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: expected between 1 and the 40 rows.*got {batch_size}"):
        train(mlp(2, (), 3), blobs(), sgd, steps=1, batch_size=batch_size)


# ---- Models and measurements -----------------------------------------------------------------------------------------


def test_mlp_is_drawn_by_its_seed_and_leaves_the_global_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    models = [mlp(4, (8, 3), 2, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(4), expected)
    a, b, c = (params_of(model) for model in models)
    assert [tuple(param.shape) for param in a] == [(8, 4), (8,), (3, 8), (3,), (2, 3), (2,)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    torch.manual_seed(0)
    assert torch.equal(a[0], nn.Linear(4, 8).weight)  # torch's own initialisation
    x = torch.rand(5, 2, 2)
    weights = [param.double().numpy() for param in a]
    hidden = x.double().flatten(1).numpy()
    for layer in range(3):
        hidden = hidden @ weights[2 * layer].T + weights[2 * layer + 1]
        hidden = np.maximum(hidden, 0) if layer < 2 else hidden
    np.testing.assert_allclose(models[0](x).detach().numpy(), hidden, rtol=0, atol=1e-6)


def test_evaluate_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(mlp(2, (5,), 3, seed=1), nn.Dropout(0.9))  # dropout must be off
    split = blobs(41).train
    monkeypatch.setattr(training, "EVALUATION_ROWS", 37)
    logits = model[0](split.inputs).detach().double().numpy()[:37]
    targets = split.targets.numpy()[:37]
    log_sum = np.log(np.exp(logits).sum(axis=1))
    loss, accuracy = evaluate(model, split)
    assert loss == pytest.approx((log_sum - logits[np.arange(37), targets]).mean(), abs=1e-6)
    assert accuracy == (logits.argmax(axis=1) == targets).mean()


# ---- The loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam, adamw_cosine])
def test_the_loop_is_the_one_everybody_writes(make: OptimizerFactory) -> None:
    data, steps, seed = blobs(), 23, 4
    model = mlp(2, (6,), 3, seed=2)
    result = train(model, data, make, steps=steps, batch_size=9, seed=seed, num_records=5)

    other = mlp(2, (6,), 3, seed=2)
    optimizer = make(list(other.parameters()), steps)
    losses, records = [], []
    for step, index in enumerate(islice(batches(40, 9, 2 * seed), steps)):
        if step % 5 == 0:
            records.append(Record(step, evaluate(other, data.train)[0], *evaluate(other, data.test)))
        loss = functional.cross_entropy(other(data.train.inputs[index]), data.train.targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    records.append(Record(steps, evaluate(other, data.train)[0], *evaluate(other, data.test)))

    assert all(torch.equal(a, b) for a, b in zip(params_of(model), params_of(other), strict=True))
    assert result.batch_losses == tuple(losses)
    assert result.records == tuple(records)
    assert [record.step for record in result.records] == [0, 5, 10, 15, 20, 23]
    assert result.final == records[-1]
    assert (result.steps, result.ms_per_step) == (steps, 1e3 * result.seconds / steps)
    assert result.final.train_loss < result.records[0].train_loss


def test_cosine() -> None:
    param = torch.zeros(1, requires_grad=True)
    optimizer = adamw_cosine([param], steps=8)
    for step in range(9):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005 * (1 + math.cos(math.pi * step / 8)), abs=1e-15)
        param.grad = torch.ones(1)
        optimizer.step()


class Listener(torch.optim.SGD):
    """SGD that writes down what it is told."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.heard: list[tuple[str, float]] = []

    def observe(self, train_loss: Tensor | None = None, valid_loss: Tensor | None = None) -> None:
        assert train_loss is None
        assert valid_loss is not None
        assert not valid_loss.requires_grad
        self.heard.append(("valid", valid_loss.item()))

    def step(self, closure: None = None, *, loss: Tensor) -> None:  # type: ignore[override]
        assert not loss.requires_grad
        self.heard.append(("train", loss.item()))
        super().step()


def test_an_optimizer_that_observes_is_told_the_losses() -> None:
    data, seed, made = blobs(), 6, []

    def make(params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
        assert total_steps == 7
        made.append(Listener(params))
        return made[0]

    def model() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), mlp(2, (6,), 3, seed=2))

    listening, plain = model(), model()
    result = train(listening, data, make, steps=7, batch_size=20, seed=seed, valid_every=3)
    expected = train(plain, data, sgd, steps=7, batch_size=20, seed=seed, valid_every=3)
    # listening changes nothing else: same minibatches, same dropout masks
    assert result.batch_losses == expected.batch_losses
    assert result.records == expected.records
    heard = made[0].heard
    assert [kind for kind, _ in heard] == [*["valid", "train", "train", "train"] * 2, "valid", "train"]
    assert tuple(loss for kind, loss in heard if kind == "train") == result.batch_losses
    # the first validation loss is that of the untrained model, without dropout, on so many rows, here all or five
    few = Listener([torch.zeros(1, requires_grad=True)])
    train(model(), data, lambda params, steps: few, steps=1, batch_size=20, seed=seed, valid_rows=5)
    for told, rows in ((heard, 12), (few.heard, 5)):
        index = next(batches(12, rows, 2 * seed + 1))
        inputs, targets = data.inner_valid.inputs[index], data.inner_valid.targets[index]
        assert told[0][1] == functional.cross_entropy(model().eval()(inputs), targets).item()


def test_training_leaves_the_global_random_state() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    train(nn.Sequential(nn.Dropout(0.5), mlp(2, (), 3)), blobs(), sgd, steps=2, batch_size=4)
    assert torch.equal(torch.rand(3), expected)


def test_the_learned_optimizer_trains_and_repeats() -> None:
    def run(seed: int) -> TrainResult:
        return train(mlp(2, (16,), 3, seed), blobs(), learned, steps=150, batch_size=16, seed=seed, num_records=3)

    def learned(params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
        return LearnedOptimizer(params, total_steps=total_steps)

    one, again, other = run(0), run(0), run(1)
    assert replace(one, seconds=0.0) == replace(again, seconds=0.0)
    assert one.batch_losses != other.batch_losses
    # Adam 1e-3 ends at about .45 here
    assert one.final.train_loss < 0.35 < one.records[0].train_loss


@pytest.mark.parametrize("option", ["steps", "num_records", "valid_every", "valid_rows"])
def test_counts_are_checked(option: str) -> None:
    options = {"steps": 1, "num_records": 1, "valid_every": 1, "valid_rows": 1, option: 0}
    with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
        train(mlp(2, (), 3), blobs(), sgd, batch_size=4, **options)


# ---- Plots -----------------------------------------------------------------------------------------------------------


def fake_run(level: float) -> TrainResult:
    steps = range(0, 101, 10)
    records = tuple(Record(s, level * math.exp(-s / 50), level * math.exp(-s / 60), 1 - level / (9 + s)) for s in steps)
    return TrainResult(100, (1.0,) * 100, records, 1.0)


def test_curves_are_drawn(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "curves.png"
    runs = {"one": [fake_run(1.0), fake_run(1.3)], "two": [fake_run(2.0)]}
    plots.training_curves(runs, "a title", path)
    image = np.rint(imread(path)[:, :, :3] * 255).astype(int)
    assert image.shape == (630, 1890, 3)
    for number, colour in enumerate(plots.COLOURS[:3]):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        columns = np.flatnonzero((image == rgb).all(axis=2).any(axis=0))
        if number == 2:
            assert len(columns) == 0  # nobody's colour
        else:  # a line in each third of the picture, over most of its width
            for third in range(3):
                inside = (columns >= third * 630) & (columns < (third + 1) * 630)
                assert inside.sum() > 300


def test_nothing_to_draw(tmp_path: Path) -> None:
    for runs in ({}, {"one": []}):
        with pytest.raises(ValueError, match="at least one run"):
            plots.training_curves(runs, "", tmp_path / "curves.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lopt\[plot\]'"):
        plots.training_curves({"one": [fake_run(1.0)]}, "", tmp_path / "curves.png")
