"""The two peaks that kernels are compared with, measured on the same device in the same run."""

from dataclasses import dataclass

import torch

from lopt import kernels
from lopt.benchmark.timing import Timer, cache_bytes


@dataclass(frozen=True)
class Peaks:
    """Bytes per second copied, and floating-point operations per second."""

    copy: float
    flops: float


def measure_peaks(device: torch.device, repeats: int = 7) -> Peaks:
    """Measure both, the best of some repetitions.

    Copy: bytes read and written by a copy or by an update in place, whichever is quicker, of buffers that no cache
    holds. Arithmetic: on the CPU multiply-adds of the selected instruction set in registers (csrc/cpu/peak_cpu.cpp) by
    all threads, on CUDA a float32 matrix product without TF32.
    """
    timer = Timer(device, repeats)
    source = torch.ones(2 * cache_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    quickest = min(
        timer.measure(operation).low for operation in (lambda: target.copy_(source), lambda: source.mul_(1.0))
    )
    return Peaks(moved / quickest, _matmul_rate(timer) if device.type == "cuda" else _cpu_rate(repeats))


def _cpu_rate(repeats: int) -> float:
    rate = kernels.module_of("cpu").multiply_add_rate
    return max(float(rate(torch.get_num_threads(), 0.02)) for _ in range(repeats))


def _matmul_rate(timer: Timer, size: int = 4096) -> float:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        a, b = (torch.randn(size, size, device=timer.device) for _ in range(2))
        return 2.0 * size**3 / timer.measure(lambda: a @ b).low
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
