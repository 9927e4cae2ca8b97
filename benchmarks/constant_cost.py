"""What a step costs where there is next to nothing to compute: a perceptron 64-64-10, and 1,000 tensors of 100.

python benchmarks/constant_cost.py [--threads 1]

Seconds of CPU time of this process, as other work on the machine does not count in them, and the ratio to torch's AdamW
in the same run. Optimizers take turns; gradients are new tensors in every step, as after ``zero_grad``.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from lopt import LearnedOptimizer

Optimizers = Mapping[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]

MODELS = {"perceptron 64-64-10": ((64, 64), (64,), (10, 64), (10,)), "1,000 tensors of 100": ((10, 10),) * 1000}
OPTIMIZERS: Optimizers = {
    "lopt": LearnedOptimizer,
    "lopt train-loss": lambda params: LearnedOptimizer(params, "train-loss"),  # which treats no matrices as wholes
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
}


def measure(
    shapes: Sequence[tuple[int, ...]], steps: int, repeats: int, makers: Optimizers = OPTIMIZERS
) -> dict[str, float]:
    """CPU seconds per step of every optimizer, the median of ``repeats``."""
    generator = torch.Generator().manual_seed(0)
    start = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [0.01 * torch.randn(shape, generator=generator) for shape in shapes]
    params = {name: [torch.nn.Parameter(x.clone()) for x in start] for name in makers}
    optimizers = {name: make(params[name]) for name, make in makers.items()}
    loss, seconds = torch.tensor(1.0), {name: list[float]() for name in makers}
    for _ in range(repeats + 1):
        for name, optimizer in optimizers.items():
            spent = 0.0
            for _ in range(steps):
                for param, grad in zip(params[name], grads, strict=True):
                    param.grad = grad.clone()
                before = time.process_time()
                if isinstance(optimizer, LearnedOptimizer):
                    optimizer.step(loss=loss)
                else:
                    optimizer.step()
                spent += time.process_time() - before
            seconds[name].append(spent / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first is a warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for model, shapes in MODELS.items():
        seconds = measure(shapes, 3000 // len(shapes), arguments.repeats)
        for name, value in seconds.items():
            ratios = ", ".join(f"{value / seconds[f'AdamW {kind}']:.2f} of {kind}" for kind in ("fused", "foreach"))
            print(f"{model:22}{name:17}{value * 1e6:10.1f} us   {ratios}")


if __name__ == "__main__":
    main()
