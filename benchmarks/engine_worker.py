"""One inference engine on one network, timed on request by ``benchmarks.engines``.

``PYTHON -m benchmarks.engine_worker ENGINE FOLDER THREADS`` reads the problem in the folder, says
in a line of JSON what making the network ready took and how far its outputs are from torch's, and
then answers each line it is sent, a number of calls, with the seconds of each of them.

The engines of other packages run ``model.onnx``; torch and lossprune build the network of
``problem.json`` with the state and the mask beside it.  Seconds are of the processor for one
thread, else of the clock.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]
MEBIBYTE = 1 << 20


def main() -> None:
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    clock = time.process_time if threads == 1 else time.perf_counter

    def answer(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    prepare = ENGINES[engine](folder, threads)
    before = peak_memory()
    began, worked = time.perf_counter(), time.process_time()
    run = prepare()
    found = np.asarray(run())
    told = {
        "version": version(engine),
        "ready_s": time.perf_counter() - began,
        "ready_processor_s": time.process_time() - worked,
        "memory_mib": (peak_memory() - before) / MEBIBYTE,
    }
    expected = np.load(folder / "expected.npy")
    answer(told | {"difference": float(np.abs(found - expected).max() / np.abs(expected).max())})
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = clock()
            run()
            seconds.append(clock() - start)
        answer(seconds)


def peak_memory() -> int:
    """The most bytes that this process has had in memory, not what it was started from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def onnxruntime(folder: Path, threads: int) -> Callable[[], Run]:
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]

    inputs = {"input": np.load(folder / "inputs.npy")}

    def prepare() -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, inputs)[0]

    return prepare


def openvino(folder: Path, threads: int) -> Callable[[], Run]:
    import openvino as ov  # pyright: ignore[reportMissingImports]

    inputs = np.load(folder / "inputs.npy")

    def prepare() -> Run:
        hints = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # it may take bfloat16 by itself
        }
        compiled = ov.Core().compile_model(folder / "model.onnx", "CPU", hints)
        request = compiled.create_infer_request()
        return lambda: request.infer([inputs], share_inputs=True)[0]

    return prepare


def deepsparse(folder: Path, threads: int) -> Callable[[], Run]:
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    os.environ.setdefault("NM_BIND_THREADS_TO_CORES", "0")
    import deepsparse as ds  # pyright: ignore[reportMissingImports]

    inputs = np.load(folder / "inputs.npy")

    def prepare() -> Run:
        engine = ds.Engine(str(folder / "model.onnx"), batch_size=len(inputs), num_cores=threads)
        return lambda: engine.run([inputs])[0]

    return prepare


def torch(folder: Path, threads: int) -> Callable[[], Run]:
    network, _, inputs = problem(folder, threads)
    return lambda: lambda: network(inputs).numpy()


def lossprune(folder: Path, threads: int) -> Callable[[], Run]:
    import lossprune

    network, mask, inputs = problem(folder, threads)

    def prepare() -> Run:
        deployed = lossprune.deploy(network, mask, inputs, remeasure=True)
        print(*deployed.notes, sep="\n")
        return lambda: deployed(inputs).numpy()

    return prepare


def problem(folder: Path, threads: int) -> tuple[Any, Any, Any]:
    """Return the masked network, its mask and the inputs, for so many threads."""
    import torch
    from safetensors.torch import load_file

    import lossprune
    from benchmarks.engine_networks import built

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    network = built(json.loads((folder / "problem.json").read_text())["network"])
    network.load_state_dict(load_file(folder / "state.safetensors"))
    mask = lossprune.Mask.load(folder / "mask.safetensors")
    return network, mask, torch.from_numpy(np.load(folder / "inputs.npy"))


ENGINES = {made.__name__: made for made in (torch, lossprune, onnxruntime, openvino, deepsparse)}

if __name__ == "__main__":
    main()
