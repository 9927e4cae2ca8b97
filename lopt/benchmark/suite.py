"""``kernel`` and ``step`` over many layouts, with the peaks of the same run; shared by ``lopt bench`` and gpu.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lopt.benchmark import kernels, rows, shapes, steps, traffic
from lopt.benchmark.peaks import Peaks, measure_peaks
from lopt.benchmark.rows import Row
from lopt.benchmark.shapes import Layout
from lopt.benchmark.timing import Timer, available_bytes
from lopt.benchmark.variants import Variant, variants


@dataclass(frozen=True, kw_only=True)
class Options:
    """What of ``kernel`` and ``step`` can be chosen, on either command line."""

    presets: tuple[str, ...] = ("compact", "paper")
    """Architectures of the learned optimizer."""

    stats: tuple[Literal["current", "lagged"], ...] = ("current",)
    """Of this step, in two sweeps over the parameters, or of the step before, in one; for kernel and step."""

    state_dtypes: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("float32",)
    """Of accumulators, for kernel and step."""

    precisions: tuple[Literal["high", "fast"], ...] = ("high",)
    """Of the small MLP on a GPU, for kernel and step."""

    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Numbers of parameters, for kernel and step."""

    tensors: tuple[int, ...] = (1, 1000)
    """Numbers of tensors that the parameters are cut into, for kernel and step."""

    models: tuple[str, ...] = ()
    """Shapes of models, for kernel and step: vit-b16, gpt2-355m."""

    scale: float = 1.0
    """Share of a model's blocks to keep."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of parameters and gradients."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where; sim is for tests and not timed."""

    peers: bool = True
    """Do not time optimizers of other projects that are installed, for step."""

    repeats: int = 9
    """Measurements of each row."""

    def suite(self, what: str) -> "Suite":
        """``what`` is ``"kernel"`` or ``"step"``."""
        layouts = [shapes.even(size, tensors) for size in self.sizes for tensors in self.tensors]
        layouts += [shapes.model(name, self.scale) for name in self.models]
        ways = variants(self.presets, self.stats, self.state_dtypes, self.precisions)
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        return Suite(what, ways, tuple(layouts), dtype, device, self.repeats, self.peers)


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
    variants: tuple[Variant, ...]
    layouts: tuple[Layout, ...]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    peers: bool

    def run(self, say: Say) -> Iterator[list[Row]]:
        """The rows of each layout that fits into memory, as soon as they are measured.

        Raises:
            ValueError: no layout fits.
            RuntimeError: there is no such device.
        """
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("device: expected a CUDA device, torch finds none; use --device cpu")
        timer = Timer(self.device, self.repeats)
        peaks = measure_peaks(self.device, self.repeats)
        say(f"peaks: {peaks.copy / 1e9:.1f} GB/s copied, {peaks.flops / 1e9:,.0f} GFLOP/s")
        environment, said, measured = rows.environment(self.device), set[str](), 0
        for layout in self.layouts:
            needed = max(kernels.bytes_needed(variant, layout, self.dtype) for variant in self.variants)
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
            return steps.measure(self.variants, layout, self.dtype, timer, peaks, self.peers)
        measured = [kernels.measure(variant, layout, self.dtype, timer, peaks) for variant in self.variants]
        return [row for some in measured for row in some], []


def traffic_table(presets: Sequence[str], dtype: torch.dtype) -> Table:
    """Bytes moved and held per parameter: presets, with a state of half the size, with lagged statistics; AdamW."""
    chosen = variants(presets) + variants(presets, state_dtypes=("bfloat16",)) + variants(presets, ("lagged",))
    counted = [kernels.counted(variant, dtype) for variant in chosen]
    counted.append(traffic.adamw(dtype.itemsize, dtype.itemsize))
    columns = ["bytes per parameter", "accumulate", "apply", "step", "single sweep", "state", "held", "MLP flop"]
    names = ("accumulate", "apply", "step", "single_sweep", "state", "held", "flops")
    return columns, [[t.name, *(str(getattr(t, name)) for name in names)] for t in counted]


def result_table(found: Sequence[Row]) -> Table:
    """What :class:`Suite` measured, for people."""
    kernel = found[0]["benchmark"] == "kernel"
    columns = ["", "ns/parameter", "20% to 80%", "GB/s", "of copy", "of peak" if kernel else "x AdamW"]
    columns += ["host us"] * any(row["host_seconds"] is not None for row in found)
    cells = [
        [
            rows.describe(row),
            f"{row['ns_per_param']:.3f}",
            f"{row['ns_per_param_20']:.3f} to {row['ns_per_param_80']:.3f}",
            _number(row["gb_per_s"], ".1f"),
            _number(row["copy_share"], ".0%"),
            _number(row["peak_share"], ".0%") if kernel else _number(row["times_adamw"], ".2f"),
            # A mark where the device waited for the host.
            *([_host(row)] if "host us" in columns else []),
        ]
        for row in found
    ]
    return columns, cells


def remarks(found: Sequence[Row]) -> list[str]:
    """What the rows of our own code say about many tensors against one, and about small sizes against large ones."""
    said = []
    own = [row for row in found if row["preset"]]
    for title in dict.fromkeys(map(_title, own)):
        mine = [row for row in own if _title(row) == title]
        single = {row["parameters"]: row["ns_per_param"] for row in mine if row["tensors"] == 1}
        for row in mine:
            alone = single.get(row["parameters"])
            if alone and row["tensors"] > 1:
                ratio = row["ns_per_param"] / alone
                said.append(f"{title}: {row['layout']} takes {ratio:.2f} times as long as one tensor")
        sizes = {size: time for size, time in single.items() if size >= 100_000}
        if len(sizes) > 1:
            spread = max(sizes.values()) / min(sizes.values())
            span = f"{min(sizes):,} to {max(sizes):,}"
            said.append(f"{title}: time per parameter varies by a factor of {spread:.2f} from {span} parameters")
    return said


def _title(row: Row) -> str:
    return rows.describe({**row, "layout": "", "problem": ""})


def _host(row: Row) -> str:
    seconds = row["host_seconds"]
    return _number(None if seconds is None else 1e6 * seconds, ".0f") + ("" if row["device_alone"] else " waits")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
