"""Whole optimizer steps on given shapes, against torch's AdamW and against peers in the same run."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.benchmark import kernels, peers, traffic
from lopt.benchmark.peaks import Peaks
from lopt.benchmark.rows import Row
from lopt.benchmark.shapes import Layout
from lopt.benchmark.timing import Timer
from lopt.benchmark.variants import RULES, Variant

LEARNING_RATE = 1e-6  # parameters move, and stay where they are


def measure(
    variants: Sequence[Variant],
    layout: Layout,
    dtype: torch.dtype,
    timer: Timer,
    peaks: Peaks,
    with_peers: bool,
) -> tuple[list[Row], list[str]]:
    """One row for every optimizer, and why peers are left out.

    AdamW(fused=True) comes first and is what ``times_adamw`` refers to.
    """
    params = random_params(layout, dtype, timer.device)
    counted = traffic.adamw(dtype.itemsize, dtype.itemsize)

    fused = timer.measure(torch.optim.AdamW(params, LEARNING_RATE, fused=True).step)
    moved = counted.step
    rows = [kernels.row("step", "AdamW fused", None, layout, dtype, timer, fused, peaks, moved, adamw=fused)]
    foreach = timer.measure(torch.optim.AdamW(params, LEARNING_RATE, foreach=True).step)
    rows.append(kernels.row("step", "AdamW foreach", None, layout, dtype, timer, foreach, peaks, None, adamw=fused))
    for variant in variants:
        options = {
            "precision": variant.precision,
            "state_dtype": variant.state,
            "total_steps": 1000 if variant.preset in RULES else None,
        }
        optimizer = LearnedOptimizer(params, variant.theta(), **options)  # type: ignore[arg-type]
        loss = torch.ones((), device=timer.device)
        timing = timer.measure(lambda opt=optimizer, loss=loss: opt.step(loss=loss))  # type: ignore[misc]
        moved = kernels.counted(variant, dtype).step
        rows.append(kernels.row("step", "lopt", variant, layout, dtype, timer, timing, peaks, moved, adamw=fused))
        del optimizer
    notes = []
    for name in peers.PEERS if with_peers else ():
        step = peers.build(name, params)
        if isinstance(step, str):
            notes.append(f"{name}: left out, {step}")
            continue
        rows.append(
            kernels.row("step", name, None, layout, dtype, timer, timer.measure(step), peaks, None, adamw=fused)
        )
        del step
    return rows, notes


def random_params(layout: Layout, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Parameters with gradients, both normal; a gradient is a hundredth of its parameter's size."""
    generator = torch.Generator(device=device).manual_seed(0)
    params: list[Tensor] = []
    for shape in layout.shapes:
        param = nn.Parameter(torch.randn(shape, generator=generator, device=device).to(dtype))
        param.grad = (0.01 * torch.randn(shape, generator=generator, device=device)).to(dtype)
        params.append(param)
    return params
