"""The published command line: ``python experiments.py --arch MLP --pr 0.98847 --pm QM …``.

The same as ``lossprune run``, flag for flag.
"""

import sys

from lossprune.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main())
