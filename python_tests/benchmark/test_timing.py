"""What is computed from times; never how long something took."""

import pytest
import torch

from lopt.benchmark import timing

CPU = torch.device("cpu")


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
