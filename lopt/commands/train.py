"""``lopt train``: a real model on real data, with the learned optimizer beside Adam and AdamW-cosine."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from lopt.commands.common import Command, Outcome, OutFolder, Seed, say, show_table, write_json
from lopt.commands.progress import Status, progress
from lopt.commands.weights import describe_theta
from lopt.evaluation import plots
from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.runs import OptimizerFactory
from lopt.evaluation.training import Record, TrainResult, mlp, train
from lopt.figures import require_matplotlib
from lopt.optimizer import LearnedOptimizer
from lopt.provenance import commit, versions
from lopt.tasks.datasets import Dataset, DatasetName, load

OptimizerName = Literal["lopt", "adam", "adamw-cosine"]

LABELS: dict[OptimizerName, str] = {
    "lopt": "lopt (learned)",
    "adam": "Adam 1e-3",
    "adamw-cosine": "AdamW 1e-3 cosine",
}


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a perceptron on real data with the learned optimizer and with its rivals, and compare them.

    Every optimizer starts from the same weights and sees the same minibatches. Prints a table; writes
    curves.png and results.json.
    """

    dataset: DatasetName | None = None
    """Which data: digits comes with scikit-learn and is the default; the other two are IDX files."""

    data: Path | None = None
    """Folder with the four IDX files (.gz or not) of MNIST, Fashion-MNIST or another data set like them."""

    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers; give none for a linear model."""

    steps: int = 1000
    """Length of a run in steps."""

    epochs: float | None = None
    """Length of a run in passes over the training data, instead of --steps."""

    batch_size: int = 32
    """Rows in a minibatch."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """One run per optimizer and seed; a seed decides initial weights and minibatches."""

    optimizers: tuple[OptimizerName, ...] = ("lopt", "adam", "adamw-cosine")
    """Which optimizers to run."""

    theta: str = "default"
    """Meta-parameters of the learned optimizer: a shipped name (see lopt weights show) or a file."""

    impl: Literal["auto", "cuda", "cpu", "reference", "sim"] = "auto"
    """Implementation of the learned optimizer."""

    lr: float = 1.0
    """Multiplier of the learned optimizer's steps; it has no learning rate to tune."""

    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""

    threads: int = 1
    """Processor threads. One is quickest for small models, and the quickest by far on a busy machine."""

    out: OutFolder = Path("runs/train")
    """Folder for curves.png and results.json."""

    plot: bool = True
    """Do not draw curves.png, which needs matplotlib."""

    def __post_init__(self) -> None:
        for name in ("seeds", "optimizers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected at least one and none twice, got {list(values)}")
        for name in ("steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not all(width >= 1 for width in self.hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {list(self.hidden)}")
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise ValueError(f"epochs: expected a positive number, got {self.epochs}")

    def run(self, console: Console) -> Outcome:
        if self.plot:
            require_matplotlib("--no-plot")
        data = load(self.dataset, self.data).to(checked_device(self.device))
        steps = self.steps
        if self.epochs is not None:
            steps = math.ceil(self.epochs * (len(data.train.targets) // self.batch_size))
        makers: dict[OptimizerName, OptimizerFactory] = {
            name: partial(make_optimizer, name) for name in ("adam", "adamw-cosine")
        }
        learned: dict[str, Any] | None = None
        if "lopt" in self.optimizers:
            makers["lopt"], learned = self._learned_optimizer()

        model = " → ".join(map(str, (data.train.inputs[0].numel(), *self.hidden, data.num_classes)))
        title = f"{data.name}, perceptron {model}, batch {self.batch_size}"
        say(console, f"{title}, {steps} steps, seeds {' '.join(map(str, self.seeds))}")
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            runs = self._train(console, data, steps, makers)
        finally:
            torch.set_num_threads(threads)
        summary = {name: _summary(results) for name, results in runs.items()}

        say(console, "Mean ± standard deviation over the seeds:" if len(self.seeds) > 1 else "One seed:")
        rows = [
            [LABELS[name], *(_cell(quantities[key], form, spread) for key, (_, form, spread) in COLUMNS.items())]
            for name, quantities in summary.items()
        ]
        show_table(console, ["optimizer", *(header for header, *_ in COLUMNS.values())], rows)
        if learned is not None:
            say(console, f"{LABELS['lopt']}: {learned['theta']}, implementation {learned['implementation']}")
        numbers = {
            "command": "train",
            "options": dataclasses.asdict(self),
            "versions": versions(),
            "commit": commit(),
            "dataset": {"name": data.name, "source": data.source, "rows": len(data.train.targets)},
            "learned_optimizer": learned,
            "summary": summary,
            "runs": [
                {"optimizer": name, "seed": seed, **dataclasses.asdict(result)}
                for name, results in runs.items()
                for seed, result in zip(self.seeds, results, strict=True)
            ],
        }
        write_json(self.out / "results.json", numbers)
        written = "results.json"
        if self.plot:
            curves = {LABELS[name]: results for name, results in runs.items()}
            seeds = f"{len(self.seeds)} seeds, mean and range" if len(self.seeds) > 1 else "one seed"
            plots.training_curves(curves, f"{title}, {seeds}", self.out / "curves.png")
            written += " and curves.png"
        say(console, f"Wrote {written} to {self.out}")
        return Outcome(0, numbers)

    def _learned_optimizer(self) -> tuple[OptimizerFactory, dict[str, Any]]:
        """How the learned optimizer is made, and what to say about it; fails here if an option is wrong."""

        def make(params: Iterable[Tensor], total_steps: int) -> torch.optim.Optimizer:
            return LearnedOptimizer(params, self.theta, total_steps=total_steps, lr=self.lr, impl=self.impl)

        probe = make([torch.zeros(1, device=self.device, requires_grad=True)], 1)
        assert isinstance(probe, LearnedOptimizer)
        return make, {
            "theta": describe_theta(self.theta, probe.theta),
            "provenance": probe.theta.provenance,
            "implementation": probe.implementation,
        }

    def _train(
        self, console: Console, data: Dataset, steps: int, makers: dict[OptimizerName, OptimizerFactory]
    ) -> dict[OptimizerName, list[TrainResult]]:
        """All runs of all optimizers, with a bar per optimizer on a terminal and a line per run elsewhere."""
        runs: dict[OptimizerName, list[TrainResult]] = {}
        inputs = data.train.inputs[0].numel()
        for name in self.optimizers:
            with progress(console, f"{LABELS[name]}, steps") as status:
                runs[name] = []
                for seed in self.seeds:
                    done = steps * len(runs[name])

                    def on_record(record: Record, status: Status = status, done: int = done) -> None:
                        status.update(done + record.step, steps * len(self.seeds), _state(record))

                    model = mlp(inputs, self.hidden, data.num_classes, seed).to(self.device)
                    result = train(
                        model,
                        data,
                        makers[name],
                        steps=steps,
                        batch_size=self.batch_size,
                        seed=seed,
                        on_record=on_record,
                    )
                    runs[name].append(result)
                    if not console.is_terminal:
                        state = f"{_state(result.final)}, {result.seconds:.1f} s"
                        say(console, f"{LABELS[name]}, seed {seed}: {state}")
        return runs


#: Quantities of the table: key in the JSON summary -> (header, format, whether to show the spread over seeds).
COLUMNS: dict[str, tuple[str, str, bool]] = {
    "train_loss": ("train loss", "{:.3f}", True),
    "test_loss": ("test loss", "{:.3f}", True),
    "test_accuracy": ("test acc.", "{:.1%}", True),
    "seconds": ("seconds", "{:.2f}", False),
    "ms_per_step": ("ms/step", "{:.3f}", False),
}


def checked_device(name: str) -> torch.device:
    """The device of that name; ValueError when it does not exist here."""
    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (str(device) not in usable and not (name == "cuda" and len(usable) > 1)):
        raise ValueError(f"device: expected one of {', '.join(usable)}, got {name!r}")
    return device


def _summary(results: list[TrainResult]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over the runs of every quantity of the table."""
    values = {
        name: [getattr(result if hasattr(result, name) else result.final, name) for result in results]
        for name in COLUMNS
    }
    return {name: _mean_and_std(value) for name, value in values.items()}


def _mean_and_std(values: list[float]) -> dict[str, float]:
    if not all(math.isfinite(value) for value in values):  # a run diverged
        return {"mean": math.nan, "std": math.nan}
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _cell(quantity: dict[str, float], form: str, with_spread: bool) -> str:
    mean, std = form.format(quantity["mean"]), form.format(quantity["std"])
    return f"{mean} ± {std}" if with_spread and quantity["std"] > 0 else mean


def _state(record: Record) -> str:
    return f"loss {record.train_loss:.4f}, accuracy {record.test_accuracy:.2%}"
