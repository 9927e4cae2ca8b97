"""One launch of every kernel of the two operations, compared with the CPU kernels: which one fails, and how.

    python benchmarks/one_launch.py [--device cuda] [--after KERNEL | --only KERNEL]

Each kernel is named before it is launched, so that the last name is that of one that ended the process; with
CUDA_LAUNCH_BLOCKING=1 an error is that of the launch it comes from. `--after` goes on behind such a kernel.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt import kernels
from lopt.rule import PRESETS, ThetaSpec

SIZES = (8193, 640, 7)  # two chunks, windows of 128 and what is beyond, fewer than a quad
#: Errors as shares of the largest value.
ALLOWED = {"exact": 1e-4, "high": 1e-4, "fast": 2.0**-6}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kernel:
    """An operation with what it is compiled for."""

    operation: str
    feature_set: str
    state: str
    width: int = 8
    precision: str = "exact"

    @property
    def name(self) -> str:
        words = [self.operation, self.feature_set, self.state]
        return " ".join(words if self.operation == "accumulate" else [*words, str(self.width), self.precision])


def every_kernel() -> Iterator[Kernel]:
    for feature_set in ("compact", "paper"):
        for state in ("float32", "bfloat16"):
            yield Kernel("accumulate", feature_set, state)
            for operation in ("apply", "sweep"):
                for width in kernels.WIDTHS:
                    for precision in kernels.PRECISIONS:
                        yield Kernel(operation, feature_set, state, width, precision)


def random_mlp(spec: ThetaSpec, generator: torch.Generator) -> Tensor:
    shapes = {name: shape for name, shape in spec.shapes().items() if name.startswith("mlp.") or name == "skip"}
    weights = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[0] if shape else 1)
        for name, shape in shapes.items()
    }
    return kernels.pack_mlp(spec, weights)[None]


def launch(kernel: Kernel, backend: str, device: torch.device) -> list[Tensor]:
    """Everything that it writes, on the CPU."""
    spec = dataclasses.replace(PRESETS[kernel.feature_set], mlp_width=kernel.width)
    generator, dtype, rows = torch.Generator().manual_seed(0), getattr(torch, kernel.state), len(SIZES)
    columns = len(spec.features.columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params, grads = ([normal(size).to(device) for size in SIZES] for _ in range(2))
    mom = [normal(len(spec.mom_decays), size).to(device, dtype) for size in SIZES]
    rms = [normal(len(spec.rms_decays), size).square().to(device, dtype) for size in SIZES]
    plan = kernels.Plan(backend, spec.feature_set, params, mom, rms, precision=kernel.precision)
    plan.set_tensors(params, grads)
    inputs = {
        "clip_limit": torch.full((rows,), 2.0),
        "scale": normal(rows, columns).exp(),
        "shift": 0.1 * normal(rows, columns),
        "bias": normal(rows, spec.mlp_width),
        "step_size": torch.full((rows,), 0.1),
        "keep": torch.ones(rows),
        "gate": torch.zeros(rows),
    }
    inputs["shift"][:, : spec.features.first_shifted] = 0.0  # which kernels rely on
    inputs = {name: value.to(device) for name, value in inputs.items()}
    plan.bind_accumulate(inputs["clip_limit"])
    plan.bind_apply(inputs, random_mlp(spec, generator).to(device), spec.magnitude_rate, spec.feature_clip)
    plan.set_step(torch.tensor(3, device=device))
    found: Tensor | tuple[Tensor, Tensor] = getattr(
        plan, {"sweep": "sweep"}.get(kernel.operation, f"run_{kernel.operation}")
    )()
    results = [*found] if isinstance(found, tuple) else [found]
    return [value.cpu().double() for value in (*results, *params, *mom, *rms)]


def problem(kernel: Kernel, backend: str, device: torch.device) -> str:
    """What is wrong with its results; empty where nothing is."""
    allowed = ALLOWED[kernel.precision]
    if kernel.state == "bfloat16" and kernel.operation != "apply":
        allowed = max(allowed, 2.0**-7)  # one rounding goes the other way
    for place, (found, expected) in enumerate(
        zip(launch(kernel, backend, device), launch(kernel, "cpu", CPU), strict=True)
    ):
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= allowed:
            return f"result {place}: error {error:.1e} of the largest value, expected at most {allowed:.1e}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "sim"), default="cpu", help="sim: CUDA on the CPU")
    parser.add_argument("--after", help="name of a kernel")
    parser.add_argument("--only", help="name of a kernel")
    options = parser.parse_args()
    chosen, device = list(every_kernel()), torch.device("cuda" if options.device == "cuda" else "cpu")
    names = [kernel.name for kernel in chosen]
    for name in (options.after, options.only):
        if name is not None and name not in names:
            parser.error(f"{name!r} is no kernel, expected one such as {names[1]!r}")
    if options.after is not None:
        chosen = chosen[names.index(options.after) + 1 :]
    if options.only is not None:
        chosen = [kernel for kernel in chosen if kernel.name == options.only]
    wrong = 0
    for kernel in chosen:
        print(f"{kernel.name}: ", end="", flush=True)
        found = problem(kernel, options.device, device)
        print(found or "ok", flush=True)
        wrong += bool(found)
    print(f"{len(chosen) - wrong} of {len(chosen)} kernels ok")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
