"""How large should the first step of Theta.init_adam("compact") be? Prints final training losses by step_multiplier.

Synthetic tasks only (teacher networks and Gaussian mixtures; widths 16 to 256, depths 1 to 4, tanh and relu, PyTorch's
default initialisation), 500 steps, with and without the horizon. The score is the geometric mean over tasks of the
final training loss (mean of the last 20 minibatches, plus 1% of the first loss) relative to the best Adam of five
learning rates.
"""

import itertools
import math

import torch
from torch import nn

from lopt import LearnedOptimizer, Theta

STEPS = 500
MULTIPLIERS = (0.005, 0.01, 0.02, 0.04, 0.08)
TASKS = tuple(itertools.product((16, 64, 256), (1, 2, 4), (nn.ReLU, nn.Tanh), ("teacher", "mixture")))


def make_task(index: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, nn.Module]:
    width, depth, activation, kind = TASKS[index]
    torch.manual_seed(index)
    inputs, outputs = 24, 6
    if kind == "teacher":
        x = torch.randn(1024, inputs)
        y = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs))(x).detach() * 4
        criterion: nn.Module = nn.MSELoss()
    else:
        y = torch.randint(outputs, (1024,))
        x = torch.randn(outputs, inputs)[y] + 1.5 * torch.randn(1024, inputs)
        criterion = nn.CrossEntropyLoss()
    sizes = [inputs] + [width] * depth + [outputs]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), activation())][:-1]
    return nn.Sequential(*layers), x, y, criterion


def final_loss(index: int, make_optimizer) -> float:  # type: ignore[no-untyped-def]
    model, x, y, criterion = make_task(index)
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (32,), generator=generator)
        loss = criterion(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.observe(train_loss=loss)
        optimizer.step()
        losses.append(loss.item())
    final = sum(losses[-20:]) / 20
    return min(final, 10 * losses[0]) + 0.01 * losses[0] if math.isfinite(final) else 10 * losses[0]


def main() -> None:
    torch.set_num_threads(1)
    chosen = range(0, len(TASKS), 2)
    adam = {
        lr: [final_loss(i, lambda p, lr=lr: torch.optim.Adam(p, lr)) for i in chosen]
        for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    }
    best = [min(losses) for losses in zip(*adam.values(), strict=True)]

    def report(name: str, losses: list[float]) -> None:
        ratios = [math.log(a / b) for a, b in zip(losses, best, strict=True)]
        print(f"{name:40s} {math.exp(sum(ratios) / len(ratios)):.3f}  worst {math.exp(max(ratios)):.2f}", flush=True)

    for lr, losses in adam.items():
        report(f"Adam {lr}", losses)
    for multiplier, horizon in itertools.product(MULTIPLIERS, (None, STEPS)):
        theta = Theta.init_adam("compact").with_spec(step_multiplier=multiplier)
        losses = [final_loss(i, lambda p, t=theta, h=horizon: LearnedOptimizer(p, t, total_steps=h)) for i in chosen]
        report(f"step_multiplier {multiplier}, total_steps {horizon}", losses)


if __name__ == "__main__":
    main()
