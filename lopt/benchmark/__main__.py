"""``python -m lopt.benchmark kernel|step``: ``lopt bench`` for machines without the packages of the command line."""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path

from lopt.benchmark import suite
from lopt.benchmark.rows import Row
from lopt.tables import aligned, append_csv


def main() -> None:
    """Measure, print, and append to a CSV file after every layout. No sizes but those that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m lopt.benchmark", description=__doc__)
    parser.add_argument("what", choices=("kernel", "step"))
    for option in fields(suite.Options):
        usual, name = option.default, option.name.replace("_", "-")
        if isinstance(usual, tuple):
            parser.add_argument(f"--{name}", nargs="*", type=type(usual[0]) if usual else str, default=usual)
        elif isinstance(usual, bool):
            parser.add_argument(f"--no-{name}", action="store_false", dest=option.name)
        else:
            parser.add_argument(f"--{name}", type=type(usual), default=usual)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(sizes=())
    given = vars(parser.parse_args())
    what, out = given.pop("what"), given.pop("out")
    options = suite.Options(**given)
    chosen = options.suite(what)
    say = partial(print, flush=True)  # now: the process may be ended at its time limit
    say(*aligned(*suite.traffic_table(options.presets, chosen.dtype)), sep="\n")
    found: list[Row] = []
    for some in chosen.run(say):
        append_csv(out, some)
        say(*aligned(*suite.result_table(some)), sep="\n")
        found += some
    say(*suite.remarks(found), sep="\n")


if __name__ == "__main__":
    main()
