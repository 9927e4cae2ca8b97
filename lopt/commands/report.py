"""``lopt report``: the runs of an evaluation as one file, HTML or Markdown, and its headline on the terminal."""

import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lopt.commands.common import Command, Outcome, OutFile, check_option, say, show_table
from lopt.evaluation.comparison import MEASURES, Runs
from lopt.evaluation.opponents import opponent
from lopt.evaluation.report import Report
from lopt.evaluation.step_times import StepTimes
from lopt.evaluation.table import Run, RunTable
from lopt.files import unpacked, write_text
from lopt.provenance import code_sha256, file_checksum


@dataclass(frozen=True, kw_only=True)
class MakeReport(Command):
    """Compare the learned optimizer with every opponent in the runs of an evaluation, and write report.html.

    Shares of tasks won and lost, geometric-mean ratios with bootstrap intervals, training and test loss, per step and
    per second (lopt evaluate --step-times measures the seconds), normalised losses, costs, and a plain list of where it
    loses. A tuned opponent counts with the trial that was best on outer_valid.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs/evaluate")
    """Folder of an evaluation, with runs.csv; or a table of runs."""

    theta: str | None = None
    """Which theta, if the table has several: a shipped name, a file, or the beginning of its SHA-256."""

    optimizers: tuple[str, ...] = ()
    """Only these opponents, with budgets as in nadamw-list@10; all with all their trials if none is given."""

    suite: str | None = None
    """Only the runs of this suite."""

    horizons: tuple[int, ...] = ()
    """Only these lengths."""

    out: OutFile | None = None
    """The file, Markdown without figures if its name ends in .md; report.html beside the table if not given."""

    def run(self, console: Console) -> Outcome:
        path = self.folder / "runs.csv" if self.folder.is_dir() else self.folder
        if not unpacked(path).is_file():
            raise FileNotFoundError(f"folder: no runs in {path}; lopt evaluate --out {self.folder} makes them")
        out = self.out or path.with_name("report.html")
        check_option("out", out, "file")
        runs, left_out = self._selected(list(RunTable(path).rows.values()))
        times = StepTimes(path.parent)
        budgets: dict[str, int] = {}
        if self.optimizers:
            for name in self.optimizers:
                base = name.partition("@")[0]
                if base != name:
                    budgets[base] = len(opponent(name).trials)
            wanted = {name.partition("@")[0] for name in self.optimizers}
            unknown = wanted - {run.name for run in runs}
            if unknown:
                raise ValueError(f"optimizers: no runs of {', '.join(sorted(unknown))} in {path}")
            runs = [run for run in runs if run.optimizer == "lopt" or run.name in wanted]
        report = Report(
            runs=Runs(runs, budgets, times.seconds()),
            title="Evaluation of a learned optimizer",
            facts=_facts(runs) | ({"seconds per step measured on": times.machine} if times.machine else {}),
            warnings=_warnings(runs, left_out),
        )
        for warning in report.warnings:
            say(console, warning)
        numbers = []
        for horizon in report.horizons:
            show_comparisons(console, report, horizon)
            for ours in report.ours:
                for one in report.comparisons(horizon, ours):
                    numbers.append(
                        {
                            **asdict(one),
                            "better": one.better,
                            "won": one.won,
                            "lost": one.lost,
                            "ratio": one.ratio,
                            "of_losses": one.of_losses,
                            "interval": one.interval,
                            "median": one.median,
                        }
                    )
        say(console, "")
        show_table(console, *report.final_losses())
        normalised = {
            str(horizon): {
                report.runs.label(name): {
                    measure: {"mean": statistics.fmean(values.values()), "median": statistics.median(values.values())}
                    for measure in MEASURES
                    if (values := report.runs.normalised(name, horizon, measure))
                }
                for name in report.runs.chosen
            }
            for horizon in report.horizons
        }
        write_text(out, report.markdown() if out.suffix == ".md" else report.html())
        say(console, "")
        say(console, f"Wrote {out}")
        said = {"facts": report.facts, "warnings": report.warnings}
        return Outcome(0, {"command": "report", **said, "comparisons": numbers, "normalised": normalised, "file": out})

    def _selected(self, runs: list[Run]) -> tuple[list[Run], list[Run]]:
        """The runs of one theta, each horizon with one code, of the suite and horizons asked for, and all others."""
        runs = [run for run in runs if self.suite in (None, run.suite)]
        runs = [run for run in runs if not self.horizons or run.horizon in self.horizons]
        thetas = Counter(run.theta_sha256 for run in runs if run.optimizer == "lopt")
        if not thetas:
            raise ValueError("folder: no runs of the learned optimizer here; lopt evaluate makes them")
        sha256 = next(iter(thetas))
        if self.theta is not None:
            known = [one for one in thetas if one.startswith(self.theta)]
            sha256 = known[0] if len(known) == 1 else file_checksum(self.theta)
            if sha256 not in thetas:
                raise ValueError(f"theta: no runs of {self.theta} here; there are {', '.join(thetas)}")
        elif len(thetas) > 1:
            raise ValueError(f"theta: the table has several, say which: {', '.join(thetas)}")
        ours = [run for run in runs if run.theta_sha256 == sha256]
        code = {
            horizon: _code([run for run in ours if run.horizon == horizon]) for horizon in {r.horizon for r in ours}
        }

        def belongs(run: Run) -> bool:
            return run.optimizer != "lopt" or (run.theta_sha256 == sha256 and run.code_sha256 == code[run.horizon])

        return [run for run in runs if belongs(run)], [run for run in runs if not belongs(run)]


def _code(runs: list[Run]) -> str:
    """The code, as SHA-256, with which most tasks were run; of several, the one that runs now, or else the newest."""
    tasks: dict[str, set[str]] = {}
    for run in runs:
        tasks.setdefault(run.code_sha256, set()).add(run.task)
    now = code_sha256()
    return max(reversed(tasks), key=lambda code: (len(tasks[code]), code == now))


def show_comparisons(console: Console, report: Report, horizon: int) -> None:
    """The learned optimizer against every opponent, by step; the file has more."""
    say(console, "")
    say(console, f"{horizon} steps, {len(report.runs.families(horizon))} tasks")
    for ours in report.ours:
        if (against := report.against(horizon, ours)).rows:
            show_table(console, *against)


def _facts(runs: list[Run]) -> dict[str, str]:
    """What was run, in words."""

    def several(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return {
        "suite": several([run.suite for run in runs]),
        "families": several(sorted(run.family for run in runs if run.family)),
        "data": several(sorted(run.data for run in runs if run.data)),
        "seeds": several(sorted(str(run.seed) for run in runs)),
        "opponents' code": several(sorted(run.impl for run in runs if run.optimizer != "lopt")),
        **{name: _counted(values) for name, values in _origins(runs).items()},
    }


def _origins(runs: list[Run]) -> dict[str, Counter[str]]:
    """What the rows were made by: how many rows by which."""
    ours = [run for run in runs if run.optimizer == "lopt"]
    return {
        "theta, SHA-256": Counter(run.theta_sha256 for run in ours),
        "code of lopt, SHA-256": Counter(run.code_sha256 for run in ours),
        "implementation of lopt": Counter(run.impl for run in ours),
        "versions": Counter(f"lopt {r.lopt}, torch {r.torch}, numpy {r.numpy}, python {r.python}" for r in runs),
        "machines": Counter(run.machine or "unknown" for run in runs),
        "commits": Counter(run.commit[:10] or "unknown" for run in runs),
    }


def _warnings(runs: list[Run], left_out: list[Run]) -> list[str]:
    """What the rows that are compared do not have in common, and which others there are."""
    origins = _origins(runs)
    for run in runs:
        if run.optimizer != "lopt":
            origins.setdefault(f"code of {run.name}", Counter())[run.impl] += 1
    found = [f"Compared although of several {name}: {_counted(v)}" for name, v in origins.items() if len(v) > 1]
    others = Counter(f"theta {run.theta_sha256[:12]} with code {run.code_sha256[:12]}" for run in left_out)
    return found + ([f"Left out: {_counted(others)}"] if others else [])


def _counted(values: Counter[str]) -> str:
    return "; ".join(f"{value} ({count} runs)" for value, count in values.items())
