"""metrics.jsonl: one JSON object per line and iteration; iteration 0 is the start."""

import json
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def append(out: Path, metrics: dict[str, Any]) -> None:
    """Write one more line."""
    with (out / FILE).open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is not whole.

    Raises:
        FileNotFoundError: there is no such file in ``out``.
    """
    if not (out / FILE).is_file():
        raise FileNotFoundError(f"metrics: {str(out)!r} holds no {FILE}; give the folder of a meta-training run")
    lines: list[dict[str, Any]] = []
    for text in (out / FILE).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def truncate(out: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``, which no checkpoint covers."""
    lines = [line for line in read_metrics(out) if line["iteration"] <= iteration]
    partial = out / f"{FILE}.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, out / FILE)
