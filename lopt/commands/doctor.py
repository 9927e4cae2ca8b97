"""``lopt doctor``: what is installed, what was compiled, whether all implementations compute the same."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lopt import kernels
from lopt.commands.common import Command, Outcome, say, show_table
from lopt.optimizer import LearnedOptimizer
from lopt.provenance import versions
from lopt.rule import PRESETS, Theta

#: Largest error of a parameter after the self-test, relative to the largest update, that still passes.
TOLERANCE = 1e-4

#: The self-test: number of steps, and parameters of several ranks with sizes around the kernels' blocks.
STEPS = 3
SHAPES = ((), (1,), (31,), (129,), (33, 17), (5, 4, 3, 3))


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Say what is installed and compiled, and test every implementation against the reference.

    The exit code is 0 when every implementation that can run here agrees with the reference, and 1 otherwise.
    """

    def run(self, console: Console) -> Outcome:
        facts = {**versions(), **compiled(), "devices": devices()}
        for name, value in facts.items():
            say(console, f"{name + ':':<13} {', '.join(value) if isinstance(value, list) else value}")
        tests = [self_test(preset, impl) for preset in PRESETS for impl in ("cpu", "sim", "cuda")]
        say(console, f"Self-test, {STEPS} steps: largest difference from the reference over largest update")
        rows = [
            [test["impl"], test["preset"], f"{test['error']:.1e}" if "error" in test else "", test["result"]]
            for test in tests
        ]
        show_table(console, ["implementation", "theta", f"error (at most {TOLERANCE:g})", "result"], rows)
        failed = sum(test["result"].startswith("FAILED") for test in tests)
        return Outcome(1 if failed else 0, {"command": "doctor", **facts, "self_tests": tests})


def compiled() -> dict[str, str]:
    """What the extensions were built with."""
    if kernels.NOT_BUILT:
        return {"kernels": f"none, impl='auto' is the reference: {kernels.NOT_BUILT}"}
    _C = kernels._C
    cuda = f"CUDA {_C.cuda_version} for {_C.cuda_archs}" if _C.has_cuda else f"built without CUDA: {_C.why_not_cuda}"
    simd = f"{_C.simd_selected()} of {', '.join(_C.simd_available())}"
    return {"compiler": f"{_C.compiler}, {_C.build_type}", "cuda kernels": cuda, "cpu kernels": simd}


def devices() -> list[str]:
    """The processor and the GPUs that torch can use."""
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]


def self_test(preset: str, impl: str) -> dict[str, Any]:
    """A few steps of a random theta on random gradients, by ``impl`` and by the reference in float64.

    Returns:
        ``impl``, ``preset``, ``result`` ("ok", "FAILED" or "not here", with the reason), ``error`` if it ran.
    """
    test: dict[str, Any] = {"impl": impl, "preset": preset}
    missing = not_here(impl)
    if missing:
        return {**test, "result": f"not here: {missing}"}
    try:
        actual = _steps(preset, impl, "cuda" if impl == "cuda" else "cpu", torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        return {**test, "result": f"FAILED: {error}"}
    expected = _steps(preset, "reference", "cpu", torch.float64)
    start = _params(torch.float64, "cpu")
    update = max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True))
    worst = max(float((a.cpu() - b).abs().max()) for a, b in zip(actual, expected, strict=True)) / update
    return {**test, "error": worst, "result": "ok" if worst <= TOLERANCE else "FAILED"}


def not_here(impl: str) -> str:
    """Why an implementation cannot run on this machine; empty where it can."""
    if kernels.NOT_BUILT:
        return "lopt was not built"
    if impl == "cuda" and not kernels.has_cuda():
        return "built without CUDA"
    if impl == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    try:
        kernels.module_of(impl)
        if impl == "cuda":
            kernels.check_gpu(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        return "for tests only (LOPT_SIM=ON)" if impl == "sim" else str(error)
    return ""


def _params(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def _steps(preset: str, impl: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The parameters after the self-test's steps."""
    params = [param.requires_grad_() for param in _params(dtype, device)]
    optimizer = LearnedOptimizer(params, Theta.init(preset), total_steps=STEPS, impl=impl)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step(loss=1.0 / (1 + step))
    return [param.detach() for param in params]
