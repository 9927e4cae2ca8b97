"""What is computed from times; never how long something took."""

import pytest
import torch

from lopt.benchmark import timing

CPU = torch.device("cpu")
MICRO = 1e-6


def test_quantiles_by_hand() -> None:
    found = timing.Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (found.low, found.median, found.high) == (2.0, 3.5, 5.0)
    assert timing.Timing.of([7.0]) == timing.Timing(7.0, 7.0, 7.0)


def test_every_repetition_is_flushed_and_the_first_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now, events = [0.0], []

    def operation() -> None:
        events.append("operation")
        now[0] += 100.0 if events.count("operation") <= timing.WARM_UP else 2.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.Timer, "flush", lambda _: events.append("flush"))
    assert timing.Timer(CPU, 3).measure(operation) == timing.Timing(2.0, 2.0, 2.0)
    assert events == ["flush", "operation"] * (timing.WARM_UP + 3)


def test_flush_covers_the_last_cache() -> None:
    size = timing.cache_bytes(CPU)
    assert 2**20 <= size <= 2**29
    assert timing.Timer(CPU, 1)._evicting.numel() * 4 == size
    assert timing.available_bytes(CPU) > 0


class Gpu:
    """A made-up GPU in torch.cuda's place: what the host starts runs in order, none before it was started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.free = 0.0  # of the host; when the device has done all it was given
        gpu, clock = self, 1e9

        class Event:
            def record(self) -> None:
                self.time = max(gpu.free, gpu.now)

            def query(self) -> bool:
                return self.time <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.time)

            def elapsed_time(self, other: "Event") -> float:
                return (other.time - self.time) * 1e3

        monkeypatch.setattr(timing, "_event", Event)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.now)
        monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda cycles: self.start(0.0, cycles / clock))
        self.timer = timing.Timer(CPU, 5)
        self.timer.device = torch.device("cuda", 0)
        monkeypatch.setattr(timing.Timer, "flush", lambda _: self.start(MICRO, 50 * MICRO))

    def start(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def wait(self) -> None:
        self.now = max(self.now, self.free)


def test_gpu_time_has_no_time_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty launches of 10 microseconds each on the host, 2 on the device, whose clock is a third of the highest."""
    gpu = Gpu(monkeypatch)
    found = gpu.timer.measure(lambda: [gpu.start(10 * MICRO, 2 * MICRO) for _ in range(40)])
    assert found.alone
    assert found.host == pytest.approx(400 * MICRO)
    assert (found.low, found.median, found.high) == pytest.approx((80 * MICRO,) * 3)


def test_a_first_call_that_takes_long_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, hosts = Gpu(monkeypatch), [0.5, 0.2]
    found = gpu.timer.measure(lambda: gpu.start(hosts.pop() if hosts else 3 * MICRO, 7 * MICRO))
    assert (found.host, found.median, found.alone) == (pytest.approx(3 * MICRO), pytest.approx(7 * MICRO), True)


def test_a_pause_that_was_too_short_is_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes longer when the device is busy than when it is not."""
    gpu = Gpu(monkeypatch)
    found = gpu.timer.measure(lambda: gpu.start(5e-3 if gpu.free > gpu.now else 3 * MICRO, 7 * MICRO))
    assert found.alone
    assert found.median == pytest.approx(7 * MICRO)


def test_what_waits_for_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def operation() -> None:
        gpu.start(10 * MICRO, 2 * MICRO)
        gpu.wait()
        gpu.start(10 * MICRO, 2 * MICRO)

    found = gpu.timer.measure(operation)
    assert not found.alone
    assert found.median == pytest.approx(14 * MICRO)
