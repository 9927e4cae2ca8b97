"""The two operations by themselves: time per parameter, bytes and operations per second, share of the peaks."""

from collections.abc import Callable, Sequence

import torch

from lopt import kernels
from lopt.benchmark import traffic
from lopt.benchmark.peaks import Peaks
from lopt.benchmark.rows import Row
from lopt.benchmark.shapes import Layout
from lopt.benchmark.timing import Timer, Timing
from lopt.benchmark.traffic import Traffic
from lopt.benchmark.variants import RULES, Variant
from lopt.rule import ThetaSpec
from lopt.rule.rounding import coded

STEP_SIZE = 1e-6  # parameters move, and stay where they are


def counted(variant: Variant, dtype: torch.dtype) -> Traffic:
    """What a step of it moves and holds, for parameters and gradients of ``dtype``."""
    sizes = dtype.itemsize, dtype.itemsize, variant.state.itemsize
    if not isinstance(variant.spec, ThetaSpec):
        return traffic.factored(variant.name, variant.spec, *sizes)
    return traffic.learned(variant.name, variant.spec, *sizes)


def bytes_needed(variant: Variant, layout: Layout, dtype: torch.dtype) -> int:
    """Memory that :func:`measure` takes."""
    return layout.parameters * counted(variant, dtype).held


def measure(variant: Variant, layout: Layout, dtype: torch.dtype, timer: Timer, peaks: Peaks) -> list[Row]:
    """One row for ``accumulate``, one for ``apply``; one for ``sweep`` where statistics lag. On random operands."""
    if variant.preset in RULES:
        raise ValueError(f"presets: kernels of {variant.preset!r} are measured as a whole; use lopt bench step")
    device = timer.device
    generator = torch.Generator(device=device).manual_seed(0)
    theta = variant.theta().to(device)
    spec, tensors = theta.spec, len(layout.shapes)
    columns = len(spec.features.columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    params = [normal(*shape).to(dtype) for shape in layout.shapes]
    grads = [normal(*shape).to(dtype) for shape in layout.shapes]
    mom = [normal(len(spec.mom_decays), param.numel()) for param in params]
    rms = [normal(len(spec.rms_decays), param.numel()).square_() for param in params]
    scales: Sequence[torch.Tensor | None] | None = None
    if variant.state == torch.int8:
        both = [coded(torch.cat(pair), len(spec.mom_decays)) for pair in zip(mom, rms, strict=True)]
        mom, rms, scales = ([item[k] for item in both] for k in range(3))
    else:
        mom, rms = ([value.to(variant.state) for value in values] for values in (mom, rms))
    plan = kernels.Plan(
        device.type,
        spec.feature_set,
        params,
        mom,
        rms,
        precision=variant.precision,
        width=spec.mlp_width,
        layers=spec.mlp_layers,
        scales=scales,
    )
    plan.set_tensors(params, grads)
    limit, scale = torch.full((tensors,), 10.0, device=device), normal(tensors, columns).exp()
    shift, bias = 0.1 * normal(tensors, columns), normal(tensors, spec.mlp_width)
    step_size, keep = torch.full((tensors,), STEP_SIZE, device=device), torch.ones(tensors, device=device)
    inputs = {"clip_limit": limit, "scale": scale, "shift": shift, "bias": bias, "step_size": step_size, "keep": keep}
    shift[:, : spec.features.first_shifted] = 0.0  # which kernels rely on
    inputs["gate"] = torch.zeros(tensors, device=device)
    weights = kernels.pack_mlp(spec, theta.tensors)[None]

    plan.bind_accumulate(limit, spec.mom_decays, spec.rms_decays)
    plan.bind_apply(inputs, weights, spec.magnitude_rate, spec.feature_clip)
    plan.set_step(torch.zeros((), dtype=torch.int64, device=device))

    moved = counted(variant, dtype)
    operations: list[tuple[str, Callable[[], object], int, int | None]]
    if spec.stats == "lagged":
        operations = [("sweep", plan.sweep, moved.apply, moved.flops)]
    else:
        operations = [("accumulate", plan.run_accumulate, moved.accumulate, None)]
        operations += [("apply", plan.run_apply, moved.apply, moved.flops)]
    return [
        row("kernel", name, variant, layout, dtype, timer, timer.measure(operation), peaks, size, flops)
        for name, operation, size, flops in operations
    ]


def row(
    benchmark: str,
    name: str,
    variant: Variant | None,
    layout: Layout,
    dtype: torch.dtype,
    timer: Timer,
    timing: Timing,
    peaks: Peaks,
    bytes_per_param: int | None,
    flops_per_param: int | None = None,
    adamw: Timing | None = None,
) -> Row:
    """Times and shares, without the environment. What was not counted is None; other optimizers have no variant."""
    on_cuda = timer.device.type == "cuda"
    moved = None if bytes_per_param is None else bytes_per_param * layout.parameters / timing.median
    done = None if not flops_per_param else flops_per_param * layout.parameters / timing.median
    per_param = 1e9 / layout.parameters
    return {
        "benchmark": benchmark,
        "name": name,
        "preset": variant.preset if variant else "",
        "stats": variant.stats if variant else "",
        "state_dtype": variant.state_dtype if variant else "",
        "precision": variant.precision if variant else "",
        "layout": layout.name,
        "tensors": len(layout.shapes),
        "parameters": layout.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "device": timer.device.type,
        "threads": None if on_cuda else torch.get_num_threads(),
        "repeats": timer.repeats,
        "seconds": timing.median,
        "ns_per_param": timing.median * per_param,
        "ns_per_param_20": timing.low * per_param,
        "ns_per_param_80": timing.high * per_param,
        "host_seconds": timing.host,
        "device_alone": timing.alone if on_cuda else None,
        "times_adamw": None if adamw is None else timing.median / adamw.median,
        "bytes_per_param": bytes_per_param,
        "gb_per_s": None if moved is None else moved * 1e-9,
        "copy_gb_per_s": peaks.copy * 1e-9,
        "copy_share": None if moved is None else moved / peaks.copy,
        "flops_per_param": flops_per_param,
        "gflop_per_s": None if done is None else done * 1e-9,
        "peak_gflop_per_s": peaks.flops * 1e-9,
        "peak_share": None if done is None else done / peaks.flops,
    }
