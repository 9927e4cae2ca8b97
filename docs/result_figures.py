"""The figures of the pages of results, drawn from kept rows; ``python docs/figures.py`` draws them all.

Ratios, intervals and choice of trials are those of ``lopt report`` (:mod:`lopt.evaluation.comparison`). Blue and left
of the line at 1: the learned optimizer has the lower loss.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lopt.evaluation.comparison import Comparison, Measure, Per, Runs
from lopt.evaluation.sampled_suites import ENVELOPE
from lopt.evaluation.scores import REFERENCES, score
from lopt.evaluation.step_times import StepTimes
from lopt.evaluation.table import LossName, Run, RunTable
from lopt.experiments.rows import relative, select
from lopt.figures import COLOURS, logarithmic, plain
from lopt.provenance import file_checksum
from lopt.tables import read_csv

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
MEASURES: dict[Measure, str] = {"train": "training loss", "test": "test loss"}
FAMILIES = {
    "mlp": "perceptrons",
    "mlp_ae": "autoencoders",
    "mlp_vae": "variational autoencoders",
    "conv_fc": "convolutions",
    "conv_pooling": "convolutions, pooled",
    "char_rnn_language_model": "character RNNs",
    "word_rnn_language_model": "word RNNs",
    "rnn_text_classification": "RNN classifiers",
    "vit": "vision transformers",
    "transformer_language_model": "transformers",
    "nvp": "flows (NVP)",
    "maf": "flows (masked)",
}
GRIDS = {
    "adam-grid": "Adam, best of 7 rates",
    "adam-cosine-grid": "Adam cosine, best of 7",
    "adam-grids": "best of these 14",
}
UNTUNED = (
    *("adam", "adamw-cosine", "muon", "nadamw-list-1", "prodigy", "dog", "mechanic"),
    *("schedule-free", "prodigy-schedule-free", "soap"),
)

BETTER = "\nleft of 1: lopt is better"
FELL = "\nleft of 1: it fell"
LEAST = 1e-4  # of what fell, lower values are drawn here

#: row -> series -> value and, where there is one, its interval
Forest = Mapping[str, Mapping[str, tuple[float, float, float]]]


def theta_of(name: str) -> str:
    return file_checksum(name)


@cache
def rows_of(table: str) -> tuple[Run, ...]:
    return tuple(RunTable(RESULTS / table).rows.values())


@cache
def families(theta: str) -> Runs:
    """The runs on twelve families: of one theta, by the code with most of them for each length, and of all others."""
    rows = rows_of("families/runs.csv")
    ours = [run for run in rows if run.theta_sha256 == theta_of(theta)]
    code: dict[int, str] = {}
    for horizon in {run.horizon for run in ours}:
        codes = [run.code_sha256 for run in ours if run.horizon == horizon]
        code[horizon] = max(dict.fromkeys(codes), key=codes.count)
    kept = [run for run in ours if run.code_sha256 == code[run.horizon]]
    others = [run for run in rows if run.optimizer != "lopt"]
    return Runs([*kept, *others], step_times=StepTimes(RESULTS / "families").seconds())


# ---- Ways to draw ----------------------------------------------------------------------------------------------------


def panels(count: int, height: float, sharey: bool = True) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, count, sharey=sharey, squeeze=False)[0]


def ratio_axis(axes: Any, title: str, word: str) -> None:
    plain(axes)
    axes.axvline(1, color="0.3", linewidth=1)
    logarithmic(axes, "x")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(word)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def forest(found: Mapping[str, Forest], word: str = f"ratio of losses{BETTER}") -> Any:
    """A panel for each title, a line for each row: dots with their intervals, coloured by series."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    series = list(dict.fromkeys(one for rows in found.values() for values in rows.values() for one in values))
    figure, every = panels(len(found), 1.1 + 0.34 * len(names))
    for axes, (title, rows) in zip(every, found.items(), strict=True):
        for name, values in rows.items():
            for one, (value, low, high) in values.items():
                at = names.index(name) + 0.5 * ((series.index(one) + 0.5) / len(series) - 0.5)
                colour = COLOURS[(1, 0, 2)[series.index(one)]]
                axes.plot([low, high], [at, at], color=colour, linewidth=2.2, solid_capstyle="round")
                axes.plot([value], [at], "o", color=colour, markersize=5.5)
        ratio_axis(axes, title, word)
    every[0].set_yticks(range(len(names)), names)
    every[0].set_ylim(len(names) - 0.5, -0.5)
    if len(series) > 1:
        _legend(figure, {one: COLOURS[(1, 0, 2)[place]] for place, one in enumerate(series)})
    return figure


def strips(found: Mapping[str, Mapping[str, Sequence[float]]], word: str, bar: str) -> Any:
    """A panel for each title, a line for each row: a dot for each value, and a bar at their middle, ``bar``."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    figure, every = panels(len(found), 1.1 + (0.34 if len(names) < 14 else 0.26) * len(names))
    middle: Callable[[Iterable[float]], float] = getattr(statistics, bar)
    for axes, (title, rows) in zip(every, found.items(), strict=True):
        for name, values in rows.items():
            at = names.index(name)
            axes.plot(values, [at] * len(values), "o", color="0.5", alpha=0.45, markersize=6, markeredgewidth=0)
            mean = middle(values)
            axes.plot([mean], [at], "|", color=COLOURS[mean < 1], markersize=14, markeredgewidth=3.5)
        ratio_axis(axes, title, word)
    every[0].set_yticks(range(len(names)), names)
    every[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def curves(
    found: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    xlabel: str,
    ylabel: str,
    level: float | None = None,
) -> Any:
    """A panel for each title, a line for each name, and one at ``level``."""
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    colours = {name: COLOURS[(1, 0, 2, 3, 4, 5)[place]] for place, name in enumerate(names)}
    figure, every = panels(len(found), 3.2)
    for axes, (title, lines) in zip(every, found.items(), strict=True):
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, marker="o", color=colours[name], markersize=4.5, linewidth=1.8)
        plain(axes)
        if level is not None:
            axes.axhline(level, color="0.3", linewidth=1)
        logarithmic(axes, "x")
        logarithmic(axes, "y")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(xlabel)
    every[0].set_ylabel(ylabel)
    _legend(figure, colours)
    return figure


def _legend(figure: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linewidth=2.2, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)


# ---- What is drawn ---------------------------------------------------------------------------------------------------


def against(
    theta: str, name: str, others: Mapping[str, str], horizons: Sequence[int], per: Per = "step"
) -> dict[str, Forest]:
    """Geometric means over tasks with their intervals, by measure, opponent and number of steps."""
    runs, found = families(theta), dict[str, Forest]()
    for measure, title in MEASURES.items():
        rows: dict[str, dict[str, tuple[float, float, float]]] = {}
        for other, label in others.items():
            for horizon in horizons:
                one = runs.compare(name, other, horizon, measure, per) if other in runs.chosen else None
                if one is not None:
                    rows.setdefault(label, {})[f"{horizon} steps"] = (one.ratio, *one.interval)
        found[title] = rows
    return found


def by_family(theta: str, other: str, horizon: int) -> dict[str, dict[str, list[float]]]:
    """The ratio of every task, by measure and family, the worst family of the test loss first."""
    runs = families(theta)
    found: dict[str, dict[str, list[float]]] = {}
    order: list[str] = []
    for measure in ("test", "train"):
        one = _there(runs.compare("lopt", other, horizon, measure))
        groups: dict[str, list[float]] = {}
        for task, ratio in one.ratios.items():
            groups.setdefault(FAMILIES[runs.families(horizon)[task]], []).append(ratio)
        order = order or sorted(groups, key=lambda family: -statistics.geometric_mean(groups[family]))
        found[MEASURES[measure]] = {family: groups[family] for family in order}
    return found


def tasks(theta: str, others: Mapping[str, str], horizon: int) -> dict[str, dict[str, list[float]]]:
    """The ratio of every task to tuned opponents, by measure."""
    runs = families(theta)
    return {
        title: {
            label: list(_there(runs.compare("lopt", other, horizon, measure)).ratios.values())
            for other, label in others.items()
        }
        for measure, title in MEASURES.items()
    }


def ends(theta: str, rows: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Training loss at the end over that of the start, of every run whose losses are positive, by length."""
    ours = [run for run in rows if run.theta_sha256 == theta_of(theta) and run.train_loss > 0]
    return {
        title: {
            f"{horizon} steps": [
                max(run.train_loss / run.initial_train_loss, LEAST)
                for run in ours
                if (run.name, run.horizon) == (name, horizon)
            ]
            for horizon in sorted({run.horizon for run in ours})
        }
        for name, title in (("lopt", "told"), ("lopt-untold", "untold"))
    }


def small_data(theta: str, references: Mapping[tuple[LossName, str], str], horizons: Sequence[int]) -> dict[str, Any]:
    """Ratios of the small suite, geometric means over tasks, by number of steps."""
    rows = [run for run in rows_of("evaluate_small.csv") if run.theta_sha256 in ("", theta_of(theta))]
    ours = {(run.task, run.seed) for run in rows if run.optimizer == "lopt"}
    rows = [run for run in rows if (run.task, run.seed) in ours]
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {"told": {}, "untold": {}}
    for title, lines in found.items():
        for (loss, name), label in references.items():
            (reference,) = (one for one in REFERENCES[loss] if one.name == name)
            scores = {steps: score(rows, steps, title == "told", loss, reference) for steps in horizons}
            there = {steps: one.summary.ratio for steps, one in scores.items() if one is not None}
            lines[label] = list(map(float, there)), list(there.values())
    return found


#: Language models whose curves are drawn.
SHOWN = ("gpt-2x64-small-torch-headers", "gpt-2x64-torch-topics", "llama-2x64-torch-topics")


def language() -> Any:
    """Test loss by learning rate of the tuned opponents; the learned optimizer has none."""
    rows = rows_of("language/runs.csv")
    names = {"adamw-warmup-tuned": "AdamW", "muon-warmup-tuned": "Muon"}
    shown = {}
    for task in SHOWN:
        lines = shown[task] = {}
        for name, label in names.items():
            some = sorted((run.lr, run.test_loss) for run in rows if (run.name, run.task) == (name, task))
            lines[label] = [lr for lr, _ in some], [loss for _, loss in some]
        lowest, highest = min(lines["AdamW"][0]), max(lines["Muon"][0])
        for name, label in (("lopt", "lopt, told"), ("lopt-averaged", "lopt, untold, averaged")):
            (loss,) = (run.test_loss for run in rows if (run.name, run.task) == (name, task))
            lines[label] = [lowest, highest], [loss, loss]
    return curves(shown, "learning rate of AdamW and Muon", "test loss")


def envelope() -> Any:
    """Training loss along the runs on the published task, beside the published envelope."""
    rows, names = (
        rows_of("envelope/runs.csv"),
        {"lopt": "lopt, told", "lopt-untold": "lopt, untold", "adam": "Adam, 1e-3"},
    )
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for name, label in names.items():
        points = [run.points[1:] for run in rows if run.name == name]
        lines[label] = (
            [step for step, *_ in points[0]],
            [statistics.fmean(point[2] for point in same) for same in zip(*points, strict=True)],
        )
    lines["published, tuned"] = (
        [step for step in ENVELOPE if step <= 10_000],
        [loss for step, loss in ENVELOPE.items() if step <= 10_000],
    )
    return curves({"Perceptron 128-128 on Fashion-MNIST": lines}, "steps", "training loss")


def experiments() -> dict[str, dict[str, list[float]]]:
    """Loss over that of the best Adam at every place of the experiments that have one, told the number of steps."""
    found: dict[str, dict[str, list[float]]] = {title: {} for title in MEASURES.values()}
    for name in ("width", "batch-size", "dataset-size", "horizon", "resnet", "transformer"):
        rows = rows_of(f"experiments/{name}/{name}.csv")
        places = dict.fromkeys((run.task, run.x) for run in rows)
        for measure, title in MEASURES.items():
            found[title][name] = [
                relative(select(rows, task=task, x=x), "lopt", "adam-tuned", f"{measure}_loss") for task, x in places
            ]
    return found


def digits() -> Any:
    """Means over the seeds of the losses along the runs of ``lopt train``."""
    names = {"lopt": "lopt", "adam": "Adam 1e-3", "adamw-cosine": "AdamW 1e-3, cosine"}
    rows, found = read_csv(RESULTS / "train.csv"), {}
    for column, title in (("train_loss", "training loss"), ("test_loss", "test loss")):
        lines = found[f"{title} on digits"] = {}
        for name, label in names.items():
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if row["optimizer"] == name and int(row["step"]):
                    by_step.setdefault(int(row["step"]), []).append(float(row[column]))
            lines[label] = list(by_step), list(map(statistics.fmean, by_step.values()))
    return curves(found, "steps", "loss")


def worst_small(theta: str, horizon: int) -> dict[str, dict[str, list[float]]]:
    """The ratio of every small task to Adam whose rate was chosen in hindsight."""
    rows = [run for run in rows_of("evaluate_small.csv") if run.theta_sha256 in ("", theta_of(theta))]
    found: dict[str, dict[str, list[float]]] = {}
    order: list[str] = []
    losses: dict[LossName, str] = {"test_loss": "test loss", "train_loss": "training loss"}
    for loss, title in losses.items():
        one = score(rows, horizon, True, loss, REFERENCES[loss][0])
        assert one is not None
        order = order or sorted(one.ratios, key=lambda task: -one.ratios[task])
        found[title] = {task: [one.ratios[task]] for task in order}
    return found


def _there(one: Comparison | None) -> Comparison:
    assert one is not None
    return one


def _named(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


#: Figure -> what draws it.
FIGURES: dict[str, Callable[[], Any]] = {
    "tuned": lambda: forest(against("default", "lopt", GRIDS, (200, 1000))),
    "loses": lambda: strips(by_family("default", "adam-grids", 1000), f"ratio to tuned Adam{BETTER}", "geometric_mean"),
    "untold": lambda: forest(against("default", "lopt-untold", _named(UNTUNED), (1000,))),
    "diverge": lambda: strips(
        ends("default", rows_of("families/runs.csv")), f"training loss, end / start{FELL}", "median"
    ),
    "small": lambda: curves(
        small_data(
            "default",
            {
                ("test_loss", "Adam, lr by valid"): "test, rate by validation",
                ("test_loss", "Adam, oracle's lr"): "test, rate in hindsight",
                ("train_loss", "Adam, best of 7 lrs"): "training, best rate",
            },
            (200, 1000),
        ),
        "steps",
        "ratio to tuned Adam",
        1,
    ),
    "language": language,
    "compact-families": lambda: forest(against("compact", "lopt", _named(UNTUNED) | GRIDS, (200, 1000, 5000))),
    "compact-time": lambda: forest(against("compact", "lopt", _named(UNTUNED), (200, 1000, 5000), "second")),
    "compact-loses": lambda: strips(
        by_family("compact", "prodigy-schedule-free", 1000),
        f"ratio to Prodigy with schedule-free{BETTER}",
        "geometric_mean",
    ),
    "compact-tuned": lambda: strips(tasks("compact", GRIDS, 1000), f"ratio to tuned Adam{BETTER}", "median"),
    "compact-diverge": lambda: strips(
        ends("compact", rows_of("families/runs.csv")), f"training loss, end / start{FELL}", "median"
    ),
    "envelope": envelope,
    "perceptrons": lambda: curves(
        small_data(
            "compact",
            {
                ("test_loss", "Adam, lr by valid"): "test, rate by validation",
                ("test_loss", "Adam, oracle's lr"): "test, rate in hindsight",
                ("test_loss", "Adam 1e-3"): "test, 1e-3",
                ("train_loss", "Adam, best of 7 lrs"): "training, best rate",
            },
            (200, 1000, 2000, 5000),
        ),
        "steps",
        "ratio to Adam",
        1,
    ),
    "experiments": lambda: strips(experiments(), f"ratio to the best of eight Adams{BETTER}", "geometric_mean"),
    "train": digits,
    "perceptrons-loses": lambda: strips(
        worst_small("compact", 1000), f"ratio to the best Adam in hindsight{BETTER}", "geometric_mean"
    ),
}
