"""What every command has: options that are checked, outputs that are tried, an outcome, and the ways to say things."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

from lopt.files import check_file, check_folder, write_text
from lopt.tables import aligned
from lopt.tasks.seeds import SEEDS

#: Options of these types are checked before the work starts, see :meth:`Command.check`.
Seed = Annotated[int, "seed"]
OutFile = Annotated[Path, "file"]
OutFolder = Annotated[Path, "folder"]


@dataclass(frozen=True)
class Outcome:
    """What a command found: its exit code and its numbers, for ``--json``."""

    exit_code: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command: its fields are its options, ``run`` does the work."""

    json: OutFile | None = None
    """Also write the numbers to this file."""

    debug: bool = False
    """Show the traceback of an error."""

    @abstractmethod
    def run(self, console: Console) -> Outcome:
        """Do it, say what happened on ``console``, and return the numbers."""

    def check(self) -> None:
        """Look at all options, and try whether outputs can be written, before anything is done.

        Raises:
            ValueError: a number that is none, a seed out of range, an output that cannot be written; with its name.
        """
        hints = get_type_hints(type(self), include_extras=True)
        for option in dataclasses.fields(self):
            given = getattr(self, option.name)
            for value in given if isinstance(given, tuple) else (given,):
                check_option(option.name, value, _kind(hints[option.name]))


def check_option(name: str, value: Any, kind: str | None) -> None:
    """Check one value of an option, ``kind`` being the word in its type; see :meth:`Command.check`."""
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name}: expected a number, got nan")
    if kind == "seed" and value is not None and not 0 <= value < SEEDS:
        raise ValueError(f"{name}: expected whole numbers from 0 to {SEEDS - 1}, got {value}")
    if kind == "file" and value is not None:
        check_file(name, value)
    if kind == "folder" and value is not None:
        check_folder(name, value)


def _kind(hint: Any) -> str | None:
    """The word that ``Annotated`` gave the type, or a part of it."""
    for word in getattr(hint, "__metadata__", ()):
        if word in ("seed", "file", "folder"):
            return str(word)
    return next((kind for part in get_args(hint) if (kind := _kind(part)) is not None), None)


def json_settings(settings: Sequence[str]) -> dict[str, Any]:
    """What ``NAME=VALUE`` say, with values in JSON, or text where they are none."""
    given: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            given[name] = json.loads(text)
        except json.JSONDecodeError:
            given[name] = text
    return given


def write_json(path: Path, numbers: dict[str, Any]) -> None:
    """Write ``numbers`` to ``path`` as standard JSON: paths become strings, non-finite numbers become
    null."""
    write_text(path, json.dumps(_plain(numbers), indent=1, allow_nan=False) + "\n")


def say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no colouring, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with frames on a terminal, aligned plain lines elsewhere. The first column is text, flush
    left."""
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        for position, column in enumerate(columns):
            table.add_column(column, justify="right" if position else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    for line in aligned(columns, rows):
        say(console, line)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
