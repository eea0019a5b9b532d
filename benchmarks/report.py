"""How long a report of thousands of runs takes, and how much memory.

``python -m benchmarks.report`` writes 10,000 synthetic records in the shape of the published grids
(three networks; MP and {LM, QM, OBD} × π ∈ {1, 14, 140} × nine λ, as many seeds as it takes; a log
and a mask beside each) and reports them with the command line, in a process of its own each time:
the folder; the folder, with all records into one file; and that file.  It prints seconds, peak
memory of the process and its children, and the sizes of page and file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lossprune.experiment import RunConfig
from lossprune.experiment.folder import LOG, MASK, RECORD
from lossprune.experiment.log import log_text
from lossprune.experiment.record import EpochRecord, RunRecord, Scores, Start
from lossprune.pruning import Mask

SECONDS, MEGABYTES = 60, 2000
EXAMPLES = np.array([50_000, 10_000, 10_000])
REGS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def configs(count: int, epochs: int) -> list[RunConfig]:
    """Return the first ``count`` runs of the grids, seed after seed."""
    found: list[RunConfig] = []
    seed = 1111
    while len(found) < count:
        for arch, sparsity in (("MLP", 0.98847), ("VGG11", 0.956), ("PreActResNet18", 0.956)):
            common = {"arch": arch, "seed": seed, "epochs": epochs}
            found.append(RunConfig(prune_epoch=-1, **common))
            start = found[-1].folder / "best_model.pt"
            common |= {"sparsity": sparsity, "start": start}
            found.append(RunConfig(**common))
            found += [
                RunConfig(criterion=name, stages=pi, reg=reg, exponential=True, **common)
                for name in ("LM", "QM", "OBD")
                for pi in (1, 14, 140)
                for reg in REGS
            ]
        seed += 1
    return found[:count]


def record_of(config: RunConfig, generator: np.random.Generator) -> RunRecord:
    """Return a record with scores that depend on the settings as they do in experiments."""

    def scores(loss: float) -> Scores:
        losses = loss * (1 + 0.02 * generator.standard_normal(3))
        wrong = generator.binomial(EXAMPLES, 0.9 * (1 - np.exp(-losses)))
        errors = wrong / EXAMPLES
        return Scores(*np.stack([losses, errors], 1).ravel().tolist())

    rows = tuple(
        EpochRecord(n, scores(0.05 + 1 / (n + 1)), 0.5 + generator.random() / 20)
        for n in range(1, config.epochs + 1)
    )
    best = min(rows, key=lambda row: row.scores.valid_error)
    start = Start(None if config.start is None else str(config.start), "0" * 64, "1" * 64)
    record = {"config": config.settings, "environment": {"torch": torch.__version__}}
    if not config.prunes:
        return RunRecord(
            **record, start=start, status="finished", best=best, last=rows[-1], epochs=rows
        )
    after = 2.3 / (1 + 0.3 * np.log(config.stages)) + 0.1 * abs(np.log10(config.reg or 1e-6) + 3)
    stages = tuple(
        {
            "stage": stage + 1,
            "sparsity": config.sparsity,
            "removed": 1,
            "loss_before": after * stage / config.stages,
            "loss_after": after * (stage + 1) / config.stages,
            "predicted_change": None if config.criterion == "MP" else after / config.stages / 2,
            "realised_change": after / config.stages * generator.random(),
            "seconds": 0.1,
        }
        for stage in range(config.stages)
    )
    return RunRecord(
        **record,
        start=start,
        status="finished",
        before_pruning=EpochRecord(0, scores(0.01)),
        after_pruning=EpochRecord(0, scores(after)),
        best=best,
        last=rows[-1],
        stages=stages,
        removed=956,
        prunable=1000,
        epochs=rows,
        seconds=100.0,
    )


def write_runs(root: Path, count: int, epochs: int) -> int:
    """Write the runs and return the bytes of their records."""
    generator = np.random.default_rng(0)
    mask = root / "mask"
    Mask({f"layer{n}.weight": torch.rand(200, 200) > 0.95 for n in range(8)}).save(mask)
    total = 0
    for config in configs(count, epochs):
        folder = root / "results" / config.arch / config.name
        folder.mkdir(parents=True)
        record = record_of(config, generator)
        text = record.to_json()
        total += len(text)
        (folder / RECORD).write_text(text)
        (folder / LOG).write_text(log_text(record))
        if config.prunes:
            os.link(mask, folder / MASK)
    return total


def main() -> int:
    """Measure, print, write JSON; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=200, help="epochs in each record")
    parser.add_argument("--json", type=Path, default=Path("measurements/report.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"runs": options.runs, "epochs": options.epochs}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        found["records_mb"] = round(write_runs(root, options.runs, options.epochs) / 1e6)
        reports = {
            "folder": ["results"],
            "folder_to_file": ["results", "--records", "records.parquet"],
            "file": ["records.parquet"],
        }
        for what, arguments in reports.items():
            found[what] = report(root, arguments, root / what)
        found["file_mb"] = round((root / "records.parquet").stat().st_size / 1e6, 2)
        found["same_tables"] = same(root / "folder" / "tables", root / "file" / "tables")
        found["same_figures"] = same(root / "folder" / "figures", root / "file" / "figures")
    found["limits"] = {"seconds": SECONDS, "peak_mb": MEGABYTES}
    found["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores"
    for key, value in found.items():
        print(f"{key:<20} {value}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    slow = found["folder"]["seconds"] > SECONDS or found["folder"]["peak_mb"] > MEGABYTES
    return int(slow or not (found["same_tables"] and found["same_figures"]))


def report(root: Path, arguments: list[str], out: Path) -> dict[str, float]:
    """Run ``lossprune report`` and return its seconds, its memory and the size of its page."""
    command = [sys.executable, "-m", "lossprune.cli", "report", *arguments, "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=root)
    peak = watch(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(process.returncode)
    page = (out / "index.html").stat().st_size
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1e6),
        "page_mb": round(page / 1e6, 1),
    }


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (a, b)]
    return contents[0] == contents[1]


def watch(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process and return the most bytes that it and its children held together."""
    import psutil

    peak = 0
    while process.poll() is None:
        held = 0
        try:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                held += one.memory_info().rss
        except psutil.Error:
            pass
        peak = max(peak, held)
        time.sleep(0.1)
    return peak


if __name__ == "__main__":
    sys.exit(main())
