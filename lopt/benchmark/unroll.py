"""Throughput of inner runs: of the fused engine per core, with two processes at once, and its memory; of the torch
unroll with many runs at once against one by one."""

import resource
import time
from contextlib import closing

import torch

from lopt.benchmark.rows import Row
from lopt.benchmark.timing import Timing
from lopt.meta import engine
from lopt.meta import unroll as torch_unroll
from lopt.meta.executors import LocalProcesses
from lopt.rule import Theta, unflatten
from lopt.tasks import sample_task
from lopt.tasks.families import Family, with_batch_size
from lopt.tasks.network import perceptron

#: Layer widths and batch sizes: two tasks of the literature and a smaller one.
PROBLEMS = (((16, 16, 8), 16), ((64, 16, 10), 16), ((64, 32, 10), 64))


#: A small task of every family with more than perceptrons: the seed it is sampled by.
TORCH_TASKS: dict[Family, int] = {
    "mlp": 36,
    "mlp_ae": 15,
    "mlp_vae": 34,
    "conv_pooling": 0,
    "conv_fc": 12,
    "nvp": 25,
    "maf": 17,
    "char_rnn_language_model": 10,
    "word_rnn_language_model": 20,
    "rnn_text_classification": 20,
    "quadratic": 5,
    "losg_tasks": 22,
    "transformer_language_model": 10,
    "vit": 34,
    "noisy_quadratic": 0,
}
RUNS = 32  # at once


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


def problem_of(sizes: tuple[int, ...], batch: int) -> tuple[engine.Problem, torch.Tensor]:
    """A perceptron with random data, and initial parameters."""
    generator = torch.Generator().manual_seed(0)
    data = tuple(
        (
            torch.randn(rows, sizes[0], generator=generator),
            torch.randint(sizes[-1], (rows,), generator=generator),
        )
        for rows in (512, 128, 256)
    )
    problem = engine.Problem(perceptron(sizes, "relu"), batch, data)
    return problem, torch.randn(problem.num_params, generator=generator) * 0.1


def run(preset: str, sizes: tuple[int, ...], batch: int, steps: int, windows: int = 1) -> tuple[float, float]:
    """CPU seconds and wall seconds of one inner run, in windows of ``steps`` inner steps."""
    theta = Theta.init_adam(preset)
    problem, init = problem_of(sizes, batch)
    flat = theta.flatten()
    inner = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, init), (1, 2, 3), windows * steps)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(windows):
        engine.unroll(theta.spec, flat[None], [problem], [inner], steps, loss_every=10)
    return time.process_time() - cpu, time.perf_counter() - wall


def _worker(shared: tuple[str, tuple[int, ...], int, int], _: int) -> float:
    run(*shared[:3], 50)  # warm
    return min(run(*shared)[1] for _ in range(3))


def wall_seconds(processes: int, preset: str, sizes: tuple[int, ...], batch: int, steps: int) -> float:
    """Wall seconds of a run in each of ``processes`` at once, the slowest of them."""
    with closing(LocalProcesses(processes)) as executor:
        return max(executor.map(_worker, (preset, sizes, batch, steps), range(processes)))


def peak_memory() -> int:
    """Peak resident memory of this process so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_torch(preset: str, family: Family, steps: int, repeats: int) -> Row:
    """One row, without the environment: ``RUNS`` runs at once, under thetas that differ, and one of them alone.

    Minibatches have at most 16 rows of 16 symbols; steps are counted for every run, and losses on the way are in them.
    """
    task = with_batch_size(sample_task(TORCH_TASKS[family], [family]), 16, 16)
    theta = Theta.init_adam(preset)
    noise = torch.randn(RUNS, theta.num_floats, generator=torch.Generator().manual_seed(0))
    weights = unflatten(theta.spec, theta.flatten() + 0.01 * noise)
    run = torch_unroll.Run(task, 0, steps, loss_every=10)

    def seconds(runs: int) -> Timing:
        some = {name: value[:runs] for name, value in weights.items()}
        times = []
        for _ in range(repeats + 1):
            state, began = torch_unroll.start(theta.spec, some, run), time.perf_counter()
            torch_unroll.unroll(theta.spec, some, run, state, steps)
            times.append(time.perf_counter() - began)
        return Timing.of(times[1:])

    together, alone = seconds(RUNS), seconds(1)
    return {
        "benchmark": "torch-unroll",
        "name": family,
        "preset": preset,
        "problem": task.name,
        "parameters": task.num_params,
        "runs": RUNS,
        "steps": steps,
        "steps_per_second": RUNS * steps / together.median,
        "steps_per_second_20": RUNS * steps / together.high,
        "steps_per_second_80": RUNS * steps / together.low,
        "steps_per_second_alone": steps / alone.median,
        "over_alone": RUNS * alone.median / together.median,
        "megabytes_per_run": torch_unroll.bytes_per_run(theta.spec, task) / 1e6,
    }
