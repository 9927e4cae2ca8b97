"""An experiment: a question, the jobs that answer it, and a figure and a text made of their rows.

What is in the table of rows is not run again, so an experiment that was stopped goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lopt.evaluation.jobs import Job
from lopt.evaluation.table import Run
from lopt.experiments.setting import Setting
from lopt.files import write_text


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the jobs that answer it, and how the answer is shown.

    Args:
        title: of the text.
        about: what is done and why, a paragraph of Markdown.
        jobs: what there is to run; its order is that of the CSV file.
        figure: draws the rows into a PNG file.
        text: paragraphs of Markdown, written from the rows alone.
    """

    name: str
    title: str
    about: str
    jobs: Callable[[Setting], Sequence[Job]]
    figure: Callable[[Sequence[Run], Path], None]
    text: Callable[[Sequence[Run]], Sequence[str]]

    def write(self, rows: Sequence[Run], out: Path) -> tuple[Path, Path]:
        """Draw the figure and write the text into the folder; their paths."""
        figure, text = out / f"{self.name}.png", out / "README.md"
        self.figure(rows, figure)
        image = f"![{self.title}]({figure.name})"
        parts = [f"# {self.title}", self.about, image, *self.text(rows), _origin(self.name, rows)]
        write_text(text, "\n\n".join(parts) + "\n")
        return figure, text


def _origin(name: str, rows: Sequence[Run]) -> str:
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
