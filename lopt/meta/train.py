"""Meta-training by one call: by a recipe or a configuration, on any tasks, anywhere. The command line calls it too."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console

from lopt.meta import checkpoint, trainer
from lopt.meta.config import KNOWN, MetaTrainConfig
from lopt.meta.executors import Executor, LocalProcesses, Serial
from lopt.meta.loggers import Logger, LoggerName, make_logger, require
from lopt.meta.progress import say
from lopt.meta.recipes import RECIPES, changed, recipe
from lopt.rule import Theta
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.own import Entry, OwnTasks
from lopt.tasks.task import Task

#: What a run may be given in place of the tasks of its recipe.
Tasks = Task | TaskDistribution | OwnTasks | Sequence[Entry]

#: The speed is measured for so many seconds, but no longer than a hundredth of the hours.
MEASURED = 10.0


def meta_train(
    config: MetaTrainConfig | str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    tasks: Tasks | None = None,
    hours: float | None = None,
    executor: Executor | int = 1,
    callbacks: Sequence[Logger | LoggerName] = (),
    resume: bool = False,
    console: Console | None = None,
    command: str = "",
    **settings: Any,
) -> Theta:
    """Meta-train a theta.

    Args:
        config: name of a recipe, or a configuration; ``own`` where tasks of yours are given, else ``default``.
        out: folder for all that the run leaves (:func:`lopt.meta.trainer.run` says what), from which it can go on;
            None for none.
        tasks: in place of those of the recipe: a :class:`lopt.tasks.Task`, a :class:`lopt.tasks.TaskDistribution`, or a
            list of tasks, of functions ``sample(seed) -> Task`` and of names of families, drawn equally often.
        hours: budget in hours of wall time, converted once, by a short measurement, to ``inner_steps``; one hour if
            neither is given.
        executor: what makes the inner runs; a number is that of processes, 1 is this process. An executor is not
            closed.
        callbacks: what metrics go to, beside metrics.jsonl: objects with ``update(metrics)`` and ``close()``
            (:class:`lopt.meta.loggers.Logger`), which are not closed, or ``"tensorboard"`` and ``"wandb"``.
        resume: go on from the checkpoint in ``out``, with its settings; those given as well must agree with them. Tasks
            of your own are not in it: give them again.
        console: where progress is shown; standard error by default.
        command: the command line, for the provenance.
        settings: other fields of :class:`lopt.meta.config.MetaTrainConfig`, as ``inner_steps=10**6, init="compact"``.

    Returns:
        The best theta by validation; its provenance holds the configuration and what the run cost.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        FileNotFoundError: ``resume`` is on and there is no checkpoint.
        ModuleNotFoundError: the package of a named callback is missing.
        TypeError, ValueError: a setting is wrong, a task breaks a promise, or the run was begun with other settings.
        pickle.PicklingError, ImportError: a task cannot travel to another process; with the remedy.

    Example:
        >>> import io, lopt
        >>> quick = {"pairs": 2, "validation_tasks": 1, "validation_horizons": (10,), "inner_steps": 100}
        >>> theta = lopt.meta_train("tiny", tasks=["quadratic"], console=Console(file=io.StringIO()), **quick)
        >>> theta.provenance["config"]["tasks"]
        {'own': ['quadratic']}
    """
    console = console or Console(stderr=True)
    if hours is not None and "inner_steps" in settings:
        raise ValueError("hours, inner_steps: expected one of them, got both")
    if hours is not None and not hours > 0:
        raise ValueError(f"hours: expected a positive number, got {hours}")
    if resume and out is None:
        raise ValueError("out: expected the folder of the run that is resumed, got None")
    for name in callbacks:
        if isinstance(name, str):
            require(name)
    given = settings if tasks is None else {**settings, "tasks": _tasks(tasks)}
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        if not resume:
            trainer.check_new(out)
        if isinstance(executor, int):
            executor = stack.enter_context(closing(Serial() if executor == 1 else LocalProcesses(executor)))
        begun = _resumed(config, out, given) if resume else _begun(config, given, hours, executor, console)
        if isinstance(begun.tasks, OwnTasks):
            begun.tasks.check()
        if not resume:
            say(console, f"First the start is validated on {begun.validation_tasks} tasks")
        loggers: list[Logger] = []
        for callback in dict.fromkeys(callbacks):
            if isinstance(callback, str):
                loggers.append(stack.enter_context(closing(make_logger(callback, out, begun.to_json()))))
            else:
                loggers.append(callback)
        return trainer.run(
            begun, out, resume=resume, executor=executor, loggers=loggers, console=console, command=command
        )


def _tasks(given: Any) -> Any:
    """As a configuration has them."""
    if isinstance(given, (TaskDistribution, OwnTasks, Mapping)):  # a mapping is JSON, and checked there
        return given
    if isinstance(given, Task) or callable(given):
        return OwnTasks([given])
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"tasks: expected a task, a mixture, or a list, got a {type(given).__name__}")
    known = all(isinstance(entry, str) and entry in KNOWN for entry in given)
    return tuple(given) if given and known else OwnTasks(given)


def _begun(
    config: MetaTrainConfig | str | None,
    given: dict[str, Any],
    hours: float | None,
    executor: Executor,
    console: Console,
) -> MetaTrainConfig:
    """The settings of a new run; a budget in hours becomes one in inner steps."""
    name = config or ("own" if isinstance(given.get("tasks"), OwnTasks) else "default")

    def settled(**more: Any) -> MetaTrainConfig:
        if isinstance(name, str):
            return recipe(name, **given, **more)
        return changed(name, **given, **more)

    if hours is None and (not isinstance(name, str) or "inner_steps" in {**RECIPES.get(name, {}), **given}):
        return settled()
    hours = hours or 1.0
    config = settled(inner_steps=1)
    if isinstance(config.tasks, OwnTasks):
        config.tasks.check()
    seconds = min(MEASURED, 36.0 * hours)
    say(console, f"Measuring the speed, for {seconds:g} s")
    speed = trainer.measure_speed(config, executor, seconds)
    steps = max(1, round(speed * hours * 3600.0))
    say(console, f"{speed:,.0f} inner steps/s: {hours:g} h are --inner-steps {steps}")
    return settled(inner_steps=steps)


def _resumed(config: MetaTrainConfig | str | None, out: Path, given: dict[str, Any]) -> MetaTrainConfig:
    """The settings of the run in ``out``, with which those that are given agree."""
    begun = checkpoint.load(out / "checkpoint.pt")[0]
    if isinstance(config, MetaTrainConfig):
        return changed(config, **given)  # the trainer compares
    named = given if config is None else {**given, "recipe": config}
    wanted, before = changed(begun, **named), begun.to_json()
    for name in named:
        after = wanted.to_json()[name]
        if after != before[name]:
            raise ValueError(
                f"{name}: the run in {str(out)!r} was begun with {before[name]!r}, cannot go on with {after!r}"
            )
    return wanted
