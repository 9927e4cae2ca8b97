"""Three steps of both presets on a few awkward tensors, against the reference: a small case for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/small_step.py --device cuda
"""

import argparse

import torch

from lopt import LearnedOptimizer, Theta

SHAPES = ((), (7,), (3, 43), (129,), (8191,), (8193,), (33, 512))  # ranks, tails, one and several chunks
WORST = 1e-4  # of the largest update


def train(preset: str, impl: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters after three steps, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [torch.nn.Parameter(x.to(device, dtype, copy=True)) for x in start]
    optimizer = LearnedOptimizer(params, Theta.init(preset, seed=1).with_spec(step_multiplier=0.1), impl=impl)
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
        optimizer.step(loss=1.0 / (1 + step))
    return [param.detach().cpu().double() - x.double() for param, x in zip(params, start, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    for preset in ("paper", "compact"):
        found = train(preset, device.type, device, torch.float32)
        exact = train(preset, "reference", torch.device("cpu"), torch.float64)
        largest = max(float(x.abs().max()) for x in exact)
        worst = max(float((x - y).abs().max()) for x, y in zip(found, exact, strict=True)) / largest
        print(f"{preset}: largest error {worst:.1e} of the largest update", flush=True)
        if not worst <= WORST:
            raise SystemExit(f"{preset}: expected an error of at most {WORST} of the largest update, got {worst:.1e}")


if __name__ == "__main__":
    main()
