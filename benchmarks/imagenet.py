"""A run of ImageNet's shape on a small folder: ResNet-50, 224 pixels, 1000 classes, Monte-Carlo QM.

``python -m benchmarks.imagenet`` makes a folder of JPEGs in ImageNet's layout, of ImageNet's median
size, 500×375 pixels, then has the command line decode it, prune and fine-tune, and prints what each
part took: seconds, and the most memory that was the process's own (anonymous) or mapped from files.
``--processes 2`` starts the run by torchrun; ``--make FOLDER`` only makes the folder.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.hardware import write_json

WIDTH, HEIGHT = 500, 375


def photograph(seed: int) -> bytes:
    """Smooth colours with noise on them: some 100 kB, as ImageNet's files have."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(256, size=(6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + random.integers(-12, 13, size=smooth.shape, dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_folder(folder: Path, classes: int, train: int, held_out: int) -> None:
    """Write ``train`` images a class, and one of the first ``held_out`` to val and to test."""
    seed = 0
    for split, labels, count in (
        ("train", classes, train),
        ("val", held_out, 1),
        ("test", held_out, 1),
    ):
        for label in range(labels):
            place = folder / split / f"n{label:08}"
            place.mkdir(parents=True)
            for number in range(count):
                seed += 1
                (place / f"n{label:08}_{number}.JPEG").write_bytes(photograph(seed))


def timed(command: list[str], **environment: str) -> dict[str, float]:
    """Run a command; return its seconds, and the MiB it took at most, of itself and of files."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **environment})
    most = {"own": 0.0, "files": 0.0}
    while process.poll() is None:
        for name, field in (("own", "RssAnon"), ("files", "RssFile")):
            most[name] = max(most[name], _memory(process.pid, field))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} answered {process.returncode}")
    return {"seconds": time.perf_counter() - began, **most}


def _memory(pid: int, field: str) -> float:
    """Of a process and those that it started, the largest, in MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        inner = [_memory(int(child), field) for child in children.read_text().split()]
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    lines = [line for line in status if line.startswith(field)]
    return max([int(line.split()[1]) / 1024 for line in lines] + inner, default=0.0)


def run(folder: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode, prune, fine-tune; return what each took."""
    cache = {"LOSSPRUNE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": str(arguments.threads)}
    lossprune = [sys.executable, "-m", "lossprune.cli"]
    results: dict[str, Any] = {}
    data = [*lossprune, "data", "imagenet", "--data_path", str(folder)]
    results["decoding"] = timed(data, **cache)
    results["opening"] = timed(data, **cache)
    if arguments.processes > 1:
        each = f"--nproc-per-node={arguments.processes}"
        lossprune = [sys.executable, "-m", "torch.distributed.run", each, "-m", "lossprune.cli"]
    command = [
        *(*lossprune, "run", "--arch", arguments.arch, "--dataset", "imagenet"),
        *("--data_path", str(folder), "--pm", "QM", "--estimator", "monte-carlo"),
        *("--pi", "2", "--exp", "--reg", "1e-3", "--pr", "0.5", "--nex", str(arguments.nex)),
        *("--nepochs", str(arguments.epochs), "--batch_size", str(arguments.batch_size)),
        *("--path", str(work / "results")),
    ]
    print(" ".join(["lossprune", *command[command.index("run") :]]), flush=True)
    results["run"] = timed(command, **cache)
    (path,) = (work / "results").glob("*/record.json")
    record = json.loads(path.read_text())
    results["run"]["stages"] = [stage["seconds"] for stage in record["stages"]]
    results["run"]["epochs"] = [epoch["seconds"] for epoch in record["epochs"]]
    results["status"] = record["status"]
    results["sparsity"] = record["sparsity"]
    return results


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, help="only make the folder, here")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train", type=int, default=1, help="training images a class")
    parser.add_argument("--held_out", type=int, default=50, help="images in val and in test")
    parser.add_argument("--arch", default="ResNet50")
    parser.add_argument("--nex", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("measurements/imagenet.json"))
    arguments = parser.parse_args()
    images = arguments.classes, arguments.train, arguments.held_out
    if arguments.make is not None:
        make_folder(arguments.make, *images)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "photographs"
        make_folder(folder, *images)
        results = run(folder, Path(work), arguments)
    for part in ("decoding", "opening", "run"):
        took = results[part]
        print(
            f"{part:<10} {took['seconds']:7.1f} s  {took['own']:6.0f} MiB of its own, "
            f"{took['files']:.0f} MiB of files"
        )
    stages = ", ".join(f"{seconds:.1f}" for seconds in results["run"]["stages"])
    epochs = ", ".join(f"{seconds:.1f}" for seconds in results["run"]["epochs"])
    print(f"stages of pruning {stages} s; epochs {epochs} s; sparsity {results['sparsity']:.4f}")
    write_json(arguments.json, {"arguments": {**vars(arguments), "json": None}, **results})


if __name__ == "__main__":
    main()
