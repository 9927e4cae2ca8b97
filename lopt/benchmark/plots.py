"""Figure of benchmark rows. Needs matplotlib, which is imported only when the figure is drawn."""

from collections.abc import Sequence
from pathlib import Path

from lopt.benchmark.rows import Row
from lopt.figures import COLOURS, Line, Panel, draw


def time_per_parameter(rows: Sequence[Row], path: Path) -> None:
    """Draw nanoseconds per parameter against the number of parameters into the PNG file ``path``.

    A line for every optimizer or operation in one tensor, dashed for many; the band is from 20% to 80%.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: there are no rows of evenly cut parameters.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if " x " in row["layout"]:
            label = " ".join(part for part in (row["preset"], row["name"]) if part)
            groups.setdefault((label, row["tensors"]), []).append(row)
    if not groups:
        raise ValueError("plot: no rows of evenly cut parameters to draw; ask for some --sizes")
    labels = list(dict.fromkeys(label for label, _ in groups))
    lines = []
    for (label, tensors), found in groups.items():
        found.sort(key=lambda row: row["parameters"])
        middle, low, high = ([row[f"ns_per_param{cut}"] for row in found] for cut in ("", "_20", "_80"))
        lines.append(
            Line(
                f"{label}, {tensors:,} tensors" if tensors > 1 else label,
                [row["parameters"] for row in found],
                middle,
                COLOURS[labels.index(label) % len(COLOURS)],
                "--" if tensors > 1 else "-",
                "o",
                band=(low, high),
            )
        )
    title = f"Nanoseconds per parameter, {rows[0].get('machine', '')}"
    draw([Panel(title, lines, "parameters", log="xy")], "", path, size=(7.2, 4.2), dpi=150)
