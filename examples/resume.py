"""Stop in the middle, save, load into new objects, go on: the same bits as without the stop.

python examples/resume.py --steps 100
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from lopt import LearnedOptimizer


def make() -> tuple[nn.Module, LearnedOptimizer]:
    """A model and its optimizer; a resumed run builds the same and loads its state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, LearnedOptimizer(model.parameters(), total_steps=1000)


def train(model: nn.Module, optimizer: LearnedOptimizer, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of a regression whose data depend on the step number alone."""
    for step in range(first, last):
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.prod(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)


def main(steps: int) -> float:
    """Return the largest difference between the parameters of an uninterrupted and of a resumed run."""
    torch.set_num_threads(1)
    model, optimizer = make()
    train(model, optimizer, 0, steps)
    expected = list(model.parameters())

    model, optimizer = make()
    train(model, optimizer, 0, steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        model, optimizer = make()
        checkpoint = torch.load(path, weights_only=True)  # never unpickles
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(model, optimizer, steps // 2, steps)

    difference = max((a - b).abs().max().item() for a, b in zip(model.parameters(), expected, strict=True))
    print(f"{steps} steps at once and in two halves: largest difference {difference:g}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    raise SystemExit(main(parser.parse_args().steps) > 0)
