"""CSV files: how they are read and written, and tables that grow while runs come in.

:class:`CsvTable` has rows of one dataclass, each found again by its key: what is in it is not run again.
:func:`append_csv` adds rows as they are, of whatever columns the file has, and :func:`read_csv` reads them.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from filelock import FileLock

from lopt.files import read_bytes, unpacked, write_text


class Keyed(Protocol):
    """A row: a dataclass of str, bool, int and float."""

    @property
    def key(self) -> Any:
        """By which it is found again."""


R = TypeVar("R", bound=Keyed)

_DAMAGED = "not a table of runs, or damaged ({}); mend or move the file, or choose another --out"
_OTHER = "not a table of rows, or damaged ({}); name another file"


class CsvTable(Generic[R]):
    """The rows in a CSV file by their keys: read at once, appended to as they come in.

    Several processes may append to one file; they wait at ``.lock`` beside it. The last row of a process that was
    killed while it wrote is ignored. Columns with defaults may be missing at the end. A file that was packed by gzip is
    read as it is, and unpacked when rows come in.

    Args:
        kind: the dataclass; its fields are the columns.

    Raises:
        ValueError: the file is a table of something else.
    """

    def __init__(self, path: Path, kind: Any) -> None:
        self.path, self.kind = path.with_suffix("") if path.suffix == ".gz" else path, kind
        self.columns: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
        self.rows: dict[Any, R] = {}
        self._complete = self._read()

    def append(self, rows: Sequence[R]) -> None:
        """Add rows, here and in the file."""
        self.rows.update({row.key: row for row in rows})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self._complete:
                self._read()
                self.rows.update({row.key: row for row in rows})
                self._write()
                return
            before = self.path.read_bytes()[-1:] if self.path.is_file() else b""
            text = self._text(rows, header=not before)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(("\n" if before not in (b"", b"\n") else "") + text)

    def sort(self, order: Callable[[R], Any]) -> None:
        """Sort the file, so that it does not tell when rows came in, or how often the runs were interrupted."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._read()
            self.rows = {row.key: row for row in sorted(self.rows.values(), key=order)}
            self._write()

    def _read(self) -> bool:
        """Take in the rows of the file; whether rows can be appended to it: it has all columns and whole rows only, and
        is not packed; or does not exist."""
        lines, ended = read_lines(self.path, _DAMAGED) if unpacked(self.path).is_file() else ([], True)
        if not lines:
            return True
        names, header = list(self.columns), lines[0]
        required = sum(field.default is dataclasses.MISSING for field in dataclasses.fields(self.kind))
        if len(header) < required or header != names[: len(header)]:
            columns = ", ".join(names)
            raise ValueError(f"{self.path}: expected the columns {columns}; move the file or choose another --out")
        for number, line in enumerate(lines[1:] if ended else lines[1:-1], 2):
            if len(line) == len(header):
                try:
                    row = self._parse(line)
                except ValueError as error:
                    raise ValueError(f"{self.path}, row {number}: {_DAMAGED.format(error)}") from error
                self.rows[row.key] = row
        return header == names and ended and self.path.is_file()

    def _parse(self, line: Sequence[str]) -> R:
        values: dict[str, Any] = {}
        for (name, kind), text in zip(self.columns.items(), line, strict=False):
            values[name] = text == "True" if kind is bool else math.nan if text == "nan" else kind(text)
        row: R = self.kind(**values)
        return row

    def _write(self) -> None:
        """Replace the file by all rows."""
        write_text(self.path, self._text(self.rows.values(), header=True))
        self._complete = True

    def _text(self, rows: Iterable[Any], header: bool) -> str:
        return text_of([*([list(self.columns)] if header else []), *map(dataclasses.astuple, rows)])

    def _alone(self) -> FileLock:
        """While inside, no other process writes into the folder's tables; a process that is killed lets go."""
        return FileLock(self.path.parent / ".lock")


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append ``rows`` of equal columns to a CSV file, which begins with a line of their names.

    Raises:
        ValueError: the file has other columns, or is no CSV file.
    """
    columns, new = list(rows[0]), not path.exists()
    if not new:
        found = (read_lines(path, _OTHER)[0] or [[]])[0]
        if found != columns:
            raise ValueError(f"{path}: has the columns {found}, these rows have {columns}; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text_of([*([columns] if new else []), *([row[name] for name in columns] for row in rows)]))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, packed or not, such as :func:`append_csv` writes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or damaged.
    """
    lines, _ = read_lines(path, _OTHER)
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:] if line]


def aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as plain lines; the first column is text, flush left, others flush right.

    Example:
        >>> aligned(["name", "steps"], [["a", "10"]])
        ['name  steps', 'a        10']
    """
    lines = [columns, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def read_lines(path: Path, damaged: str) -> tuple[list[list[str]], bool]:
    """The cells of every line of a CSV file, packed or not, and whether the last line has ended.

    Args:
        damaged: what is said of a file that is none, with ``{}`` for the reason.
    """
    try:
        content = read_bytes(path).decode()
        return list(csv.reader(io.StringIO(content, newline=""), strict=True)), content.endswith("\n")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {damaged.format(error)}") from error


def text_of(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of cells as a CSV file has them."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
