"""torch and lossprune on networks of ``benchmarks.engines``, timed on request.

``python -m benchmarks.engine_worker ENGINE FOLDER THREADS`` answers as the worker of
``lossprune.deployment.engines`` does: it builds the network of ``problem.json`` with the state and
the mask beside it.
"""

import copy
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import lossprune
from benchmarks.engine_networks import built
from lossprune.deployment.engines.worker import Run, only_answers, serve


def main() -> None:
    answers = only_answers()
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)

    def problem(name: str) -> tuple[Callable[[], Run], Any]:
        place = folder / name
        network = built(json.loads((place / "problem.json").read_text())["network"])
        network.load_state_dict(load_file(place / "state.safetensors"))
        mask = lossprune.Mask.load(place / "mask.safetensors")
        inputs = torch.from_numpy(np.load(place / "inputs.npy"))

        def dense() -> Run:
            own = copy.deepcopy(network)  # so that its memory counts
            return lambda: own(inputs).numpy()

        def deployed() -> Run:
            fast = lossprune.deploy(network, mask, inputs, remeasure=True)
            print(*fast.notes, sep="\n")
            return lambda: fast(inputs).numpy()

        return dense if engine == "torch" else deployed, np.load(place / "expected.npy")

    serve(problem, threads, version(engine), answers)


if __name__ == "__main__":
    main()
