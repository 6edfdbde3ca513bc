"""`python -m gemma4cli` is `g4`."""

from __future__ import annotations

import sys

from gemma4cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
