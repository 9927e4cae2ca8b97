"""What does theta lose when workers do not wait for each other? Validation of both at equal inner steps, by seed.

python benchmarks/asynchrony.py [--out FILE] [--seeds 5] [--inner-steps 150000]

Two small recipes, of whole runs and of windows, each without staleness and with 5, on 32 simulated workers: the
slowest takes four times as long as the quickest, and one unit in twenty takes eight times as long again.
"""

import argparse
import csv
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lopt.meta import trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.metrics import read_metrics
from lopt.meta.recipes import recipe
from lopt.meta.simulated import Simulated

WORKERS = 32
PHASES = {
    "whole runs": Phase(1.0, (20, 100), "mlp", max_params=500),
    "windows": Phase(1.0, (60, 200), "mlp", "nres", window=20, max_params=500),
}


def seconds(worker: int, index: int) -> float:
    """That a worker takes for a unit."""
    return (1.0 + 3.0 * worker / (WORKERS - 1)) * (8.0 if index * 2654435761 % 2**32 < 2**32 / 20 else 1.0)


def one(config: MetaTrainConfig) -> dict[str, Any]:
    """A run, as a row."""
    executor = Simulated(WORKERS, seconds)
    with tempfile.TemporaryDirectory() as out:
        theta = trainer.run(config, out, executor=executor, console=Console(file=io.StringIO()))
        lines = read_metrics(Path(out))[1:]
    mean: Callable[[str], float] = lambda name: sum(line.get(name, 0) for line in lines) / len(lines)  # noqa: E731
    return {
        "seed": config.seed,
        "staleness": config.staleness,
        "first": theta.provenance["validation"]["first"],
        "validation": lines[-1]["validation"],
        "iterations": len(lines),
        "mean_staleness": mean("staleness"),
        "dropped": mean("dropped"),
        "simulated_seconds": executor.now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--inner-steps", type=int, default=150_000)
    arguments = parser.parse_args()
    rows = []
    for name, phase in PHASES.items():
        for staleness in (None, 5):
            own = []
            for seed in range(arguments.seeds):
                settings = {"phases": (phase,), "validate_every": 10**9, "validation_tasks": 32, "seed": seed}
                config = recipe("tiny", **settings, inner_steps=arguments.inner_steps, staleness=staleness)
                own.append({"recipe": name, "inner_steps": arguments.inner_steps, **one(config)})
                print(own[-1], flush=True)
            rows += own
            values = [row["validation"] for row in own]
            print(f"{name}, staleness {staleness}: {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}")
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
