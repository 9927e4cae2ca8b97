"""``python -m lopt.benchmark kernel|step``: ``lopt bench`` for machines without the packages of the command line."""

import argparse
from pathlib import Path

import torch

from lopt.benchmark import shapes, suite
from lopt.benchmark.rows import Row
from lopt.benchmark.variants import PRECISIONS, STATE_DTYPES, STATS, variants
from lopt.tables import append_csv


def main() -> None:
    """Measure, print, and append to a CSV file after every layout."""
    parser = argparse.ArgumentParser(prog="python -m lopt.benchmark", description=__doc__)
    parser.add_argument("what", choices=("kernel", "step"))
    parser.add_argument("--presets", nargs="*", default=["compact", "paper"])
    parser.add_argument("--stats", nargs="*", choices=STATS, default=["current"])
    parser.add_argument("--state-dtypes", nargs="*", choices=STATE_DTYPES, default=["float32"])
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=["high"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--tensors", nargs="*", type=int, default=[1, 1000])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    layouts = [shapes.even(size, tensors) for size in options.sizes for tensors in options.tensors]
    layouts += [shapes.model(name, options.scale) for name in options.models]
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    show(suite.traffic_table(options.presets, dtype))
    ways = variants(options.presets, options.stats, options.state_dtypes, options.precisions)
    chosen = suite.Suite(options.what, ways, tuple(layouts), dtype, device, options.repeats, not options.no_peers)
    found: list[Row] = []
    for some in chosen.run(say):
        append_csv(options.out, some)
        show(suite.result_table(some))
        found += some
    for remark in suite.remarks(found):
        say(remark)


def say(text: str) -> None:
    """Print a line now: the process may be ended at its time limit."""
    print(text, flush=True)


def show(table: suite.Table) -> None:
    """Print columns and cells, aligned."""
    columns, cells = table
    widths = [max(len(line[i]) for line in (columns, *cells)) for i in range(len(columns))]
    for line in (columns, *cells):
        padded = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        say("  ".join(padded).rstrip())


if __name__ == "__main__":
    main()
