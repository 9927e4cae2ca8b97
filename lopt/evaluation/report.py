"""An evaluation as one file: tables, figures, and a plain list of what was lost."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lopt.evaluation.comparison import MEASURES, NO_WORSE, Comparison, Measure, Per, Runs
from lopt.evaluation.opponents import OPPONENTS
from lopt.evaluation.pages import Curves, Page, Table
from lopt.evaluation.sampled_suites import ENVELOPE, envelope_task
from lopt.evaluation.table import LEARNED
from lopt.figures import COLOURS, logarithmic, require_matplotlib

PER: tuple[Per, ...] = ("step", "second")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is reported: the learned optimizer's names in the runs, its opponents, and where the runs come from;
    ``warnings`` are sentences on what they do not have in common."""

    runs: Runs
    title: str
    facts: dict[str, str]
    warnings: Sequence[str] = ()

    @property
    def ours(self) -> list[str]:
        """The names of the learned optimizer that the runs have."""
        return [name for name in LEARNED if name in self.runs.chosen]

    @property
    def others(self) -> list[str]:
        """The opponents, in the order of their table, then others by name."""
        order = {name: place for place, name in enumerate(OPPONENTS)}
        names = (name for name in self.runs.chosen if name not in LEARNED)
        return sorted(names, key=lambda name: (order.get(name, len(order)), name))

    @property
    def horizons(self) -> list[int]:
        """In rising order, those of the learned optimizer; all, if it is not there."""
        places = [place for name in self.ours or self.others for place in self.runs.chosen[name]]
        return sorted({horizon for _, horizon in places})

    def comparisons(self, horizon: int, ours: str) -> list[Comparison]:
        """Against every opponent, by step and by second, training and test loss."""
        found = [
            self.runs.compare(ours, other, horizon, measure, per)
            for other in self.others
            for per in PER
            for measure in MEASURES
        ]
        return [one for one in found if one is not None]

    # ---- Words ------------------------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """What came out, in a sentence for each length, loss and name of the learned optimizer that was run first, and
        one on runs that diverged.

        Ahead and behind mean that the interval of the ratio is below or above 1; level, that 1 is in it.
        """
        lines = []
        for ours in self.ours[:1]:
            for horizon in self.horizons:
                for measure in reversed(MEASURES):
                    found = self._against_all(horizon, ours, measure)
                    if found:
                        tasks = max(len(one.ratios) for one in found)
                        loss = {"train": "training"}.get(measure, measure)
                        where = f"{horizon} steps, {loss} loss, {tasks} {'task' if tasks == 1 else 'tasks'}"
                        lines.append(f"{where}: {ours} is {self._standing(found)}.")
        return [*lines, *self._diverged()]

    def _standing(self, found: Sequence[Comparison]) -> str:
        groups: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
        for one in sorted(found, key=lambda one: one.ratio):
            low, high = one.interval
            where = "ahead of" if high < 1 else "behind" if low > 1 else "level with"
            groups[where].append(f"{self.runs.label(one.other)} ({one.ratio:.2f})")
        return "; ".join(f"{where} {', '.join(names)}" for where, names in groups.items() if names)

    def _diverged(self) -> list[str]:
        counts = []
        for name in (*self.ours, *self.others):
            runs = [run for group in self.runs.chosen[name].values() for run in group]
            if any(run.diverged for run in runs):
                counts.append(f"{self.runs.label(name)} {sum(run.diverged for run in runs)} of {len(runs)}")
        return [f"Runs that diverged: {', '.join(counts) or 'none'}."]

    # ---- Curves -----------------------------------------------------------------------------------------------------

    def curves(self, horizon: int) -> dict[str, Curves]:
        """task -> name -> steps and mean losses over the seeds, of runs that have recorded any."""
        found: dict[str, dict[str, Any]] = {}
        for name in (*self.ours, *self.others):
            for (task, steps), runs in self.runs.chosen[name].items():
                if steps != horizon or not all(run.points for run in runs):
                    continue
                along = [{step: losses for step, _, *losses in run.points} for run in runs]
                at = sorted(set.intersection(*(set(points) for points in along)))
                lines = {"steps": at} | {
                    measure: [_written_loss(statistics.fmean(points[step][column] for points in along)) for step in at]
                    for column, measure in enumerate(MEASURES)
                }
                found.setdefault(task, {})[self.runs.label(name)] = lines
        return dict(sorted(found.items()))

    def styles(self) -> dict[str, dict[str, str]]:
        """Name -> strokes: the learned optimizer's thick, others by colour, and by dashes where colours are used up."""
        styles = {}
        for place, name in enumerate(self.ours):
            styles[name] = {"stroke": COLOURS[place], "stroke-width": "3"}
        colours = COLOURS[len(self.ours) :]
        for place, name in enumerate(self.others):
            dashes, colour = divmod(place, len(colours))
            stroke = {"stroke": colours[colour], "stroke-width": "1.5"}
            styles[self.runs.label(name)] = {**stroke, **({"stroke-dasharray": f"{3 * dashes} 3"} if dashes else {})}
        return styles

    # ---- Tables -----------------------------------------------------------------------------------------------------

    def headline(self, ours: str) -> Table:
        """One row per opponent: at every horizon the geometric mean of the ratio, its interval, the share better."""
        places = [(horizon, measure) for horizon in self.horizons for measure in MEASURES]
        rows = []
        for other in self.others:
            found = [self.runs.compare(ours, other, horizon, measure) for horizon, measure in places]
            if any(found):
                cells = [f"{_ratio(one)}, {one.better:.0%}" if one is not None else "" for one in found]
                rows.append([self.runs.label(other), *cells])
        return Table([f"{ours} against", *(f"{measure}, {horizon} steps" for horizon, measure in places)], rows)

    def final_losses(self) -> Table:
        """One row per other optimizer: geometric means of L / L_other in test loss, by horizon and over all."""
        lengths = [*self.horizons, *([None] if len(self.horizons) > 1 else [])]
        columns = [(horizon, ours) for horizon in lengths for ours in self.ours]
        rows = []
        for other in (*self.others, *self.ours):
            cells = []
            for horizon, ours in columns:
                one = self.runs.compare(ours, other, horizon, "test") if ours != other else None
                cells.append("" if one is None or one.of_losses is None else f"{one.of_losses:.3f}")
            if any(cells):
                rows.append([self.runs.label(other), *cells])
        titles = [f"{ours}, {f'{horizon} steps' if horizon else 'all lengths'}" for horizon, ours in columns]
        return Table(["test loss over that of", *titles], rows)

    def every_loss(self, horizon: int, measure: Measure) -> Table:
        """One row per task: the mean final loss of every optimizer."""
        names = [*self.ours, *self.others]
        found = {name: self.runs.final(name, horizon, measure) for name in names}
        names = [name for name in names if found[name]]
        rows = [
            [task, *(f"{found[name][task]:.4g}" if task in found[name] else "" for name in names)]
            for task in sorted(set().union(*(found[name] for name in names)))
        ]
        return Table([f"{measure} loss", *map(self.runs.label, names)], rows)

    def against(self, horizon: int, ours: str, per: Per = "step") -> Table:
        """One row per opponent: geometric mean of the ratio, its interval, median, shares better, won and lost."""
        header = [f"{ours} against" + ("" if per == "step" else ", at equal time")]
        for measure in MEASURES:
            header += [f"{measure}: ratio (95%)", "median", "better / won / lost"]
        rows = []
        for other in self.others:
            found = [self.runs.compare(ours, other, horizon, measure, per) for measure in MEASURES]
            if any(found):
                cells = [cell for one in found for cell in (["", "", ""] if one is None else _cells(one))]
                rows.append([self.runs.label(other), *cells])
        return Table(header, rows)

    def normalised(self, horizon: int) -> Table:
        """Normalised losses as the paper has them."""
        header = ["normalised loss", *(f"{m} {what}" for m in MEASURES for what in ("mean", "median"))]
        rows = []
        for name in (*self.ours, *self.others):
            row = [self.runs.label(name)]
            for measure in MEASURES:
                values = list(self.runs.normalised(name, horizon, measure).values())
                row += [f"{statistics.fmean(values):.4f}", f"{statistics.median(values):.4f}"] if values else ["", ""]
            if any(row[1:]):
                rows.append(row)
        return Table(header, rows)

    def costs(self, horizon: int) -> Table:
        """Time and memory of every optimizer, medians over tasks, and what diverged."""
        header = ["cost", "trials", "ms per step", "state, bytes per parameter", "diverged"]
        rows = []
        for name in (*self.ours, *self.others):
            same = [run for place, runs in self.runs.chosen[name].items() if place[1] == horizon for run in runs]
            if same:
                ms = statistics.median(1e3 * (self.runs.step_time(run) or run.seconds / run.horizon) for run in same)
                state = statistics.median(run.state_bytes_per_param for run in same)
                diverged = f"{sum(run.diverged for run in same)} of {len(same)}"
                rows.append([name, str(self.runs.budgets[name]), f"{ms:.2f}", f"{state:.1f}", diverged])
        return Table(header, rows)

    def tasks(self, horizon: int, ours: str, measure: Measure) -> Table:
        """Ratios by task; the tasks where the geometric mean over opponents is worst come first."""
        found = self._against_all(horizon, ours, measure)
        by_task: dict[str, dict[str, float]] = {}
        for one in found:
            for task, value in one.ratios.items():
                by_task.setdefault(task, {})[one.other] = value
        order = sorted(by_task, key=lambda task: -statistics.geometric_mean(by_task[task].values()))
        others = [one.other for one in found]
        rows = [
            [task, *(f"{by_task[task][other]:.3f}" if other in by_task[task] else "" for other in others)]
            for task in order
        ]
        return Table([f"{measure}: ratio to", *(self.runs.label(other) for other in others)], rows)

    def by_family(self, horizon: int, ours: str, measure: Measure) -> Table:
        """Geometric means of the ratios of each family."""
        found = self._against_all(horizon, ours, measure)
        means = [self._by_family(one) for one in found]
        families = sorted({family for mean in means for family in mean})
        rows = [[family, *(f"{mean[family]:.2f}" if family in mean else "" for mean in means)] for family in families]
        return Table([f"{measure}: ratio to", *(self.runs.label(one.other) for one in found)], rows)

    def losses(self, horizon: int, ours: str) -> list[str]:
        """Where we lose, in sentences: opponents, families, tasks."""
        lines = []
        for measure in MEASURES:
            found = self._against_all(horizon, ours, measure)
            for one in found:
                other, (low, high) = self.runs.label(one.other), one.interval
                if one.ratio > 1 or one.lost > one.won:
                    lines.append(
                        f"{measure}: behind {other}, ratio {one.ratio:.3f} ({low:.3f} to {high:.3f}), "
                        f"lost {one.lost:.0%}, won {one.won:.0%} of {len(one.ratios)} tasks"
                    )
                    continue
                behind = [f"{family} {mean:.2f}" for family, mean in self._by_family(one).items() if mean > NO_WORSE]
                if behind:
                    lines.append(f"{measure}: ahead of {other} on the whole, behind on {', '.join(behind)}")
            worst = [(value, task, self.runs.label(one.other)) for one in found for task, value in one.ratios.items()]
            worst = [max(group) for group in (_same(worst, task) for task in dict.fromkeys(w[1] for w in worst))]
            for value, task, other in sorted(worst, reverse=True)[:5]:
                if value > NO_WORSE:
                    lines.append(f"{measure}: {value:.2f} times the loss of {other} on {task}")
        return lines

    def _against_all(self, horizon: int, ours: str, measure: Measure) -> list[Comparison]:
        found = (self.runs.compare(ours, other, horizon, measure) for other in self.others)
        return [one for one in found if one is not None]

    def _by_family(self, one: Comparison) -> dict[str, float]:
        """Geometric mean of the ratios of each family."""
        families = self.runs.families(one.horizon)
        groups: dict[str, list[float]] = {}
        for task, value in one.ratios.items():
            groups.setdefault(families[task], []).append(value)
        return {family: statistics.geometric_mean(groups[family]) for family in sorted(groups)}

    def envelope(self) -> Table | None:
        """Training losses on the task with a published envelope, beside it; None if it was not run."""
        task = envelope_task().name
        horizons = [h for h in self.horizons if h in ENVELOPE]
        names = [name for name in (*self.ours, *self.others) if any(task == t for t, _ in self.runs.chosen[name])]
        if not names or not horizons:
            return None
        rows = [["published envelope", *(f"{ENVELOPE[h]:.4f}" for h in horizons)]]
        for name in names:
            cells = []
            for horizon in horizons:
                runs = self.runs.chosen[name].get((task, horizon), [])
                cells.append(f"{statistics.fmean(run.train_loss for run in runs):.4f}" if runs else "")
            rows.append([self.runs.label(name), *cells])
        return Table([f"training loss on {task}", *(f"{h} steps" for h in horizons)], rows)

    # ---- The file ---------------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The whole report, which needs nothing else.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        require_matplotlib("--out FILE.md, which has no figures")
        return self._page(figures=True).html()

    def markdown(self) -> str:
        """The whole report but for the figures."""
        return self._page(figures=False).markdown()

    def _page(self, figures: bool) -> Page:
        page = Page(self.title)
        page.summary(self.summary())
        page.items([f"{name}: {value}" for name, value in self.facts.items()], fold="What was run")
        for warning in self.warnings:
            page.warning(warning)
        page.note(
            "A ratio is (L + f) / (L_other + f), means over the seeds, f = 1% of the initial loss (where losses are "
            "negative, from the lowest seen): below 1 is better. Better: below 1; won: below .98; lost: above 1.02. "
            "Ratios are geometric means over tasks, intervals those of the bootstrap over tasks. Of several trials "
            "the one with the least loss on outer_valid counts. Equal time: when the quicker of the two ends. A loss "
            "over that of another is without f, of tasks where both are positive."
        )
        for ours in self.ours:
            page.table(self.headline(ours), ratios=True)
        page.table(self.final_losses(), ratios=True)
        for horizon in self.horizons:
            page.heading(2, f"{horizon} steps, {len(self.runs.families(horizon))} tasks")
            for ours in self.ours:
                for per in PER:
                    if (against := self.against(horizon, ours, per)).rows:
                        page.table(against, ratios=True)
            if figures:
                page.in_html(self._forest(horizon))
                if curves := self.curves(horizon):
                    page.in_html("<h3>Loss curves of a task</h3>")
                    page.curves(curves, self.styles())
            page.table(self.normalised(horizon))
            page.table(self.costs(horizon))
            for ours in self.ours:
                if self.against(horizon, ours).rows:
                    page.heading(3, f"Where {ours} loses")
                    page.items(self.losses(horizon, ours) or ["nowhere"])
            for ours in self.ours:
                for measure in MEASURES:
                    for what, table in (("family", self.by_family), ("task", self.tasks)):
                        if (ratios := table(horizon, ours, measure)).rows:
                            page.table(ratios, ratios=True, fold=f"{ours}, {measure} loss, every {what}")
            for measure in MEASURES:
                page.table(self.every_loss(horizon, measure), fold=f"{measure} losses as they are")
        envelope = self.envelope()
        if envelope is not None:
            page.heading(2, "Beside a published envelope")
            page.table(envelope)
        return page

    def _forest(self, horizon: int) -> str:
        """Ratios with their intervals, one line per opponent, as an inline figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 1.2 + 0.32 * len(self.others)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, MEASURES, strict=True):
            for at, ours in enumerate(self.ours):
                found = [self.runs.compare(ours, other, horizon, measure) for other in self.others]
                for row, one in enumerate(found):
                    if one is None:
                        continue
                    y = row + 0.22 * (at - (len(self.ours) - 1) / 2)
                    low, high = one.interval
                    axes.plot([low, high], [y, y], color=COLOURS[at], linewidth=2)
                    label = ours if row == next(i for i, c in enumerate(found) if c is not None) else None
                    axes.plot([one.ratio], [y], "o", color=COLOURS[at], markersize=5, label=label)
            axes.axvline(1.0, color="0.4", linewidth=0.8)
            logarithmic(axes, "x")
            axes.set_title(f"{measure} loss, ratio (left is better)", loc="left", fontsize=10)
            axes.set_yticks(range(len(self.others)), [self.runs.label(other) for other in self.others])
            axes.grid(axis="x", color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        if self.others:
            panels[0].legend(frameon=False, fontsize=9)
        return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lopt", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _written_loss(loss: float) -> float | None:
    return float(f"{loss:.4g}") if math.isfinite(loss) else None


def _ratio(one: Comparison) -> str:
    low, high = one.interval
    return f"{one.ratio:.2f} ({low:.2f} to {high:.2f})"


def _cells(one: Comparison) -> list[str]:
    return [_ratio(one), f"{one.median:.2f}", f"{one.better:.0%} / {one.won:.0%} / {one.lost:.0%}"]


def _same(entries: Sequence[tuple[float, str, str]], task: str) -> list[tuple[float, str, str]]:
    return [entry for entry in entries if entry[1] == task]
