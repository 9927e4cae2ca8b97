"""Our theta as the outer optimizer that meta-trains a new one from scratch, against Adam with a tuned learning rate.

Source: arXiv:2009.11243, section 4.6 and figure 8.
"""

import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lopt.evaluation.jobs import Job
from lopt.evaluation.runs import RECORDED, Result
from lopt.evaluation.table import Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LOPT, OTHER
from lopt.experiments.rows import best, line, mean, select, values
from lopt.experiments.setting import Setting
from lopt.experiments.words import bullets, number, table
from lopt.figures import GREY, Panel, draw
from lopt.meta import trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.metrics import read_metrics
from lopt.provenance import checksum

#: The share of tuned Adam's improvement that is asked of the learned outer optimizer.
BAR = 0.9

LRS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
STARTS = {"random": "from random values, as in the paper", "adam": "from the imitation of Adam"}
RIVALS = {"adam": ("Adam", ADAM, 1.0), "adam-decay": ("Adam, lr falling to a tenth", OTHER, 0.1)}
BLOCKS = 40  # means of the meta-loss along a run
VALIDATIONS = 20
LAST = 4  # validations whose mean is the final meta-loss, as single ones are noisy


@dataclass(frozen=True, kw_only=True)
class MetaRun(Job):
    """One meta-training; its losses are mean meta-losses of validation tasks, so that lower is better.

    Args:
        start: of theta.
        config: of the meta-training, with its outer optimizer.
    """

    start: str
    config: MetaTrainConfig

    @property
    def subject(self) -> dict[str, Any]:
        return {"task": self.start, "task_sha256": checksum(self.config.to_json())}

    @property
    def impl(self) -> str:
        return "torch"

    @property
    def settings(self) -> list[dict[str, Any]]:
        if self.optimizer == "lopt":
            return super().settings
        return [{"schedule": "", "lr": self.config.lr, "settings": "", "trial": self.trials[0]}]

    def measure(self) -> list[Result]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer.run(self.config, folder, console=Console(file=io.StringIO()))
            lines = read_metrics(Path(folder))
        validated = [line for line in lines if "validation" in line]
        scores = [line["validation_mean"] for line in validated]
        first, last = scores[0], sum(scores[-LAST:]) / LAST
        losses = [line["meta_loss"] for line in lines[1:]]
        size = max(1, len(losses) // BLOCKS)
        blocks = [losses[begin : begin + size] for begin in range(0, len(losses) - size + 1, size)]
        at = [line["iteration"] for line in validated]
        found = Result(
            initial=dict.fromkeys(RECORDED, first),
            losses=dict.fromkeys(RECORDED, last),
            seconds=time.perf_counter() - began,
            diverged=last > first,
            curve={
                "iteration": list(map(float, at)),
                "validation": scores,
                "block_iteration": [size * (block + 0.5) for block in range(len(blocks))],
                "meta_loss": [sum(block) / len(block) for block in blocks],
            },
        )
        return [found]


def jobs(setting: Setting) -> list[Job]:
    """Small: 150 iterations of 16 pairs; full: 800 of 32. Perturbations, tasks and lengths are the same in all."""
    iterations, pairs = setting.pick(150, 800), setting.pick(16, 32)
    length = 50
    steps = iterations * pairs * 2 * length
    common: dict[str, Any] = {
        "inner_steps": steps,
        "phases": (Phase(1.0, (length, length), "all", max_params=1000),),
        "objective": "train",
        "weighting": "mean",
        "average": 0.0,
        "warmup": 0,
        "pairs": pairs,
        "validation_tasks": setting.pick(60, 100),
        "validation_horizons": (length,),
        "validate_every": max(1, steps // VALIDATIONS),
        "checkpoint_every": 10**6,
    }
    found: list[Job] = []
    for start in STARTS:
        for seed in setting.seeds[:2]:
            fields: dict[str, Any] = {"suite": "self-training", "start": start, "horizon": iterations, "seed": seed}
            ours = MetaTrainConfig(**common, init=start, seed=seed, outer=setting.theta)
            found.append(MetaRun(**fields, optimizer="lopt", learned=setting.learned, config=ours))
            for name, (_, _, final_lr) in RIVALS.items():
                for trial, lr in enumerate(LRS):
                    adam = MetaTrainConfig(**common, init=start, seed=seed, lr=lr, final_lr=final_lr)
                    found.append(MetaRun(**fields, optimizer=name, trials=(trial,), config=adam))
    return found


def improvement(rows: Sequence[Run]) -> float:
    """Fall of the mean validation meta-loss."""
    return mean(rows, "initial_test_loss") - mean(rows, "test_loss")


def figure(rows: Sequence[Run], path: Path) -> None:
    panels = []
    for start in values(rows, "task"):
        for what, at, title in (
            ("validation", "iteration", "validation tasks"),
            ("meta_loss", "block_iteration", "tasks of the batch"),
        ):
            here = select(rows, task=start)
            lines = []
            for name, (label, colour, _) in RIVALS.items():
                of = select(here, name=name)
                chosen = best(of, "test_loss")
                for trial in values(of, "trial"):
                    lines.append(line("Adam, other lrs", select(of, trial=trial), at, what, GREY, 0.7))
                lines.append(line(f"{label}, best lr", chosen, at, what, colour))
            lines.sort(key=lambda one: one.width)
            lines.append(line("lopt", select(here, name="lopt"), at, what, LOPT))
            shown = [value for one in lines if one.width > 1 for value in one.y]
            top = max(shown) + 0.3 * (max(shown) - min(shown))
            lines = [one._replace(y=[min(value, top) for value in one.y]) for one in lines]
            panels.append(Panel(f"start: {start}; {title}", lines, "outer iteration", "meta-loss"))
    draw(panels, "Self-training: meta-loss by outer optimizer", path, columns=2)


def text(rows: Sequence[Run]) -> list[str]:
    cells, sentences = [], []
    for start in values(rows, "task"):
        here = select(rows, task=start)
        ours = select(here, name="lopt")
        chosen = {name: best(select(here, name=name), "test_loss") for name in RIVALS}
        gains = {name: improvement(found) for name, found in chosen.items()}
        rival = max(gains, key=lambda name: gains[name])
        share = improvement(ours) / gains[rival]
        shown = {"lopt": ours, **chosen}
        for name, found in shown.items():
            lr = "" if name == "lopt" else f", lr {found[0].lr:g}"
            label = "lopt" if name == "lopt" else RIVALS[name][0]
            ends = [number(mean(found, column)) for column in ("initial_test_loss", "test_loss")]
            part = improvement(found) / gains[rival]
            cells.append([start, f"{label}{lr}", *ends, number(improvement(found)), f"{100 * part:.0f}%"])
        adams = [select(here, name=name) for name in RIVALS]
        others = [improvement(select(of, trial=trial)) for of in adams for trial in values(of, "trial")]
        better = sum(improvement(ours) >= other for other in others)
        verdict = "which meets" if share >= BAR else "which misses"
        sentences.append(
            f"Start {STARTS[start]}: the learned outer optimizer, untuned, makes {100 * share:.0f}% of the "
            f"improvement of the best Adam of {len(others)} ({RIVALS[rival][0]}, lr {chosen[rival][0].lr:g}, chosen "
            f"on the validation tasks that are compared), {verdict} the bar of {100 * BAR:.0f}%. It is ahead of or "
            f"level with {better} of the {len(others)} Adams."
        )
    header = ["start", "outer optimizer", "meta-loss at the start", "at the end", "improvement", "of the best Adam's"]
    note = (
        f"Meta-loss: mean over a run of {50} steps of log(loss / initial loss + .01), on validation tasks; at the "
        f"end, the mean of the last {LAST} of {VALIDATIONS} validations. {rows[0].horizon} outer iterations."
    )
    return [note, table(header, cells), bullets(sentences)]


EXPERIMENT = Experiment(
    name="self-training",
    title="Self-training",
    about=(
        "A new theta is meta-trained by evolution strategies on small synthetic tasks. Its outer optimizer is Adam "
        "at one of seven learning rates, constant or falling, or a learned optimizer: our theta, which was never "
        "meta-trained on meta-training. It gets the same gradients, clipped in the same way, and the mean loss "
        "ratio of the batch as the training loss; it is told neither a validation loss nor the number of iterations."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
