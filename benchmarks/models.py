"""Every public call on small networks of the kinds that people have: what works, what is refused.

``python -m benchmarks.models`` tries all of them, which takes some minutes, and prints
``docs/models.md``; what is neither right nor refused in one sentence goes to standard error, and
the exit status is then 1.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.models.architectures import ARCHITECTURES
from tests.models.calls import CALLS, outcome
from tests.models.expectations import REFUSED, page


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    refused: dict[tuple[str, str], str] = {}
    faults = 0
    for name in ARCHITECTURES:
        for call in CALLS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    sentence = outcome(name, call, Path(folder))
                except Exception as error:  # whatever a call raises is what is looked for
                    faults += 1
                    sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    print(f"{name}, {call}: {sentence}", file=sys.stderr)
            if sentence is not None:
                words = REFUSED.get((name, call), sentence)
                refused[name, call] = words if words in sentence else sentence
    # Numbered as in the documentation, where they are the same.
    ordered = {cell: refused[cell] for cell in REFUSED if cell in refused}
    print(page(ordered | refused), end="")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
