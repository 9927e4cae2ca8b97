"""Timing of one operation: warm-up, caches flushed before every repetition, median with 20% and 80% points."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

WARM_UP = 2  # repetitions that are not counted


@dataclass(frozen=True)
class Timing:
    """Seconds of an operation over the repetitions."""

    median: float
    low: float  # 20% of the repetitions are quicker
    high: float  # 80% of them are quicker

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """From the seconds of every repetition."""
        cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else list(seconds) * 4
        return cls(statistics.median(seconds), cuts[0], cuts[-1])


class Timer:
    """Times operations on one device.

    Args:
        device: on CUDA, time is taken between events of the current stream.
        repeats: counted repetitions.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._evicting = torch.zeros(cache_bytes(device) // 4, device=device)

    def flush(self) -> None:
        """Leave nothing of an operation's operands in the caches."""
        self._evicting.add_(1.0)

    def measure(self, operation: Callable[[], object]) -> Timing:
        """Time ``operation``; what it returns is dropped."""
        seconds = self._on_cuda(operation) if self.device.type == "cuda" else self._on_cpu(operation)
        return Timing.of(seconds[WARM_UP:])

    def _on_cpu(self, operation: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(WARM_UP + self.repeats):
            self.flush()
            start = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _on_cuda(self, operation: Callable[[], object]) -> list[float]:
        events = []
        for _ in range(WARM_UP + self.repeats):
            self.flush()
            pair = _event(), _event()
            pair[0].record()
            operation()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cache_bytes(device: torch.device) -> int:
    """More than the last cache of the device holds: twice that of a GPU, four times that of a processor."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        last = int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, ValueError, KeyError):
        last = 2**25
    return min(4 * last, 2**29)


def available_bytes(device: torch.device) -> int:
    """Memory that can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**62
