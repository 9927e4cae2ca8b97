#!/usr/bin/env python3
"""Inner steps per second of the unroll engine, many runs at once, a block of the GPU for each, beside predictions.

    python benchmarks/unroll_gpu.py --backend cuda --out out/gpu/unroll.csv

First some runs are compared with the CPU's. Rows go to a CSV file with machine and versions, and are printed.
"""

import argparse
import csv
import time
from pathlib import Path

import torch

from lopt import Theta
from lopt.benchmark.rows import environment
from lopt.benchmark.unroll import PROBLEMS, problem_of
from lopt.meta import engine
from lopt.tables import append_csv

PREDICTED = Path(__file__).resolve().parents[1] / "benchmarks/results/unroll_predicted.csv"
CHECKED = 20  # steps


def predictions() -> dict[str, float]:
    """Problem -> predicted inner steps per second."""
    if not PREDICTED.is_file():
        return {}
    with PREDICTED.open(newline="") as file:
        return {row["problem"]: float(row["predicted_steps_per_second"]) for row in csv.DictReader(file)}


def unroll(
    theta: Theta, problem: engine.Problem, init: torch.Tensor, runs: int, steps: int, backend: str
) -> tuple[torch.Tensor, float]:
    """Train losses ``[runs, steps]`` under thetas that differ, and seconds."""
    noise = 0.01 * torch.randn(runs, theta.num_floats, generator=torch.Generator().manual_seed(0))
    thetas = theta.flatten() + noise
    states = torch.stack([engine.start(theta.spec, problem, row, init) for row in thetas]).to(engine.device_of(backend))
    some = [engine.EngineRun(0, row, states[row], (1, 2, 3), steps) for row in range(runs)]
    clock = time.perf_counter()
    _, train = engine.unroll(theta.spec, thetas, [problem], some, steps, loss_every=steps, backend=backend)
    return train, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cpu", "cuda", "sim"), default="cuda")
    parser.add_argument("--runs", type=int, default=264, help="at once; of one multiprocessor there is room for two")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    theta, ahead = Theta.load("default"), predictions()
    for sizes, batch in PROBLEMS:
        problem, init = problem_of(sizes, batch)
        name = f"{'-'.join(map(str, sizes))} batch {batch}"
        one, other = (unroll(theta, problem, init, 2, CHECKED, backend)[0] for backend in ("cpu", options.backend))
        apart = float((one - other).abs().max())
        unroll(theta, problem, init, options.runs, 10, options.backend)
        seconds = unroll(theta, problem, init, options.runs, options.steps, options.backend)[1]
        rate = options.runs * options.steps / seconds
        predicted = ahead.get(name)
        append_csv(
            options.out,
            [
                {
                    "benchmark": "unroll-gpu",
                    "backend": options.backend,
                    "problem": name,
                    "runs": options.runs,
                    "steps": options.steps,
                    "seconds": seconds,
                    "steps_per_second": rate,
                    "predicted_steps_per_second": predicted,
                    "apart_from_cpu": apart,
                    **environment(engine.device_of(options.backend)),
                }
            ],
        )
        said = "" if predicted is None else f", predicted at most {predicted:,.0f}"
        print(
            f"{name}: {rate:,.0f} inner steps/s of {options.runs} runs{said}; train losses of {CHECKED} steps within "
            f"{apart:.1e} of the CPU's",
            flush=True,
        )
        if not apart < 1e-4:
            raise SystemExit(f"{name}: train losses are {apart:.1e} from the CPU's, expected less than 1e-4")


if __name__ == "__main__":
    main()
