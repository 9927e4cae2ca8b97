"""metrics.jsonl: one JSON object per line and iteration; iteration 0 is the start."""

import json
from pathlib import Path
from typing import Any

from lopt.files import read_bytes, unpacked, write_text

FILE = "metrics.jsonl"


def append(out: Path, metrics: dict[str, Any]) -> None:
    """Write one more line."""
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is not whole; the file may be packed, as metrics.jsonl.gz.

    Raises:
        FileNotFoundError: there is no such file in ``out``.
    """
    if not unpacked(out / FILE).is_file():
        raise FileNotFoundError(f"metrics: {str(out)!r} holds no {FILE}; give the folder of a meta-training run")
    lines: list[dict[str, Any]] = []
    for text in read_bytes(out / FILE).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and {"iteration", "inner_steps"} <= line.keys()):
            break
        lines.append(line)
    return lines


def truncate(out: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``, which no checkpoint covers; without a file the run goes on without them."""
    lines = read_metrics(out) if (out / FILE).is_file() else []
    kept = [line for line in lines if line["iteration"] <= iteration]
    write_text(out / FILE, "".join(json.dumps(line) + "\n" for line in kept))
