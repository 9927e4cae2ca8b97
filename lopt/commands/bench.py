"""``lopt bench unroll``: how quick the fused unroll engine is on this machine."""

import csv
import datetime
import multiprocessing
import platform
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from lopt import ops
from lopt.commands.common import Command, Outcome, say, show_table
from lopt.meta import engine
from lopt.meta.provenance import commit, versions
from lopt.theta import Theta

#: Layer widths and batch sizes: two tasks of the literature and a smaller one.
PROBLEMS = (((16, 16, 8), 16), ((64, 16, 10), 16), ((64, 32, 10), 64))


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure inner steps per second and core of the fused unroll engine.

    Relu perceptrons with a softmax loss on random data; a validation loss for the optimizer and an outer_valid loss
    every 10 steps. Median with 20% and 80% points over the repeats, from the CPU time of one process; work done by two
    processes at once against one, from wall time; growth of the peak memory at a ten times longer horizon.
    """

    what: Annotated[Literal["unroll"], tyro.conf.Positional]
    """What to measure."""

    steps: int = 4000
    """Inner steps of one measurement of the compact preset; the paper preset takes a fifth."""

    repeats: int = 7
    """Measurements of each row."""

    presets: tuple[str, ...] = ("compact", "paper")
    """Architectures of the learned optimizer."""

    out: Path | None = None
    """Append the rows to this CSV file."""

    def run(self, console: Console) -> Outcome:
        if self.steps < 50 or self.repeats < 1:
            raise ValueError(f"steps, repeats: expected at least 50 and 1, got {self.steps} and {self.repeats}")
        rows = []
        for preset in self.presets:
            steps = (self.steps if preset == "compact" else self.steps // 5) // 10 * 10
            for sizes, batch in PROBLEMS:
                rows.append(self._row(preset, sizes, batch, steps))
        show_table(
            console,
            ["problem", "steps/s per core", "20% to 80%", "two processes", "memory, 10 x horizon"],
            [
                [
                    f"{row['preset']} {row['problem']}",
                    f"{row['steps_per_second']:,.0f}",
                    f"{row['steps_per_second_20']:,.0f} to {row['steps_per_second_80']:,.0f}",
                    f"x {row['two_processes']:.2f}",
                    f"+ {row['memory_growth_kb']:,} kB",
                ]
                for row in rows
            ],
        )
        if self.out is not None:
            _append_csv(self.out, rows)
            say(console, f"Appended {len(rows)} rows to {self.out}")
        return Outcome(0, {"command": "bench unroll", "rows": rows})

    def _row(self, preset: str, sizes: tuple[int, ...], batch: int, steps: int) -> dict[str, Any]:
        seconds = [measure(preset, sizes, batch, steps)[0] for _ in range(self.repeats)]
        rates = sorted(steps / second for second in seconds)
        cuts = statistics.quantiles(rates, n=5, method="inclusive") if len(rates) > 1 else rates * 4
        before = peak_memory()
        measure(preset, sizes, batch, steps, windows=10)
        growth = peak_memory() - before
        alone, together = wall_seconds(1, preset, sizes, batch, steps), wall_seconds(2, preset, sizes, batch, steps)
        return {
            "benchmark": "unroll",
            "preset": preset,
            "problem": f"{'-'.join(map(str, sizes))} batch {batch}",
            "steps": steps,
            "steps_per_second": statistics.median(rates),
            "steps_per_second_20": cuts[0],
            "steps_per_second_80": cuts[-1],
            "two_processes": 2.0 * alone / together,
            "memory_growth_kb": growth,
            "machine": cpu_name(),
            "simd": ops.simd_selected(),
            "load": round(_load(), 2),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            **{f"version_{name}": version for name, version in versions().items()},
        }


def measure(preset: str, sizes: tuple[int, ...], batch: int, steps: int, windows: int = 1) -> tuple[float, float]:
    """CPU seconds and wall seconds of one run, in windows of ``steps`` inner steps."""
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
    run = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, init), (1, 2, 3), windows * steps)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(windows):
        engine.unroll(theta.spec, flat[None], [problem], [run], steps, loss_every=10)
    return time.process_time() - cpu, time.perf_counter() - wall


def _worker(arguments: tuple[str, tuple[int, ...], int, int]) -> float:
    measure(*arguments[:3], 50)  # warm
    return min(measure(*arguments)[1] for _ in range(3))


def wall_seconds(processes: int, preset: str, sizes: tuple[int, ...], batch: int, steps: int) -> float:
    """Wall seconds of a run in each of ``processes`` at once, the slowest of them."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return max(pool.map(_worker, [(preset, sizes, batch, steps)] * processes, chunksize=1))


def peak_memory() -> int:
    """Peak resident memory of this process so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu_name() -> str:
    """Model of the processor and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0]} x {len(models)}" if models else platform.processor() or platform.machine()


def _load() -> float:
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return float("nan")


def _append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
