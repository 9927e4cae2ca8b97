"""Where on the line of minima of ``f(x, y) = (x - y)^2 / 2`` does each optimizer land?

Source: arXiv:2009.11243, section 4.3 and figure 4.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopt.evaluation.jobs import Job
from lopt.evaluation.opponents import FACTORS
from lopt.evaluation.runs import RECORDED, Result
from lopt.evaluation.table import LEARNED, Run
from lopt.experiments.experiment import Experiment
from lopt.experiments.figures import ADAM, LOPT, MORE, OTHER, UNTOLD
from lopt.experiments.rows import mean, select, values
from lopt.experiments.setting import Setting
from lopt.experiments.words import bullets, number, table
from lopt.figures import GREY, Line, Panel, draw
from lopt.provenance import checksum

POINTS = 50  # of a path
SGD, ADAM_NAME = "sgd-tuned", "adam-tuned"

#: Label, colour, optimizer and factor of its learning rate.
SHOWN: dict[tuple[str, int], tuple[str, str]] = {
    (SGD, 0): ("SGD with momentum, 1e-2", OTHER),
    (ADAM_NAME, FACTORS.index(10.0)): ("Adam, 1e-2", ADAM),
    ("adamw", 0): ("AdamW, 1e-3", MORE),
    ("lopt", 0): ("lopt", LOPT),
    ("lopt-untold", 0): ("lopt, untold", UNTOLD),
}


@dataclass(frozen=True, kw_only=True)
class Valley(Job):
    """A run from ``start``; its loss is told to a learned optimizer as training and as validation loss."""

    start: tuple[float, float]

    @property
    def subject(self) -> dict[str, Any]:
        return {"task": "valley", "task_sha256": checksum({"start": self.start})}

    def measure(self) -> list[Result]:
        point = torch.tensor(self.start, requires_grad=True)
        optimizer = self.make([point], self.horizon)
        observe = getattr(optimizer, "observe", None)
        every = max(1, self.horizon // POINTS)
        path, losses, began = [(0, *self.start)], [], time.perf_counter()
        for step in range(1, self.horizon + 1):
            loss = (point[0] - point[1]).square() / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if observe is None:
                optimizer.step()
            else:
                if (step - 1) % 10 == 0:
                    observe(valid_loss=losses[-1])
                optimizer.step(loss=losses[-1])  # type: ignore[call-overload]
            if step % every == 0 or step == self.horizon:
                path.append((step, *point.tolist()))
        first, last = (((x - y) ** 2 / 2) for _, x, y in (path[0], path[-1]))
        steps, x, y = (list(map(float, column)) for column in zip(*path, strict=True))
        found = Result(
            initial=dict.fromkeys(RECORDED, first),
            losses=dict.fromkeys(RECORDED, last),
            seconds=time.perf_counter() - began,
            diverged=not math.isfinite(last),
            curve={"step": steps, "x": x, "y": y},
        )
        return [found]


def jobs(setting: Setting) -> list[Job]:
    """Starts on circles, none of them on the line x = y or opposite the origin."""
    count, steps = setting.pick(6, 12), setting.pick(2000, 10_000)
    angles = [math.pi / 4 + math.pi * (k + 0.3) / count * 2 for k in range(count)]
    starts = [
        (round(r * math.cos(a), 4), round(r * math.sin(a), 4)) for r in setting.pick((1.0,), (1.0, 4.0)) for a in angles
    ]
    return [
        Valley(
            suite="implicit-regularization",
            optimizer=optimizer,
            trials=(trial,),
            learned=setting.learned if optimizer in LEARNED else None,
            horizon=steps,
            seed=0,
            x=float(place),
            start=start,
        )
        for optimizer, trial in SHOWN
        for place, start in enumerate(starts)
    ]


def landing(row: Run) -> tuple[float, float, float]:
    """Signed distances along the line x = y, from the origin, of the nearest point to the start and of the landing
    point, and the distance from the line at the end."""
    x, y = row.along("x"), row.along("y")
    return (x[0] + y[0]) / math.sqrt(2), (x[-1] + y[-1]) / math.sqrt(2), abs(x[-1] - y[-1]) / math.sqrt(2)


def figure(rows: Sequence[Run], path: Path) -> None:
    panels = []
    for optimizer, trial in SHOWN:
        label, colour = SHOWN[optimizer, trial]
        lines = []
        for row in select(rows, name=optimizer, trial=trial):
            x, y = row.along("x"), row.along("y")
            nearest = landing(row)[0] / math.sqrt(2)
            lines += [
                Line("path", x, y, colour, width=1.0),
                Line("start", x[:1], y[:1], "0.3", "", "o"),
                Line("nearest minimum", [nearest], [nearest], GREY, "", "s"),
                Line("end", x[-1:], y[-1:], colour, "", "o"),
            ]
        reach = max(abs(value) for line in lines for value in (*line.x, *line.y))
        lines.insert(0, Line("minima, x = y", [-reach, reach], [-reach, reach], GREY, "--", width=1.0))
        panels.append(Panel(label, lines, "x", "y", equal=True))
    draw(panels, f"(x - y)²/2: {rows[0].horizon:,} steps", path)


def text(rows: Sequence[Run]) -> list[str]:
    cells, sentences = [], []
    for (optimizer, trial), (label, _) in SHOWN.items():
        same = select(rows, name=optimizer, trial=trial)
        found = [landing(row) for row in same]
        nearest, landed, off = (sum(abs(one[k]) for one in found) / len(found) for k in range(3))
        share = sum(abs(b) < abs(a) - 1e-4 for a, b, _ in found)
        moved = sum(abs(b - a) for a, b, _ in found) / len(found)
        cells.append([label, number(nearest), number(landed), number(moved), f"{share} of {len(found)}", number(off)])
        if moved < 1e-3 * nearest:
            where = "ends at the minimum nearest to the start"
        else:
            side = "nearer to the origin than" if landed < nearest else "further from the origin than"
            where = f"ends {number(100 * abs(1 - landed / nearest))}% {side} the nearest minimum does, on average"
        reached = "" if off < 0.01 * nearest else f", but is still {number(off)} away from the line"
        sentences.append(f"{label} {where}{reached} (final loss {number(mean(same, 'test_loss'))}).")
    header = [
        "optimizer",
        "nearest minimum",
        "end",
        "moved along the line",
        "ended nearer to the origin",
        "off the line",
    ]
    explanation = (
        f"Mean distances over {len(values(rows, 'x'))} starts: of the nearest minimum and of the end from the "
        "origin, along the line of minima; between the two; and of the end from the line."
    )
    return [explanation, table(header, cells), bullets(sentences)]


EXPERIMENT = Experiment(
    name="implicit-regularization",
    title="Implicit regularization",
    about=(
        "Every point of the line x = y is a minimum of f(x, y) = (x - y)²/2; which one an optimizer finds is its own "
        "choice. Gradients are (d, -d): SGD and Adam cannot but go to the nearest one. The paper's learned optimizer "
        "drifts towards the origin, to parameters with a small norm."
    ),
    jobs=jobs,
    figure=figure,
    text=text,
)
