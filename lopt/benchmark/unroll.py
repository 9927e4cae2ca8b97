"""Throughput of the fused unroll engine: inner steps per second and core, two processes at once, memory."""

import multiprocessing
import resource
import time

import torch

from lopt.benchmark.rows import Row
from lopt.benchmark.timing import Timing
from lopt.meta import engine
from lopt.theta import Theta

#: Layer widths and batch sizes: two tasks of the literature and a smaller one.
PROBLEMS = (((16, 16, 8), 16), ((64, 16, 10), 16), ((64, 32, 10), 64))


def measure(preset: str, sizes: tuple[int, ...], batch: int, steps: int, repeats: int) -> Row:
    """One row, without the environment: CPU time of one process, wall time of two at once against one."""
    timing = Timing.of([run(preset, sizes, batch, steps)[0] for _ in range(repeats)])
    before = peak_memory()
    run(preset, sizes, batch, steps, windows=10)
    growth = peak_memory() - before
    alone, together = wall_seconds(1, preset, sizes, batch, steps), wall_seconds(2, preset, sizes, batch, steps)
    return {
        "benchmark": "unroll",
        "preset": preset,
        "problem": f"{'-'.join(map(str, sizes))} batch {batch}",
        "steps": steps,
        "steps_per_second": steps / timing.median,
        "steps_per_second_20": steps / timing.high,
        "steps_per_second_80": steps / timing.low,
        "two_processes": 2.0 * alone / together,
        "memory_growth_kb": growth,
    }


def run(preset: str, sizes: tuple[int, ...], batch: int, steps: int, windows: int = 1) -> tuple[float, float]:
    """CPU seconds and wall seconds of one inner run, in windows of ``steps`` inner steps."""
    generator = torch.Generator().manual_seed(0)
    theta = Theta.init_adam(preset)
    data = tuple(
        (
            torch.randn(rows, sizes[0], generator=generator),
            torch.randint(sizes[-1], (rows,), generator=generator),
        )
        for rows in (512, 128, 256)
    )
    problem = engine.Problem(sizes, "relu", "softmax", batch, data)
    init = torch.randn(problem.num_params, generator=generator) * 0.1
    flat = theta.flatten()
    inner = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, init), (1, 2, 3), windows * steps)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(windows):
        engine.unroll(theta.spec, flat[None], [problem], [inner], steps, loss_every=10)
    return time.process_time() - cpu, time.perf_counter() - wall


def _worker(arguments: tuple[str, tuple[int, ...], int, int]) -> float:
    run(*arguments[:3], 50)  # warm
    return min(run(*arguments)[1] for _ in range(3))


def wall_seconds(processes: int, preset: str, sizes: tuple[int, ...], batch: int, steps: int) -> float:
    """Wall seconds of a run in each of ``processes`` at once, the slowest of them."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return max(pool.map(_worker, [(preset, sizes, batch, steps)] * processes, chunksize=1))


def peak_memory() -> int:
    """Peak resident memory of this process so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
