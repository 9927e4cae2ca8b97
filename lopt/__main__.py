"""``python -m lopt``: the program ``lopt``."""

import sys

from lopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
