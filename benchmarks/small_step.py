"""Three steps in three ways on a few awkward tensors, against the reference: a small case for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/small_step.py --device cuda
"""

import argparse

import torch

from lopt import LearnedOptimizer, Theta

SHAPES = ((), (7,), (3, 43), (129,), (8191,), (8193,), (33, 512))  # ranks, tails, one and several chunks
#: Preset and statistics -> largest error, as a share of the largest update.
CASES = {("paper", "current"): 1e-4, ("compact", "lagged"): 1e-4, ("spectral", "current"): 1e-3}


def train(preset: str, stats: str, impl: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters after three steps, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [torch.nn.Parameter(x.to(device, dtype, copy=True)) for x in start]
    theta = Theta.init(preset, seed=1).with_spec(step_multiplier=0.1, stats=stats)
    optimizer = LearnedOptimizer(params, theta, impl=impl)
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
        optimizer.step(loss=1.0 / (1 + step))
    return [param.detach().cpu().double() - x.double() for param, x in zip(params, start, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    for (preset, stats), allowed in CASES.items():
        found = train(preset, stats, device.type, device, torch.float32)
        exact = train(preset, stats, "reference", torch.device("cpu"), torch.float64)
        largest = max(float(x.abs().max()) for x in exact)
        worst = max(float((x - y).abs().max()) for x, y in zip(found, exact, strict=True)) / largest
        print(f"{preset}, {stats} stats: largest error {worst:.1e} of the largest update", flush=True)
        if not worst <= allowed:
            raise SystemExit(f"{preset}: expected an error of at most {allowed} of the largest update, got {worst:.1e}")


if __name__ == "__main__":
    main()
