"""One inference engine in a process of its own, which makes networks ready and times them.

``PYTHON worker.py ENGINE FOLDER THREADS`` needs no more than numpy and the engine's package, so
that PYTHON may be that of another environment.  It says its version, and then answers the lines
that it is sent, each answer a line of JSON:

- ``ready NAME``: what making the network in ``FOLDER/NAME`` ready took.  There are ``model.onnx``,
  its ``inputs.npy`` and the outputs that are ``expected.npy``.
- ``time NAME CALLS``: the seconds of each of so many calls.

Seconds are of the processor for one thread, else of the clock.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Run = Callable[[], Any]
# What makes a network of this name ready, and its outputs, where they are to be compared.
Problem = Callable[[str], tuple[Callable[[], Run], "np.ndarray[Any, Any] | None"]]


def main() -> None:
    """Serve the engine that the command line names."""
    sys.path.pop(0)  # this folder, whose modules are no packages
    answers = only_answers()
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    prepared = ENGINES[engine](threads)

    def problem(name: str) -> tuple[Callable[[], Run], "np.ndarray[Any, Any] | None"]:
        place = folder / name
        inputs = np.load(place / "inputs.npy")
        return prepared(place / "model.onnx", inputs), np.load(place / "expected.npy")

    serve(problem, threads, version(engine), answers)


def only_answers() -> TextIO:
    """Return where answers go; whatever else is printed from now on is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(problem: Problem, threads: int, engine_version: str, answers: TextIO) -> None:
    """Answer the lines on standard input."""

    def answer(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    clock = time.process_time if threads == 1 else time.perf_counter
    runs: dict[str, Run] = {}
    answer({"version": engine_version})
    for line in sys.stdin:
        word, name, *calls = line.split()
        if word == "ready":
            prepare, expected = problem(name)
            runs[name], told = _made_ready(prepare, expected, clock)
            answer(told)
        else:
            answer([_timed(runs[name], clock) for _ in range(int(calls[0]))])


def _made_ready(
    prepare: Callable[[], Run], expected: Any, clock: Callable[[], float]
) -> tuple[Run, dict[str, Any]]:
    """Make a network ready, call it once, and tell what that took."""
    before = _memory_now()
    began, worked = time.perf_counter(), time.process_time()
    run = prepare()
    ready, ready_processor = time.perf_counter() - began, time.process_time() - worked
    start = clock()
    found = run()
    first = clock() - start
    told: dict[str, float | None] = {
        "ready_s": ready,
        "ready_processor_s": ready_processor,
        "first_call_s": first,
        "memory_mib": (_peak_memory() - before) / (1 << 20),
    }
    if expected is not None:
        scale = np.abs(expected).max() or 1.0
        difference = float(np.abs(np.asarray(found) - expected).max() / scale)
        told["difference"] = difference if np.isfinite(difference) else None
    return run, told


def _timed(run: Run, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def _memory_now() -> int:
    """The bytes that this process has in memory; the peak is counted from here, where it can be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """What Linux tells of this process, in bytes; 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def onnxruntime(threads: int) -> Callable[[Path, Any], Callable[[], Run]]:
    """Microsoft's runtime; it computes with the zeros of a masked network."""
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]

    def prepared(model: Path, inputs: Any) -> Callable[[], Run]:
        def prepare() -> Run:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            return lambda: session.run(None, {"input": inputs})[0]

        return prepare

    return prepared


def openvino(threads: int) -> Callable[[Path, Any], Callable[[], Run]]:
    """Intel's toolkit; it computes with the zeros of a masked network."""
    import openvino as ov  # pyright: ignore[reportMissingImports]

    def prepared(model: Path, inputs: Any) -> Callable[[], Run]:
        def prepare() -> Run:
            hints = {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # it may take bfloat16 by itself
            }
            request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
            return lambda: request.infer([inputs], share_inputs=True)[0]

        return prepare

    return prepared


def deepsparse(threads: int) -> Callable[[Path, Any], Callable[[], Run]]:
    """Neural Magic's sparse engine, for x86 and Python 3.11 or older."""
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    os.environ.setdefault("NM_BIND_THREADS_TO_CORES", "0")
    import deepsparse as ds  # pyright: ignore[reportMissingImports]

    def prepared(model: Path, inputs: Any) -> Callable[[], Run]:
        def prepare() -> Run:
            engine = ds.Engine(str(model), batch_size=len(inputs), num_cores=threads)
            return lambda: engine.run([inputs])[0]

        return prepare

    return prepared


ENGINES = {made.__name__: made for made in (onnxruntime, openvino, deepsparse)}

if __name__ == "__main__":
    main()
