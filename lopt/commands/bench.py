"""``lopt bench``: how quick the kernels, whole optimizer steps and the unroll engine are on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from lopt.benchmark import plots, rows, suite, unroll
from lopt.benchmark.rows import Row
from lopt.benchmark.suite import Options
from lopt.commands.common import Command, Outcome, OutFile, say, show_table
from lopt.tables import append_csv


@dataclass(frozen=True, kw_only=True)
class Bench(Command, Options):
    """Measure speed on this machine, against the peaks and peers of the same run.

    kernel: ``accumulate`` and ``apply`` by themselves, as a share of the measured copy and multiply-add peaks.
    step: whole optimizer steps against torch's AdamW, fused and foreach, and against other projects where installed.
    unroll: inner steps per second and core of the fused unroll engine.
    torch-unroll: the same of the unroll in PyTorch, many runs at once against one, on a small task of every family.

    Inputs are random, caches are flushed before every repetition, numbers are medians with 20% and 80% points.
    """

    what: Annotated[Literal["kernel", "step", "unroll", "torch-unroll"], tyro.conf.Positional]
    """What to measure."""

    threads: int | None = None
    """CPU threads; torch's number if not given."""

    steps: int = 4000
    """Inner steps of one measurement of the compact preset for unroll; the paper preset takes a fifth. Of each run of
    torch-unroll a hundredth."""

    out: OutFile | None = None
    """Append the rows to this CSV file."""

    compare: Path | None = None
    """Print ratios to the rows of this older CSV file, and fail where one is above the tolerance."""

    tolerance: float = 1.1
    """Ratio above which a row counts as slower."""

    plot: OutFile | None = None
    """Draw time per parameter against size into this PNG file, for kernel and step."""

    def run(self, console: Console) -> Outcome:
        if self.steps < 50 or self.repeats < 1:
            raise ValueError(f"steps, repeats: expected at least 50 and 1, got {self.steps} and {self.repeats}")
        old = rows.read_timings(self.compare) if self.compare else []
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            measure = {"unroll": self._unroll, "torch-unroll": self._torch_unroll}.get(self.what, self._layouts)
            found = measure(console)
        finally:
            torch.set_num_threads(before)
        if self.out is not None:
            say(console, f"Appended {len(found)} rows to {self.out}")
        if self.plot is not None and self.what in ("kernel", "step"):
            plots.time_per_parameter(found, self.plot)
            say(console, f"Wrote {self.plot}")
        slower = self._compare(console, found, old)
        return Outcome(int(slower > 0), {"command": f"bench {self.what}", "rows": found, "slower": slower})

    def _layouts(self, console: Console) -> list[Row]:
        chosen = self.suite(self.what)
        found: list[Row] = []
        for some in chosen.run(lambda text: say(console, text)):
            if self.out is not None:
                append_csv(self.out, some)  # now: a long run may be cut short
            found += some
        show_table(console, *suite.traffic_table(self.presets, chosen.dtype))
        say(console, "")
        show_table(console, *suite.result_table(found))
        for remark in suite.remarks(found):
            say(console, remark)
        return found

    def _unroll(self, console: Console) -> list[Row]:
        environment = rows.environment(torch.device("cpu"))
        found = []
        for preset in self.presets:
            count = (self.steps if preset == "compact" else self.steps // 5) // 10 * 10
            for sizes, batch in unroll.PROBLEMS:
                found.append({**unroll.measure(preset, sizes, batch, count, self.repeats), **environment})
        if self.out is not None:
            append_csv(self.out, found)
        show_table(
            console,
            ["problem", "steps/s per core", "20% to 80%", "two processes", "memory, 10 x horizon"],
            [
                [
                    f"{row['preset']} {row['problem']}",
                    f"{row['steps_per_second']:,.0f}",
                    f"{row['steps_per_second_20']:,.0f} to {row['steps_per_second_80']:,.0f}",
                    f"x {row['two_processes']:.2f}",
                    f"+ {row['memory_growth_kb']:,} kB",
                ]
                for row in found
            ],
        )
        return found

    def _torch_unroll(self, console: Console) -> list[Row]:
        environment, steps = rows.environment(torch.device("cpu")), max(1, self.steps // 1000) * 10
        found = [
            {**unroll.measure_torch(preset, family, steps, self.repeats), **environment}
            for preset in self.presets
            for family in unroll.TORCH_TASKS
        ]
        if self.out is not None:
            append_csv(self.out, found)
        show_table(
            console,
            ["problem", f"steps/s, {unroll.RUNS} runs", "20% to 80%", "steps/s, 1 run", "ratio", "MB per run"],
            [
                [
                    f"{row['preset']} {row['problem']}",
                    f"{row['steps_per_second']:,.0f}",
                    f"{row['steps_per_second_20']:,.0f} to {row['steps_per_second_80']:,.0f}",
                    f"{row['steps_per_second_alone']:,.0f}",
                    f"x {row['over_alone']:.1f}",
                    f"{row['megabytes_per_run']:.2f}",
                ]
                for row in found
            ],
        )
        return found

    def _compare(self, console: Console, found: Sequence[Row], old: Sequence[dict[str, str]]) -> int:
        """Print what was measured before too; how many rows are slower."""
        if self.compare is None:
            return 0
        compared = rows.compare(found, old)
        say(console, f"{len(compared)} of {len(found)} rows are in {self.compare}, measured on this machine")
        for one in compared:
            verdict = "SLOWER" if one.ratio > self.tolerance else ""
            say(console, f"{one.what}: x {one.ratio:.3f} of {one.then} {verdict}".rstrip())
        return sum(one.ratio > self.tolerance for one in compared)
