"""Steps beside PyLO's: the same weights, the same gradients; how far apart they are, and what they cost.

python benchmarks/beside_pylo.py [--steps 20] [--size 256]

Needs PyLO (github.com/Belilovsky-Lab/pylo) to be importable; weights are random, nothing is downloaded. Compared are
PyLO's `naive` optimizers, on the CPU. Printed for each: the largest difference of a parameter after all steps over the
largest distance that one moved, and the ratio of CPU times in this run.

Square matrices have equal dimensions, of which PyLO takes the last as the largest in torch's layout, and the sources of
the weights in theirs, [in, out]: PyLO's VeLO has them as the sources, the others are compared with `transposed`.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer, Theta

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "matrices": [(48, 24), (24, 48), (32,), (5,)],
    "square": [(32, 32), (32,)],
    "convolution": [(16, 8, 3, 3), (16,)],
}
Made = tuple[torch.optim.Optimizer, list[dict[str, Tensor]]]


def offline(module: Any, **sizes: Any) -> None:
    """Let PyLO find random weights where it would ask the Hub."""
    made = module(**sizes)
    with torch.no_grad():
        for value in made.parameters():
            scale = 1 / value.shape[-1] ** 0.5 if value.dim() > 1 else 0.1
            value.copy_(torch.randn(value.shape) * scale)
    module.from_pretrained = classmethod(lambda cls, *_, **__: made)


def networks(optimizer: Any) -> list[dict[str, Tensor]]:
    """The state dicts of the networks of an optimizer of PyLO."""
    return [
        {name: value.cpu() for name, value in module.state_dict().items()}
        for module in vars(optimizer).values()
        if isinstance(module, nn.Module)
    ]


def take(
    opt: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]], told: Callable[[int], Any]
) -> float:
    """All steps; returns the CPU time of one."""
    began = time.process_time()
    for step, some in enumerate(grads):
        for param, grad in zip(params, some, strict=True):
            param.grad = grad.clone()
        told(step)
    return (time.process_time() - began) / len(grads)


def compare(
    name: str, make: Callable[..., Any], shapes: list[tuple[int, ...]], steps: int, **spec: Any
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    start = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    rows = [torch.exp(torch.randn(shape[:1], generator=generator)) for shape in shapes]  # gradients of different sizes
    grads = [
        [
            torch.randn(shape, generator=generator) * row.reshape(-1, *(1 for _ in shape[1:]))
            for shape, row in zip(shapes, rows, strict=True)
        ]
        for _ in range(steps)
    ]
    losses = [2.0 / (1 + step) + 0.1 * (step % 3) for step in range(steps)]
    theirs, ours = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    other = make(theirs)
    theta = Theta.import_pylo(*networks(other), optimizer=name).with_spec(**spec)
    turned = all(shape == shape[::-1] for shape in shapes) and name != "VeLO"
    opt = LearnedOptimizer([{"params": ours, "transposed": turned}], theta, total_steps=steps)
    their_time = take(other, theirs, grads, lambda step: other.step(torch.tensor(losses[step])))
    our_time = take(opt, ours, grads, lambda step: opt.step(loss=losses[step]))
    pairs = [(a, b.detach(), c.detach()) for a, b, c in zip(start, theirs, ours, strict=True)]
    far = max(float((mine - yours).abs().max()) for _, yours, mine in pairs)
    moved = max(float((mine - old).abs().max()) for old, _, mine in pairs)
    return far / moved, our_time / their_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="rows of the matrices by which times are compared")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pylo
    offline(pylo.MetaMLP, input_size=39, hidden_size=32, hidden_layers=1)
    offline(pylo.VeLORNN)
    offline(pylo.VeLOMLP)
    offline(pylo.CELO2MLP)
    makers: dict[str, Callable[..., Any]] = {
        "AdafacLO": lambda params: pylo.AdafacLO_naive(params),
        "ELO": lambda params: pylo.ELO_naive(params),
        "VeLO": lambda params: pylo.VeLO_naive(params, lr=1.0, num_steps=arguments.steps),
        "CELO2": lambda params: pylo.CELO2_naive(params),
    }
    shapes = {**SHAPES, f"four of {arguments.size}": [(arguments.size, 2 * arguments.size)] * 4}
    print(f"{'optimizer':10} {'tensors':14} {'difference / distance':>22} {'CPU time, ours / theirs':>25}")
    for name, make in makers.items():
        for kind, some in shapes.items():
            far, cost = compare(name, make, some, arguments.steps)
            print(f"{name:10} {kind:14} {far:22.1e} {cost:25.2f}")


if __name__ == "__main__":
    main()
