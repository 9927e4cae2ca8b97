"""Compare optimizers on tasks by one call: the runs as rows. ``lopt evaluate`` does the same with suites."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

from lopt.evaluation.jobs import Learned, Plan, execute, missing_packages
from lopt.evaluation.table import LEARNED, Run, RunTable
from lopt.meta.executors import Executor
from lopt.rule import Theta
from lopt.tasks.task import Task

#: Said in the rows in place of the name of a suite.
SUITE = "own"


def evaluate(
    tasks: Task | Sequence[Task],
    optimizers: Sequence[str] = ("lopt", "adamw-warmup-tuned"),
    *,
    theta: Theta | str | PathLike[str] = "default",
    steps: int | Sequence[int] = 1000,
    seeds: Sequence[int] = (0, 1, 2),
    executor: Executor | int = 1,
    out: str | PathLike[str] | None = None,
    points: int = 20,
    impl: str = "auto",
    on_done: Callable[[int, int], None] | None = None,
) -> list[Run]:
    """Train every task with every optimizer; each seed gives all of them the same initial values and minibatches.

    An optimizer with several settings, as the eight learning rates of ``adamw-warmup-tuned``, has a row for each;
    :class:`lopt.evaluation.comparison.Runs` chooses, for each task, by the loss on outer_valid, and compares.

    Args:
        tasks: with different names.
        optimizers: names as in :mod:`lopt.evaluation.opponents`, or ``lopt``, ``lopt-untold`` (not told the number of
            steps), ``lopt-averaged`` and ``lopt-blind`` (told no validation losses); ``NAME@k`` is an opponent with its
            first k settings.
        theta: of the learned optimizer.
        steps: length of the runs, or several.
        seeds: of initial values and minibatches.
        executor: what makes the runs; a number is that of processes, 1 is this process. An executor is not closed.
        out: folder for runs.csv, where rows are kept: those that are there are not run again.
        points: of a run's curve (``Run.points``).
        impl: implementation of the learned optimizer.
        on_done: called with the numbers of runs done and to do.

    Returns:
        One row for each run: losses at the end and along the way, seconds, and what the row depends on.

    Raises:
        ValueError: an unknown optimizer, or two tasks of one name.
        ModuleNotFoundError: the package of an optimizer is missing.
        RuntimeError: runs that failed, after all others have ended.

    Example:
        >>> from lopt.evaluation.comparison import Runs
        >>> from lopt.tasks import sample_task
        >>> rows = evaluate(sample_task(0, ["teacher"]), ["lopt", "adamw-cosine"], steps=20, seeds=[0])
        >>> [row.name for row in rows], len(rows[0].points)
        (['lopt', 'adamw-cosine'], 21)
        >>> Runs(rows).compare("lopt", "adamw-cosine", 20, "test").ratio < 1
        True
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {twice} are names of several; give each its own, as with from_module(..., name=...)")
    for name, why in missing_packages(optimizers).items():
        raise ModuleNotFoundError(f"optimizer {name}: {why}")
    plan = Plan(
        suite=SUITE,
        tasks=tuple(tasks),
        horizons=(steps,) if isinstance(steps, int) else tuple(steps),
        seeds=tuple(seeds),
        optimizers=tuple(optimizers),
        learned=Learned.load(theta, impl) if set(optimizers) & set(LEARNED) else None,
        points=points,
    )
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out
        return execute(plan.jobs, RunTable(Path(folder) / "runs.csv"), executor, on_done)
