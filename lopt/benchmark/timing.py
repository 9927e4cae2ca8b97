"""Timing of one operation: warm-up, caches flushed before every repetition, median with 20% and 80% points."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

WARM_UP = 2  # repetitions that are not counted
HEAD_START = 2.0  # of the host before the GPU begins, in its own time for the operation
LONGEST_HEAD_START = 0.1  # seconds
HIGHEST_CLOCK = 3e9  # cycles per second; no GPU has more


@dataclass(frozen=True)
class Timing:
    """Seconds of an operation over the repetitions.

    Args:
        median, low, high: of the device; 20% of the repetitions are quicker than ``low``, 80% quicker than ``high``.
        host: median of what the host took to start the operation on a GPU; None on the CPU, which is the device.
        alone: whether the device never waited for the host.
    """

    median: float
    low: float
    high: float
    host: float | None = None
    alone: bool = True

    @classmethod
    def of(cls, seconds: Sequence[float], host: float | None = None, alone: bool = True) -> "Timing":
        """From the seconds of every repetition."""
        cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else list(seconds) * 4
        return cls(statistics.median(seconds), cuts[0], cuts[-1], host, alone)


class Timer:
    """Times operations on one device.

    Args:
        device: on CUDA, time is taken between events of the current stream, and the device pauses before the first of
            them until the host has started the whole operation: no time of the host lies between them.
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
        if self.device.type == "cuda":
            return self._on_cuda(operation)
        return Timing.of(self._on_cpu(operation)[WARM_UP:])

    def _on_cpu(self, operation: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(WARM_UP + self.repeats):
            self.flush()
            start = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _on_cuda(self, operation: Callable[[], object]) -> Timing:
        host = statistics.median(self._on_host(operation)[WARM_UP:])
        pause = min(HEAD_START * host + 1e-4, LONGEST_HEAD_START)
        while True:
            seconds, alone = self._behind_pauses(operation, pause)
            if alone or pause == LONGEST_HEAD_START:  # or one that waits for the device itself
                return Timing.of(seconds, host, alone)
            pause = min(10 * pause, LONGEST_HEAD_START)

    def _on_host(self, operation: Callable[[], object]) -> list[float]:
        seconds = []
        for _ in range(WARM_UP + self.repeats):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _behind_pauses(self, operation: Callable[[], object], pause: float) -> tuple[list[float], bool]:
        """Seconds between events, and whether each operation was started before the first of its events came."""
        seconds, alone = [], True
        for _ in range(self.repeats):
            self.flush()
            torch.cuda._sleep(round(pause * HIGHEST_CLOCK))  # type: ignore[no-untyped-call]
            start, end = _event(), _event()
            start.record()
            operation()
            end.record()
            alone = alone and not start.query()  # type: ignore[no-untyped-call]
            end.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3)
        return seconds, alone


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
