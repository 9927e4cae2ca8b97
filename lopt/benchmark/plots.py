"""Figure of benchmark rows. Needs matplotlib, which is imported only when the figure is drawn."""

from collections.abc import Sequence
from pathlib import Path

from lopt.benchmark.rows import Row
from lopt.figures import COLOURS, require_matplotlib
from lopt.files import save_figure


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
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(label for label, _ in groups))
    for (label, tensors), found in groups.items():
        found.sort(key=lambda row: row["parameters"])
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        size = [row["parameters"] for row in found]
        name = f"{label}, {tensors:,} tensors" if tensors > 1 else label
        middle, low, high = ([row[f"ns_per_param{cut}"] for row in found] for cut in ("", "_20", "_80"))
        axes.plot(size, middle, "o--" if tensors > 1 else "o-", color=colour, markersize=3.5, linewidth=1.4, label=name)
        axes.fill_between(size, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_title(f"Nanoseconds per parameter, {rows[0].get('machine', '')}", loc="left", fontsize=10.5)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)
