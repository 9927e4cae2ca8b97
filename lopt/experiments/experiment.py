"""An experiment: a question, the runs that answer it, and a figure and a text made of their rows.

What is in the table of rows is not run again, so an experiment that was stopped goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lopt.evaluation.processes import fill
from lopt.evaluation.runs import Result
from lopt.experiments.rows import Row, RowTable
from lopt.experiments.runs import Run, Setting
from lopt.files import write_text
from lopt.meta.executors import Executor


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the runs that answer it, and how the answer is shown.

    Args:
        title: of the text.
        about: what is done and why, a paragraph of Markdown.
        runs: what there is to run; its order is that of the CSV file.
        figure: draws the rows into a PNG file.
        text: paragraphs of Markdown, written from the rows alone.
    """

    name: str
    title: str
    about: str
    runs: Callable[[Setting], Sequence[Run]]
    figure: Callable[[Sequence[Row], Path], None]
    text: Callable[[Sequence[Row]], Sequence[str]]

    def write(self, rows: Sequence[Row], out: Path) -> tuple[Path, Path]:
        """Draw the figure and write the text into the folder; their paths."""
        figure, text = out / f"{self.name}.png", out / "README.md"
        self.figure(rows, figure)
        image = f"![{self.title}]({figure.name})"
        parts = [f"# {self.title}", self.about, image, *self.text(rows), _origin(self.name, rows)]
        write_text(text, "\n\n".join(parts) + "\n")
        return figure, text


def _origin(name: str, rows: Sequence[Row]) -> str:
    """Where the numbers come from, for the end of a text."""

    def every(column: str, length: int = 40) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, column))[:length] for row in rows if getattr(row, column)))

    diverged, seeds = sum(row.diverged for row in rows), len({row.seed for row in rows})
    return (
        f"{len(rows)} runs, {seeds} {'seed' if seeds == 1 else 'seeds'}, {diverged} diverged, "
        f"{sum(row.seconds for row in rows) / 60:.1f} minutes of one core; every run is a row of {name}.csv. "
        f"Theta {every('theta_sha256', 12)}; {every('date')}; {every('machine')}; commit {every('commit', 10)}; "
        f"lopt {every('lopt')}, torch {every('torch')}, Python {every('python')}."
    )


def execute(
    runs: Sequence[Run],
    table: RowTable,
    workers: int | Executor = 1,
    on_done: Callable[[int, int], None] | None = None,
    data: Path | None = None,
) -> list[Row]:
    """Measure what ``table`` lacks, in ``workers`` processes of one thread, and return the rows in order.

    A batch of which any run is missing is measured whole, so that its losses are the same to the bit.

    Args:
        workers: number of processes, or what runs the batches.
        on_done: called with the numbers of runs done and to do, at the beginning and after every run or batch.
        data: folder with Fashion-MNIST's IDX files, for the processes.
    """
    by_key = {run.sha256: run for run in runs}
    batches: dict[str, list[Run]] = {}
    for key, run in by_key.items():
        batches.setdefault(run.batch or key, []).append(run)
    missing = [batch for batch in batches.values() if any(run.sha256 not in table.rows for run in batch)]
    missing.sort(key=lambda batch: -sum(run.cost for run in batch))  # the long ones first
    fill(
        table,
        missing,
        _measure,
        lambda batch, results: [Row.of(run, result) for run, result in zip(batch, results, strict=True)],
        name=lambda batch: f"{batch[0].optimizer} on {batch[0].task}",
        runs=len,
        workers=workers,
        on_done=on_done,
        data=data,
    )
    if missing:
        table.tidy(runs)
    return [table.rows[run.sha256] for run in runs]


def _measure(batch: Sequence[Run]) -> list[Result]:
    return [batch[0].measure()] if len(batch) == 1 else batch[0].measure_batch(batch)
