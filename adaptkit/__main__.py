"""`python -m adaptkit` is the command `adaptkit`."""

from __future__ import annotations

import sys

from adaptkit.cli import main

if __name__ == "__main__":
    sys.exit(main(prog_name="adaptkit"))
