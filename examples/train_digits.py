"""Train a small network on handwritten digits with the learned optimizer, as with any torch optimizer.

python examples/train_digits.py --steps 1000
"""

import argparse

import torch
from torch import nn

from lopt import LearnedOptimizer
from lopt.tasks.datasets import digits


def main(steps: int, batch_size: int = 32, seed: int = 0) -> float:
    """Train for ``steps`` steps and return the accuracy on the test rows."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # quickest for a network of this size
    data = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = LearnedOptimizer(model.parameters(), total_steps=steps)  # no learning rate to choose

    for step in range(steps):
        rows = torch.randint(len(data.train.targets), (batch_size,))
        loss = nn.functional.cross_entropy(model(data.train.inputs[rows]), data.train.targets[rows])
        optimizer.zero_grad()
        loss.backward()
        if step % 10 == 0:  # optional: let it see how well the model generalises
            with torch.no_grad():
                valid_loss = nn.functional.cross_entropy(model(data.inner_valid.inputs), data.inner_valid.targets)
            optimizer.observe(valid_loss=valid_loss)
        optimizer.step(loss=loss)  # the loss is optional too, but it steers by it

    with torch.no_grad():
        accuracy = (model(data.test.inputs).argmax(1) == data.test.targets).float().mean().item()
    print(f"{steps} steps: last training loss {loss.item():.4f}, test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    main(parser.parse_args().steps)
