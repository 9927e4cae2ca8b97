"""``kernel`` and ``step`` over many layouts, with the peaks of the same run; shared by ``lopt bench`` and gpu.sh."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lopt.benchmark import kernels, rows, steps, traffic
from lopt.benchmark.peaks import Peaks, measure_peaks
from lopt.benchmark.rows import Row
from lopt.benchmark.shapes import Layout
from lopt.benchmark.timing import Timer, available_bytes
from lopt.rule import PRESETS

Say = Callable[[str], None]
Table = tuple[list[str], list[list[str]]]  # names of the columns, cells


@dataclass(frozen=True)
class Suite:
    """What to measure, where, how often.

    Args:
        what: ``"kernel"`` or ``"step"``.
        peers: whether a step of other projects is timed too.
    """

    what: str
    presets: tuple[str, ...]
    layouts: tuple[Layout, ...]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    peers: bool

    def run(self, say: Say) -> Iterator[list[Row]]:
        """The rows of each layout that fits into memory, as soon as they are measured.

        Raises:
            ValueError: an unknown preset, or no layout fits.
            RuntimeError: there is no such device.
        """
        for preset in self.presets:
            if preset not in PRESETS:
                raise ValueError(f"presets: expected some of {', '.join(PRESETS)}, got {preset!r}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("device: expected a CUDA device, torch finds none; use --device cpu")
        timer = Timer(self.device, self.repeats)
        peaks = measure_peaks(self.device, self.repeats)
        say(f"peaks: {peaks.copy / 1e9:.1f} GB/s copied, {peaks.flops / 1e9:,.0f} GFLOP/s")
        environment, said, measured = rows.environment(self.device), set[str](), 0
        for layout in self.layouts:
            needed = max(kernels.bytes_needed(preset, layout, self.dtype) for preset in self.presets)
            if needed > 0.9 * available_bytes(self.device):
                say(f"{layout.name}: left out, needs {needed / 2**30:.1f} GiB")
                continue
            found, notes = self._measure(layout, timer, peaks)
            for note in notes:
                if note not in said:
                    say(note)
                said.add(note)
            measured += 1
            yield [{**row, **environment} for row in found]
        if not measured:
            raise ValueError("sizes, models: expected at least one layout that fits into memory, got none")

    def _measure(self, layout: Layout, timer: Timer, peaks: Peaks) -> tuple[list[Row], list[str]]:
        if self.what == "step":
            return steps.measure(self.presets, layout, self.dtype, timer, peaks, self.peers)
        measured = [kernels.measure(preset, layout, self.dtype, timer, peaks) for preset in self.presets]
        return [row for some in measured for row in some], []


def traffic_table(presets: Sequence[str], dtype: torch.dtype) -> Table:
    """Bytes moved and held per parameter: presets, with a state of half the size, with lagged statistics; AdamW."""
    size = dtype.itemsize
    counted = [traffic.learned(name, PRESETS[name], size, size) for name in presets]
    counted += [traffic.learned(f"{name}, bfloat16 state", PRESETS[name], size, size, 2) for name in presets]
    lagged = {name: dataclasses.replace(PRESETS[name], stats="lagged") for name in presets}
    counted += [traffic.learned(f"{name}, lagged stats", spec, size, size) for name, spec in lagged.items()]
    counted.append(traffic.adamw(size, size))
    columns = ["bytes per parameter", "accumulate", "apply", "step", "single sweep", "state", "held", "MLP flop"]
    names = ("accumulate", "apply", "step", "single_sweep", "state", "held", "flops")
    return columns, [[t.name, *(str(getattr(t, name)) for name in names)] for t in counted]


def result_table(found: Sequence[Row]) -> Table:
    """What :class:`Suite` measured, for people."""
    kernel = found[0]["benchmark"] == "kernel"
    columns = ["", "ns/parameter", "20% to 80%", "GB/s", "of copy", "of peak" if kernel else "x AdamW"]
    cells = [
        [
            rows.describe(row),
            f"{row['ns_per_param']:.3f}",
            f"{row['ns_per_param_20']:.3f} to {row['ns_per_param_80']:.3f}",
            _number(row["gb_per_s"], ".1f"),
            _number(row["copy_share"], ".0%"),
            _number(row["peak_share"], ".0%") if kernel else _number(row["times_adamw"], ".2f"),
        ]
        for row in found
    ]
    return columns, cells


def remarks(found: Sequence[Row]) -> list[str]:
    """What the rows of our own code say about many tensors against one, and about small sizes against large ones."""
    said = []
    for preset, name in dict.fromkeys((row["preset"], row["name"]) for row in found if row["preset"]):
        mine = [row for row in found if (row["preset"], row["name"]) == (preset, name)]
        single = {row["parameters"]: row["ns_per_param"] for row in mine if row["tensors"] == 1}
        for row in mine:
            alone = single.get(row["parameters"])
            if alone and row["tensors"] > 1:
                ratio = row["ns_per_param"] / alone
                said.append(f"{preset} {name}: {row['layout']} takes {ratio:.2f} times as long as one tensor")
        sizes = {size: time for size, time in single.items() if size >= 100_000}
        if len(sizes) > 1:
            spread = max(sizes.values()) / min(sizes.values())
            span = f"{min(sizes):,} to {max(sizes):,}"
            said.append(
                f"{preset} {name}: time per parameter varies by a factor of {spread:.2f} from {span} parameters"
            )
    return said


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
