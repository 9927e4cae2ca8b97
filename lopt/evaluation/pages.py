"""A page of a report: one HTML file that needs nothing else, or Markdown, tables and words alone.

The HTML file sorts its tables by a click on a column, and draws loss curves of the task that is chosen (report.js).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lopt.evaluation.comparison import NO_WORSE


class Table(NamedTuple):
    """Cells as text. The first column names the rows; the others are numbers, flush right."""

    header: list[str]
    rows: list[list[str]]


#: name of an optimizer -> steps, and losses there by measure; None for what is no number.
Curves = Mapping[str, Mapping[str, Sequence[float | None]]]


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


class Page:
    """A page under construction, from top to bottom, in both forms; ratios below .98 and above 1.02 have colours."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._html: list[str] = []
        self._markdown: list[str] = []
        self.heading(1, title)

    def heading(self, level: int, text: str) -> None:
        """A heading; level 1 is the title."""
        self._add(f"<h{level}>{html.escape(text)}</h{level}>", f"{'#' * level} {_marked(text)}")

    def note(self, text: str) -> None:
        """A paragraph on how the numbers were made."""
        self._add(f"<p class=note>{html.escape(text)}</p>", _marked(text))

    def warning(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self._add(f"<p class=lost>{html.escape(text)}</p>", f"**{_marked(text)}**")

    def items(self, lines: Sequence[str], *, fold: str = "") -> None:
        """A list; ``fold``: in HTML hidden under this title until it is opened."""
        self._add(_folded(_list(lines), fold), "\n".join(f"* {_marked(line)}" for line in lines))

    def table(self, table: Table, *, ratios: bool = False, fold: str = "") -> None:
        """A table; ``ratios``: its numbers are ratios; ``fold``: hidden under this title until it is opened."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in table.header)
        body = "\n".join("<tr>" + "".join(_cell(text, ratios) for text in row) + "</tr>" for row in table.rows)
        whole = f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        lines = [table.header, ["---", *("---:" for _ in table.header[1:])], *table.rows]
        text = "\n".join(
            f"| {' | '.join(_marked(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        self._add(_folded(whole, fold), _folded(f"\n\n{text}\n\n", fold) if fold else text)

    def in_html(self, whole: str) -> None:
        """What Markdown has no place for, such as a figure in SVG."""
        self._html.append(whole)

    def summary(self, lines: Sequence[str]) -> None:
        """What came out, in sentences; in HTML alone."""
        self.in_html(_list(lines, " class=summary"))

    def curves(self, tasks: Mapping[str, Curves], styles: Mapping[str, Mapping[str, str]]) -> None:
        """Loss curves of the task that a reader chooses, in HTML alone; ``styles``: SVG's, by optimizer."""
        data = json.dumps({"tasks": tasks, "styles": styles}, allow_nan=False, separators=(",", ":"))
        data = data.replace("<", "\\u003c")
        self.in_html(f'<section class=curves><script type="application/json">{data}</script></section>')

    def html(self) -> str:
        """One HTML file that needs nothing else."""
        return (
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._html)
            + f"\n<script>\n{_SCRIPT}</script>\n</body></html>\n"
        )

    def markdown(self) -> str:
        """Markdown with GitHub's tables, without figures."""
        return "\n\n".join(self._markdown) + "\n"

    def _add(self, whole: str, text: str) -> None:
        self._html.append(whole)
        self._markdown.append(text)


def _list(lines: Sequence[str], kind: str = "") -> str:
    return f"<ul{kind}>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _cell(text: str, ratios: bool) -> str:
    mark, first = "", text.split(" ")[0]
    if ratios and first.replace(".", "", 1).isdigit():
        mark = " class=won" if float(first) < 2 - NO_WORSE else " class=lost" if float(first) > NO_WORSE else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def _folded(whole: str, fold: str) -> str:
    return f"<details><summary>{html.escape(fold)}</summary>{whole}</details>" if fold else whole


def _marked(text: str) -> str:
    """The text where characters that Markdown takes for its own stand for themselves."""
    for character in "\\*<`":
        text = text.replace(character, f"\\{character}")
    return text
