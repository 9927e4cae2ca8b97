"""Make the rows of a finished measurement small enough to keep: six digits of what was measured, four of seconds; gzip.

    python benchmarks/pack.py FILE...

FILE is a table of runs (.csv) or of metrics (.jsonl); FILE.gz takes its place. lopt reads either, and unpacks a table
before it adds to it. What rows are found again by (learning rates, settings, hashes) stays as it is. Or FILE is a
figure (.png), which keeps its name and fewer colours.
"""

import argparse
import csv
import gzip
import io
import re
from pathlib import Path

from lopt.files import fewer_colours

SHADES = 32
DIGITS = 6
CLOCK = 4

#: Columns of what a clock said.
TIMED = ("seconds", "steps_per_second", "times", "least", "most")

#: Columns that rows are found again by.
EXACT = ("lr", "settings")

#: A number with a point that is no part of a word or of a version.
NUMBER = re.compile(r"(?<![\w.+-])-?\d+\.\d+(?:e[+-]?\d+)?(?![\w.])")


def rounded(text: str, digits: int = DIGITS) -> str:
    """The text with at most so many digits in each number that has a point.

    Example:
        >>> rounded("[100, 0.123456789, 2.5e-05], torch 2.13.0")
        '[100, 0.123457, 2.5e-05], torch 2.13.0'
    """
    return NUMBER.sub(lambda found: min(found[0], repr(float(f"{float(found[0]):.{digits}g}")), key=len), text)


def packed(name: str, text: str) -> bytes:
    """What FILE.gz holds: the same bytes for the same text, on any day."""
    if name.endswith(".csv"):
        header, *lines = csv.reader(io.StringIO(text, newline=""))
        kept = io.StringIO(newline="")
        writer = csv.writer(kept, lineterminator="\n")
        writer.writerow(header)
        for line in lines:
            writer.writerow(
                cell if column in EXACT else rounded(cell, CLOCK if column in TIMED else DIGITS)
                for column, cell in zip(header, line, strict=True)
            )
        text = kept.getvalue()
    else:
        text = rounded(text)
    return gzip.compress(text.encode(), 9, mtime=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for file in parser.parse_args().files:
        if file.suffix == ".png":
            content = fewer_colours(file.read_bytes(), SHADES)
            print(f"{file}: {file.stat().st_size:,} bytes, now {len(content):,}")
            file.write_bytes(content)
            continue
        content = packed(file.name, file.read_bytes().decode())
        file.with_name(f"{file.name}.gz").write_bytes(content)
        print(f"{file}: {file.stat().st_size:,} bytes, packed {len(content):,}")
        file.unlink()


if __name__ == "__main__":
    main()
