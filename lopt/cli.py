"""The program ``lopt``: a table of commands, one way to fail, one place where numbers become JSON."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import tyro
from rich.console import Console
from tyro.conf import subcommand

import lopt
from lopt.commands.bench import Bench
from lopt.commands.common import Command, say, write_json
from lopt.commands.console import show_everywhere
from lopt.commands.doctor import Doctor
from lopt.commands.evaluate import Evaluate
from lopt.commands.experiment import RunExperiment
from lopt.commands.meta_train import MetaTrain
from lopt.commands.plot import Plot
from lopt.commands.report import MakeReport
from lopt.commands.tasks import CheckTasks, Gallery, List, ShowTask, Time, TrainTask
from lopt.commands.train import Train
from lopt.commands.weights import Convert, Interpolate, Show

Weights = (
    Annotated[Show, subcommand("show")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Interpolate, subcommand("interpolate")]
)

Tasks = (
    Annotated[List, subcommand("list")]
    | Annotated[ShowTask, subcommand("show")]
    | Annotated[Time, subcommand("time")]
    | Annotated[TrainTask, subcommand("train")]
    | Annotated[CheckTasks, subcommand("check")]
    | Annotated[Gallery, subcommand("gallery")]
)

Commands = (
    Annotated[Train, subcommand("train")]
    | Annotated[MetaTrain, subcommand("meta-train")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[MakeReport, subcommand("report")]
    | Annotated[RunExperiment, subcommand("experiment")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Tasks, subcommand("tasks", description="Look at the tasks, time, train and check them.")]
    | Annotated[Weights, subcommand("weights", description="Look at meta-parameters, convert or mix them.")]
)

#: What a wrong option, missing data or a machine without the asked-for device raise; anything else is a bug.
USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 found something wrong, 2 could not be done.

    Args:
        arguments: the command line without the program's name; that of the process when None.

    Raises:
        SystemExit: with code 2, a command line that cannot be understood; with code 0, ``--help``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        show_everywhere(stream)
    if list(arguments) == ["--version"]:
        say(Console(), f"lopt {lopt.__version__}")
        return 0
    try:
        command = cast(
            Command,
            tyro.cli(
                cast(Any, Commands),
                prog="lopt",
                description="A learned optimizer for PyTorch: try it, check it, meta-train it (lopt --version: which).",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            ),
        )
        command.check()
        outcome = command.run(Console())
        if command.json is not None:
            write_json(command.json, outcome.numbers)
    except USER_ERRORS as error:
        if "--debug" in arguments:
            raise
        say(Console(stderr=True), f"lopt: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say(Console(stderr=True), "lopt: interrupted")
        return 130
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
