"""What a report can be written to: one HTML file that needs nothing else, or Markdown, tables and words alone.

The HTML file sorts its tables by a click on a column, and draws loss curves of the task that is chosen (report.js).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lopt.evaluation.scores import NO_WORSE


class Table(NamedTuple):
    """Cells as text. The first column names the rows; the others are numbers, flush right."""

    header: list[str]
    rows: list[list[str]]


#: name of an optimizer -> steps, and losses there by measure; None for what is no number.
Curves = Mapping[str, Mapping[str, Sequence[float | None]]]


class Page(Protocol):
    """A page under construction, from top to bottom."""

    def heading(self, level: int, text: str) -> None:
        """A heading; level 1 is the title."""

    def note(self, text: str) -> None:
        """A paragraph on how the numbers were made."""

    def warning(self, text: str) -> None:
        """A paragraph that must not be overlooked."""

    def items(self, lines: Sequence[str], *, fold: str = "") -> None:
        """A list; ``fold``: where the page can, hidden under this title until it is opened."""

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        """A table; ``ratios``: its numbers are ratios; ``fold``: hidden under this title until it is opened."""

    def summary(self, lines: Sequence[str]) -> None:
        """What came out, in sentences, where the page is read from the top."""

    def figure(self, svg: str) -> None:
        """A figure, where the page can hold one."""

    def curves(self, tasks: Mapping[str, Curves], styles: Mapping[str, Mapping[str, str]]) -> None:
        """Loss curves of the task that a reader chooses, where the page can draw; ``styles``: SVG's, by optimizer."""

    def text(self) -> str:
        """The whole page so far."""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }
body { color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
th[aria-sort] { cursor: pointer } th[aria-sort]:hover { background: #eef4fa }
th[aria-sort=ascending]::after { content: " \\25B2" } th[aria-sort=descending]::after { content: " \\25BC" }
details { margin: .6em 0 } summary { cursor: pointer } .wide { overflow-x: auto }
.summary { font-size: 17px; max-width: 50em } .summary li { margin: .4em 0 }
.curves svg { max-width: 46em; display: block } .curves text { font-size: 13px; fill: #444 } .grid { stroke: #e4e4e4 }
.curves polyline { fill: none } .curves select { font: inherit; padding: .2em; max-width: 100% }
.legend button { font: inherit; border: 0; border-bottom: 3px solid; background: none; margin: .2em .6em .2em 0 }
.legend button[aria-pressed=false] { opacity: .4 }
.won { color: #00664b } .lost { color: #b02a00 }
svg { max-width: 100%; height: auto } h2 { margin-top: 2em } caption, .note { text-align: left; color: #555 }
"""


_SCRIPT = Path(__file__).with_name("report.js").read_text(encoding="utf-8")


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

    def items(self, lines: Sequence[str], *, fold: str = "") -> None:
        whole = "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
        self._body.append(self._folded(whole, fold))

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
        whole = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        whole = f"<div class=wide>{whole}</div>"
        self._body.append(self._folded(whole, fold))

    def _folded(self, whole: str, fold: str) -> str:
        return f"<details><summary>{html.escape(fold)}</summary>{whole}</details>" if fold else whole

    def summary(self, lines: Sequence[str]) -> None:
        self._body.append("<ul class=summary>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def figure(self, svg: str) -> None:
        self._body.append(svg)

    def curves(self, tasks: Mapping[str, Curves], styles: Mapping[str, Mapping[str, str]]) -> None:
        data = json.dumps({"tasks": tasks, "styles": styles}, allow_nan=False, separators=(",", ":"))
        data = data.replace("<", "\\u003c")
        self._body.append(f'<section class=curves><script type="application/json">{data}</script></section>')

    def text(self) -> str:
        return (
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._body)
            + f"\n<script>\n{_SCRIPT}</script>\n</body></html>\n"
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

    def items(self, lines: Sequence[str], *, fold: str = "") -> None:
        self._blocks.append("\n".join(f"* {_marked(line)}" for line in lines))

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        lines = [table.header, ["---", *("---:" for _ in table.header[1:])], *table.rows]
        whole = "\n".join(
            f"| {' | '.join(_marked(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        if fold:
            whole = f"<details><summary>{html.escape(fold)}</summary>\n\n{whole}\n\n</details>"
        self._blocks.append(whole)

    def summary(self, lines: Sequence[str]) -> None:
        pass

    def figure(self, svg: str) -> None:
        pass

    def curves(self, tasks: Mapping[str, Curves], styles: Mapping[str, Mapping[str, str]]) -> None:
        pass

    def text(self) -> str:
        return "\n\n".join(self._blocks) + "\n"


def _marked(text: str) -> str:
    """The text where characters that Markdown takes for its own stand for themselves."""
    for character in "\\*<`":
        text = text.replace(character, f"\\{character}")
    return text
