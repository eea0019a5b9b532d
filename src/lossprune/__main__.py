"""``python -m lossprune``: the same as the command ``lossprune``."""

import sys

from lossprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
