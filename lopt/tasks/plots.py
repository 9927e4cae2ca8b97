"""Figures of tasks: loss curves. Needs matplotlib, which is imported only when a figure is drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lopt import figures
from lopt.figures import COLOURS, Panel, draw

Line = tuple[Sequence[int], Sequence[float]]  # steps, losses


def curves(lines: Mapping[str, Line], title: str, path: Path) -> None:
    """Draw losses against the step into the PNG file ``path``, one labelled line each.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    gallery({title: lines}, path, columns=1, size=(7.0, 4.2))


def gallery(
    panels: Mapping[str, Mapping[str, Line]], path: Path, columns: int = 4, size: tuple[float, float] = (3.4, 2.4)
) -> None:
    """A panel for every title, each with its labelled lines.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    drawn = []
    for title, lines in panels.items():
        finite = [loss for _, losses in lines.values() for loss in losses if math.isfinite(loss)]
        far = finite and min(finite) > 0 and max(finite) > 4 * min(finite)
        shown = [
            figures.Line(label, steps, losses, COLOURS[order % len(COLOURS)])
            for order, (label, (steps, losses)) in enumerate(lines.items())
        ]
        drawn.append(Panel(title, shown, "step", log="y" if far else ""))
    draw(drawn, "", path, columns, size=size)
