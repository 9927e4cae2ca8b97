"""What a report can be written to: one HTML file that needs nothing else, or Markdown without figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lopt.evaluation.scores import NO_WORSE


class Table(NamedTuple):
    """Cells as text. The first column names the rows; the others are numbers, flush right."""

    header: list[str]
    rows: list[list[str]]


class Page(Protocol):
    """A page under construction, from top to bottom."""

    def heading(self, level: int, text: str) -> None:
        """A heading; level 1 is the title."""

    def note(self, text: str) -> None:
        """A paragraph on how the numbers were made."""

    def warning(self, text: str) -> None:
        """A paragraph that must not be overlooked."""

    def items(self, lines: Sequence[str]) -> None:
        """A list."""

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        """A table; ``ratios``: its numbers are ratios; ``fold``: hidden under this title until it is opened."""

    def figure(self, svg: str) -> None:
        """A figure, where the page can hold one."""

    def text(self) -> str:
        """The whole page so far."""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.won { color: #00664b } .lost { color: #b02a00 }
svg { max-width: 100%; height: auto } h2 { margin-top: 2em } caption, .note { text-align: left; color: #555 }
"""


class HtmlPage:
    """One HTML file that needs nothing else; ratios below .98 and above 1.02 have colours."""

    def __init__(self) -> None:
        self._title = ""
        self._body: list[str] = []

    def heading(self, level: int, text: str) -> None:
        self._title = self._title or text
        self._body.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def note(self, text: str) -> None:
        self._body.append(f"<p class=note>{html.escape(text)}</p>")

    def warning(self, text: str) -> None:
        self._body.append(f"<p class=lost>{html.escape(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        self._body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        def cell(text: str) -> str:
            mark = ""
            first = text.split(" ")[0]
            if ratios and first.replace(".", "", 1).isdigit():
                value = float(first)
                mark = " class=won" if value < 2 - NO_WORSE else " class=lost" if value > NO_WORSE else ""
            return f"<td{mark}>{html.escape(text)}</td>"

        head = "".join(f"<th>{html.escape(text)}</th>" for text in table.header)
        body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in table.rows)
        whole = f"<table><tr>{head}</tr>\n{body}</table>"
        self._body.append(f"<details><summary>{html.escape(fold)}</summary>{whole}</details>" if fold else whole)

    def figure(self, svg: str) -> None:
        self._body.append(svg)

    def text(self) -> str:
        return (
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._body)
            + "\n</body></html>\n"
        )


class MarkdownPage:
    """Markdown with GitHub's tables, without figures."""

    def __init__(self) -> None:
        self._blocks: list[str] = []

    def heading(self, level: int, text: str) -> None:
        self._blocks.append(f"{'#' * level} {_marked(text)}")

    def note(self, text: str) -> None:
        self._blocks.append(_marked(text))

    def warning(self, text: str) -> None:
        self._blocks.append(f"**{_marked(text)}**")

    def items(self, lines: Sequence[str]) -> None:
        self._blocks.append("\n".join(f"* {_marked(line)}" for line in lines))

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        lines = [table.header, ["---", *("---:" for _ in table.header[1:])], *table.rows]
        whole = "\n".join(
            f"| {' | '.join(_marked(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        if fold:
            whole = f"<details><summary>{html.escape(fold)}</summary>\n\n{whole}\n\n</details>"
        self._blocks.append(whole)

    def figure(self, svg: str) -> None:
        pass

    def text(self) -> str:
        return "\n\n".join(self._blocks) + "\n"


def _marked(text: str) -> str:
    """The text where characters that Markdown takes for its own stand for themselves."""
    for character in "\\*<`":
        text = text.replace(character, f"\\{character}")
    return text
