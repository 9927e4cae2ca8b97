"""Runs of a few steps with Accelerate: what the optimizer sees, against a loop by hand; resuming."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seen_optimizer import Seen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lopt.integrations import watch_loss

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

MICRO, ROWS = 3, 8


@pytest.fixture(autouse=True)
def new_accelerator() -> Iterator[None]:
    """Accelerators share state through their class."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data(rows: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.prod(dim=1, keepdim=True)), batch_size=ROWS)


TRAIN, VALID = (13 * ROWS, 1), (19, 2)  # 13 minibatches: three to a step, and one over; validation ends with 3 rows


def train(epochs: range, resume: Path | None = None, save: Path | None = None) -> tuple[nn.Module, Seen]:
    """With a loss module that is watched: in training by its graph, in validation by its rows."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    criterion, inner = nn.MSELoss(), network()
    seen = Seen(inner)
    model, optimizer, loader, valid = accelerator.prepare(inner, seen, data(*TRAIN), data(*VALID))
    if resume is not None:
        accelerator.load_state(str(resume))
    with watch_loss(criterion, optimizer):
        for epoch in epochs:
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(criterion(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for x, y in valid:
                    criterion(model(x), y)
            model.train()
            if save is not None and epoch == 1:
                accelerator.save_state(str(save))
    return inner, seen


def by_hand(epochs: int) -> tuple[nn.Module, Seen]:
    model = network()
    optimizer = Seen(model)
    for _ in range(epochs):
        batches: list[Any] = list(data(*TRAIN))
        for first in range(0, len(batches), MICRO):
            for x, y in batches[first : first + MICRO]:
                loss = nn.functional.mse_loss(model(x), y)
                (loss / MICRO).backward()
                optimizer.observe(train_loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            rows: list[Any] = list(data(*VALID))
            total = sum(nn.functional.mse_loss(model(x), y) * len(x) for x, y in rows)
        optimizer.observe(valid_loss=total / 19)
    return model, optimizer


def test_it_sees_what_a_loop_by_hand_sees() -> None:
    model, seen = train(range(3))
    expected_model, expected = by_hand(3)
    assert seen.train == expected.train
    assert len(seen.train) == 3 * 5
    for a, b in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [loss for _, loss in seen.valid] == [loss for _, loss in expected.valid[:2]]  # each told with the next step


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """To the bit, from a state that was saved right after a validation, whose loss no step had seen."""
    model, whole = train(range(4), save=tmp_path)
    rest_model, rest = train(range(2, 4), resume=tmp_path)
    assert rest.train == whole.train[10:]
    assert [(10 + step, loss) for step, loss in rest.valid] == whole.valid[2:]
    for a, b in zip(rest_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_watched_accelerator() -> None:
    """For a loop whose loss no module computes: what backward is given, before it is divided."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    seen = Seen(inner := network())
    model, optimizer, loader = accelerator.prepare(inner, seen, data(*TRAIN))
    told: list[list[float]] = [[]]
    with watch_loss(accelerator, optimizer):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                told[-1].append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    told.append([])
    assert seen.train == pytest.approx([sum(losses) / len(losses) for losses in told[:-1]], rel=1e-6)
    assert [len(losses) for losses in told] == [3, 3, 3, 3, 1, 0]
