"""What the learner of meta-training costs with a thousand workers, who are simulated: do they wait for it?

python benchmarks/learner.py [--out FILE] [--workers 1000] [--seconds 0.1]

A load generator answers in place of units, with numbers of no meaning; all else is as in a run: units are pickled and
their answers unpickled, perturbations drawn again, theta and its moments moved, metrics written. A worker takes
``--seconds`` for a unit, log-normal with a deviation of a fifth, in simulated time, in which the learner's own CPU time
counts, and other work on the machine does not. ``units_per_second`` is what the learner could take, one over its CPU
seconds per unit, ``overhead`` the share of their time for which workers wait for it. ``perturbation_us``, measured in
the same run, is what drawing one perturbation takes, the largest part; on a busy machine both are larger.
"""

import argparse
import io
import math
import pickle
import random
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lopt.benchmark.rows import environment
from lopt.meta import pairs, trainer
from lopt.meta.asynchronous import Estimate, Window
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.es import ESTIMATORS, EstimatorName
from lopt.meta.executors import Feed, kept
from lopt.meta.metrics import read_metrics
from lopt.meta.pairs import Result, Score, Shared
from lopt.meta.simulated import Simulated
from lopt.meta.units import Units
from lopt.tables import append_csv

PROBES = 5000
WINDOWS = 10  # of a run
THETAS = 10  # of so many iterations units are under way
STEPS = 100  # inner steps that a unit is said to have made


def answer(shared: Shared, item: Window | int) -> Any:
    """What a unit could have given."""
    if isinstance(item, int):
        return [Score(0.0, 0.0)] * len(pairs.settings(shared.config)), 0.0
    key = shared.iteration, item.group
    here = kept()
    keys = (*here.value, key) if here.value and len(here.value) < WINDOWS else (key,)
    here.value = keys
    used = ESTIMATORS[shared.config.phases[0].estimator].directions(keys)
    found = tuple(random.gauss(0.0, 0.01) for _ in range(shared.config.pairs_per_task))
    result = Result(*key, used, "none", found, 0.0, 0, STEPS, 0.0, None, here.worker, ended=len(keys) == WINDOWS)
    return Estimate(result, item.asked, None)


class Load(Simulated):
    """Workers that answer so, to whom units travel as to processes."""

    def flow(self, function: Any, units: Iterator[Any]) -> Generator[tuple[int, Any], None, None]:
        feed = Feed(answer, units, pickle.dumps)

        def sent() -> Iterator[tuple[Any, Any]]:
            while (unit := feed.next()) is not None:
                yield unit.common, unit.message

        worlds: dict[bytes, Units] = {}

        def reply(common: bytes, message: bytes) -> bytes:
            if common not in worlds:
                worlds[common] = Units(common)
                if len(worlds) > THETAS:
                    del worlds[next(iter(worlds))]
            return pickle.dumps(worlds[common].run(message))

        for index, found in super().flow(reply, sent()):
            yield index, pickle.loads(found)


def measure(workers: int, seconds: float, estimator: EstimatorName, iterations: int, groups: int) -> dict[str, float]:
    """One run of ``iterations``."""
    window = None if estimator == "es" else 10
    config = MetaTrainConfig(
        inner_steps=iterations * groups * STEPS,
        phases=(Phase(1.0, (100, 100), "all", estimator, window),),
        init="default",
        pairs=groups,
        validation_tasks=1,
        validate_every=10**9,
        staleness=5,
    )
    durations = np.random.default_rng(0).lognormal(math.log(seconds), 0.2, size=4096).tolist()
    load = Load(workers, lambda worker, index: durations[(index * 7 + worker) % 4096], time.process_time)
    num_floats = len(trainer.start_theta(config).flatten())
    clock = time.process_time()
    for number in range(PROBES):
        pairs.perturbation(config, 0, number, num_floats)
    perturbation = time.process_time() - clock
    with tempfile.TemporaryDirectory() as out:
        trainer.run(config, out, executor=load, console=Console(file=io.StringIO()))
        lines = read_metrics(Path(out))[1:]
    units = sum(groups + line["dropped"] for line in lines)
    return {
        "workers": workers,
        "seconds": seconds,
        "groups": groups,
        "floats": num_floats,
        "units": units,
        "dropped": sum(line["dropped"] for line in lines) / units,
        "staleness": sum(line["staleness"] for line in lines) / len(lines),
        "cpu_us_per_unit": load.spent / units * 1e6,
        "perturbation_us": perturbation / PROBES * 1e6,
        "units_per_second": units / load.spent,
        "overhead": load.waited / (load.now * workers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=60)
    arguments = parser.parse_args()
    estimators: tuple[EstimatorName, ...] = ("es", "nres", "pes")
    for estimator in estimators:
        found = measure(arguments.workers, arguments.seconds, estimator, arguments.iterations, arguments.groups)
        row = {"benchmark": "learner", "estimator": estimator, **found, **environment(torch.device("cpu"))}
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
        if arguments.out is not None:
            append_csv(arguments.out, [row])


if __name__ == "__main__":
    main()
