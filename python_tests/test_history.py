"""What an optimizer did over a run, against the reference's own numbers and by hand."""

import math

import pytest
import torch
from torch import nn

from lopt import History, LearnedOptimizer, history
from lopt.cli import main


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.emb(tokens))))


def train(model, opt, steps, frozen_until=0):
    tokens = torch.arange(11)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 3) % 11)
        opt.zero_grad()
        loss.backward()
        if step < frozen_until:
            model.hidden.bias.grad = None
        opt.step(loss=loss)
    return loss.detach()


def test_kernels_and_reference_tell_the_same():
    tables = []
    for impl in ("reference", "cpu", "sim"):
        model = Model()
        opt = LearnedOptimizer(model, impl=impl)
        with History(opt, model, every=2) as kept:
            train(model, opt, 5)
        tables.append(kept.rows)
    reference = tables[0]
    assert {row.tensor: row.kind for row in reference} == {
        "emb.weight": "input",
        "hidden.weight": "hidden",
        "hidden.bias": "vector",
        "head.weight": "output",
        "head.bias": "vector",
    }
    assert [row.step for row in reference] == [step for step in (1, 3, 5) for _ in range(5)]
    for table in tables[1:]:
        for one, other in zip(reference, table, strict=True):
            assert one[:1] + one[2:5] == other[:1] + other[2:5]
            for name in ("train_loss", "step_size", "gate", "size"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=2e-4, nan_ok=True)


def test_a_step_is_what_parameters_move_by():
    """From the values in the table: of a tensor of rank 1, ``lr`` scales the step and the movement alike."""
    moved, told = [], []
    for lr in (1.0, 0.5):
        model = Model()
        opt = LearnedOptimizer(model, lr=lr)
        kept = History(opt, model)
        before = model.head.bias.detach().clone()
        train(model, opt, 1)
        moved.append(model.head.bias.detach() - before)
        told.append(next(row for row in kept.rows if row.tensor == "head.bias").step_size)
    assert told[0] > 0
    torch.testing.assert_close(told[1], told[0] / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-4, atol=1e-8)


def test_gate_loss_and_size():
    model = Model()
    opt = LearnedOptimizer(model)
    assert opt.controls() == {}
    kept = History(opt, model)
    loss = train(model, opt, 3)
    rows = {row.tensor: row for row in kept.rows[-5:]}
    assert math.isnan(rows["hidden.bias"].gate)
    assert math.isnan(rows["emb.weight"].gate)  # known to be input: never treated as a whole
    assert 0 < rows["hidden.weight"].gate <= 1
    assert rows["hidden.weight"].train_loss == pytest.approx(float(loss))
    assert rows["hidden.weight"].size == pytest.approx(float(model.hidden.weight.detach().square().mean().sqrt()))


def test_tensors_that_join_and_rest():
    model = Model()
    opt = LearnedOptimizer(model.named_parameters())
    kept = History(opt)
    train(model, opt, 4, frozen_until=2)
    steps = [row.step for row in kept.rows if row.tensor == "hidden.bias"]
    assert steps == [3, 4]
    kept.remove()
    train(model, opt, 1)
    assert kept.rows[-1].step == 4


def test_a_resting_tensor_has_a_step_of_zero():
    model = Model()
    model.hidden.bias.data[0] = math.inf
    opt = LearnedOptimizer(model)
    with History(opt, model) as kept:
        train(model, opt, 1)
    assert next(row for row in kept.rows if row.tensor == "hidden.bias").step_size == 0.0


def test_file_and_figure(tmp_path, capsys):
    model = Model()
    opt = LearnedOptimizer(model.parameters())
    with History(opt) as kept:
        train(model, opt, 3)
    kept.save(tmp_path / "run.csv")
    found = history.read(tmp_path / "run.csv")
    assert [row.tensor for row in found[:5]] == ["0", "1", "2", "3", "4"]
    for one, other in zip(kept.rows, found, strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True) if isinstance(one, float) else one[:1] == other[:1]
        assert one.step_size == pytest.approx(other.step_size, rel=1e-5)
    pytest.importorskip("matplotlib")
    assert main(["plot", str(tmp_path / "run.csv")]) == 0
    assert "5 tensors, 3 steps" in capsys.readouterr().out
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_errors(tmp_path):
    model = Model()
    with pytest.raises(TypeError, match="optimizer: expected a LearnedOptimizer, got SGD"):
        History(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="every: expected a number of steps from 1, got 0"):
        History(LearnedOptimizer(model), every=0)
    with pytest.raises(ValueError, match="rows: expected at least one recorded step"):
        history.plot([], tmp_path / "empty.png")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected a table that History\.save wrote"):
        history.read(tmp_path / "other.csv")
    (tmp_path / "cut.csv").write_text(",".join(history.Row._fields) + "\n1,2\n")
    with pytest.raises(ValueError, match="not a whole table of a history"):
        history.read(tmp_path / "cut.csv")
