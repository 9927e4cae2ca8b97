"""A theta whose steps fall to less at the end of a run that is told its length, and are the same until its middle.

    python docs/notebook/scripts/cooldown.py THETA OUT

A step is multiplied by ``(1 - .99 done)^.5 exp(.58 done)``, where ``done`` is the share of the run that is over: 1.00
at a quarter, .95 at half, .65 at .85, .42 at .95 and .18 at the end. Untold runs stay the same. The two numbers were
chosen on language models that are not held out (docs/notebook/cooldown.md).
"""

import json
import sys
from pathlib import Path

from lopt import Theta
from lopt.files import write_text

ADDED = {"log_left": 0.5, "done": 0.58}


def main() -> None:
    source, out = sys.argv[1:]
    theta = Theta.load(source)
    for name, value in ADDED.items():
        theta.tensors["step.w"][theta.spec.lstm_width + theta.spec.lstm_index(name)] += value
    command = f"python docs/notebook/scripts/cooldown.py {source} {out}"
    provenance = {"method": "added by hand", "command": command, "added": {"step.w": ADDED}, "start": theta.provenance}
    Theta(theta.spec, theta.tensors, provenance).save(out)
    write_text(Path(out).with_suffix(".json"), json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
