"""What a step costs with and without the direction stage, beside torch's Muon, on tensors shaped as GPT-2's.

python benchmarks/direction_cost.py [--layers 12] [--threads 1]

Seconds of CPU time of this process, and the ratio to Muon in the same run. Muon takes the matrices of the blocks and
AdamW the rest; lopt knows embeddings and head by their roles. Optimizers take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lopt import LearnedOptimizer, Theta

WIDTH, VOCABULARY, PLACES = 768, 50257, 1024
Optimizers = list[torch.optim.Optimizer]


def gpt2(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as torch stores them; the head is the embedding."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (PLACES, WIDTH)}
    for layer in range(layers):
        dense = {
            "attn": (3 * WIDTH, WIDTH),
            "proj": (WIDTH, WIDTH),
            "up": (4 * WIDTH, WIDTH),
            "down": (WIDTH, 4 * WIDTH),
        }
        for name, shape in dense.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[:1]}
        shapes |= {f"h.{layer}.norm{i}.{part}": (WIDTH,) for i in range(2) for part in ("weight", "bias")}
    return shapes | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}


def learned(theta: str) -> Callable[[dict[str, torch.nn.Parameter]], Optimizers]:
    def make(params: dict[str, torch.nn.Parameter]) -> Optimizers:
        return [LearnedOptimizer(params.items(), Theta.init_adam(theta))]

    return make


def muon(params: dict[str, torch.nn.Parameter]) -> Optimizers:
    hidden = [param for name, param in params.items() if param.dim() == 2 and name.startswith("h.")]
    rest = [param for name, param in params.items() if param.dim() != 2 or not name.startswith("h.")]
    return [torch.optim.Muon(hidden), torch.optim.AdamW(rest, fused=True)]


MAKERS = {"lopt spectral": learned("spectral"), "lopt compact": learned("compact"), "Muon and AdamW": muon}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    shapes = gpt2(arguments.layers)
    grads = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    seconds: dict[str, float] = {}
    for name, make in MAKERS.items():  # one after the other: their states fill the memory
        params = {key: torch.nn.Parameter(0.02 * torch.randn(shape)) for key, shape in shapes.items()}
        for key, param in params.items():
            param.grad = grads[key]
        optimizers, spent = make(params), list[float]()
        for _ in range(arguments.repeats + 1):
            before = time.process_time()
            for optimizer in optimizers:
                optimizer.step()
            spent.append(time.process_time() - before)
        seconds[name] = statistics.median(spent[1:])  # the first is a warm-up
    for name, value in seconds.items():
        print(f"{name:16}{value:8.2f} s   {value / seconds['Muon and AdamW']:.2f} of Muon and AdamW")


if __name__ == "__main__":
    main()
