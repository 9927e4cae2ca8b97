"""``lopt meta-train``: meta-train theta on tasks that need no data."""

import json
import shlex
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from lopt.commands.common import Outcome, OutFolder, Seed, say
from lopt.commands.weights import describe_theta
from lopt.commands.workers import Spread
from lopt.meta import checkpoint, trainer
from lopt.meta.config import MetaTrainConfig
from lopt.meta.executors import Executor, LocalProcesses, Serial
from lopt.meta.loggers import LoggerName, make_logger, require
from lopt.meta.metrics import read_metrics
from lopt.meta.recipes import recipe

RecipeName = Literal["default", "train-loss", "continue", "paper", "networks", "mixture", "tiny"]


@dataclass(frozen=True, kw_only=True)
class MetaTrain(Spread):
    """Meta-train theta by evolution strategies on small synthetic tasks, or with --recipe mixture on all families.

    Writes theta.safetensors (the best on the validation tasks), theta_last.safetensors, metrics.jsonl, meta_loss.png,
    config.json and checkpoint.pt. lopt train --theta tries the result.
    """

    recipe: RecipeName | None = None
    """Settings to begin with; default if none is named."""

    out: OutFolder = Path("runs/meta-train")
    """Folder for everything the run leaves behind."""

    hours: float | None = None
    """Budget in hours of wall time. Converted once, by a short measurement, to a number of inner steps: that is the
    budget, so results do not depend on a clock. One hour if neither this nor --inner-steps is given."""

    inner_steps: int | None = None
    """Budget in inner steps, for a run that can be repeated exactly."""

    resume: bool = False
    """Go on from the checkpoint in --out, with its settings; settings given as well must agree with them."""

    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Theta to start from, a file or a shipped name, instead of Adam."""

    seed: Seed | None = None
    """Every random number derives from it; 0 if not given."""

    log: tuple[LoggerName, ...] = ()
    """Where metrics go beside metrics.jsonl, in folders of --out: tensorboard (tensorboard --logdir), wandb (Weights
    & Biases; with WANDB_MODE=offline it stays on this machine)."""

    set: tuple[str, ...] = ()
    """More settings, as NAME=VALUE with the value in JSON, for instance pairs=32 weighting="last"."""

    def run(self, console: Console) -> Outcome:
        given = self._given()
        if not self.resume:
            trainer.check_new(self.out)
        for name in self.log:
            require(name)
        with ExitStack() as stack:
            executor = stack.enter_context(closing(_executor(stack.enter_context(self.spread()))))
            config = self._resumed(given) if self.resume else self._begun(given, executor, console)
            if not self.resume:
                say(console, f"First the start is validated on {config.validation_tasks} tasks")
            loggers = [make_logger(name, self.out, config.to_json()) for name in dict.fromkeys(self.log)]
            for logger in loggers:
                stack.callback(logger.close)
            theta = trainer.run(
                config,
                self.out,
                resume=self.resume,
                executor=executor,
                loggers=loggers,
                console=console,
                command=shlex.join(["lopt", *sys.argv[1:]]),
            )
        path = self.out / "theta.safetensors"
        before, after = (theta.provenance["validation"][name] for name in ("first", "best"))
        say(console, f"Validation, log of final loss / initial loss: {before:.4f} at the start, {after:.4f} at best")
        say(console, f"Wrote {describe_theta(str(path), theta)}")
        numbers = {"command": "meta-train", "theta": path, "provenance": theta.provenance}
        return Outcome(0, {**numbers, "metrics": read_metrics(self.out)})

    def _given(self) -> dict[str, Any]:
        """Fields of the configuration that the command line names."""
        if self.hours is not None and self.inner_steps is not None:
            raise ValueError("hours, inner_steps: expected one of them, got both")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours: expected a positive number, got {self.hours}")
        named = {"recipe": self.recipe, "inner_steps": self.inner_steps, "init": self.from_, "seed": self.seed}
        given = {name: value for name, value in named.items() if value is not None}
        for setting in self.set:
            name, _, text = setting.partition("=")
            try:
                given[name] = json.loads(text)
            except json.JSONDecodeError:
                given[name] = text
        return given

    def _begun(self, given: dict[str, Any], executor: Executor, console: Console) -> MetaTrainConfig:
        name = given.pop("recipe", "default")
        if "inner_steps" in given or (name == "tiny" and self.hours is None):
            return recipe(name, **given)
        hours = self.hours or 1.0
        seconds = min(10.0, 36.0 * hours)  # at most a hundredth of the budget
        say(console, f"Measuring the speed, for {seconds:g} s")
        speed = trainer.measure_speed(recipe(name, **given, inner_steps=1), executor, seconds)
        steps = max(1, round(speed * hours * 3600.0))
        say(console, f"{speed:,.0f} inner steps/s: {hours:g} h are --inner-steps {steps}")
        return recipe(name, **given, inner_steps=steps)

    def _resumed(self, given: dict[str, Any]) -> MetaTrainConfig:
        config = checkpoint.load(self.out / "checkpoint.pt")[0]
        begun = config.to_json()
        for name, value in given.items():
            if name not in begun:
                raise ValueError(f"set: unknown setting {name!r}, expected some of {sorted(begun)}")
            if value != begun[name]:
                raise ValueError(
                    f"{name}: the run in {str(self.out)!r} was begun with {begun[name]!r}, cannot go on with {value!r}"
                )
        return config


def _executor(workers: int | Executor) -> Executor:
    if isinstance(workers, Executor):
        return workers
    return Serial() if workers == 1 else LocalProcesses(workers)
