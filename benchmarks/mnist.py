"""The published experiment on real MNIST in short: does more locality lower the loss?

``python -m benchmarks.mnist --data_path DATA`` runs the command line: a 20-epoch baseline; from it
MP, LM, QM and OBD in 1, 14 and 140 stages to a sparsity of 0.98847; and the QM network of 140
stages fine-tuned for 10 epochs.  It prints the table, checks what must hold, and exits 1 where it
does not.  Runs that are already finished in ``--path`` are not done again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import lossprune
from benchmarks.hardware import hardware, write_json
from lossprune.cli import main as lossprune_main
from lossprune.experiment import RunConfig, RunRecord

SPARSITY, STAGES = 0.98847, (1, 14, 140)


def run(arguments: argparse.Namespace, **settings: Any) -> tuple[RunRecord, Path]:
    config = RunConfig(
        arch="MLP",
        seed=arguments.seed,
        path=arguments.path,
        data_path=arguments.data_path,
        **settings,
    )
    flags = {"arch": "MLP", "seed": config.seed, "path": config.path, "data_path": config.data_path}
    flags |= {"nepochs": config.epochs, "pe": config.prune_epoch, "pr": config.sparsity}
    flags |= {"pm": config.criterion, "pi": config.stages}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--exp"] * config.exponential
    words += ["--model_0", str(config.start)] if config.start else []
    print("lossprune run", *words, flush=True)
    if lossprune_main(["run", *words]) != 0:
        raise SystemExit(f"the run in {config.folder} failed")
    return RunRecord.from_json((config.folder / "record.json").read_text()), config.folder


def check_zeros(folder: Path) -> bool:
    """Whether every removed weight of the last network is exactly 0, and the sparsity exact."""
    mask = lossprune.Mask.load(folder / "mask.safetensors")
    weights = torch.load(folder / "last_model.pt", weights_only=True)["state_dict"]
    zeros = all(not weights[name][~kept].any() for name, kept in mask.items())
    return zeros and mask.removed == round(SPARSITY * mask.total)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--path", type=Path, default=Path("measurements/mnist-short"))
    parser.add_argument("--seed", type=int, default=1111)
    parser.add_argument("--out", type=Path, default=Path("measurements/mnist.json"))
    arguments = parser.parse_args()
    baseline, folder = run(arguments, epochs=20, prune_epoch=-1)
    start = folder / "best_model.pt"
    rows: dict[str, dict[int, float]] = {}
    seconds = 0.0
    for criterion in ("MP", "LM", "QM", "OBD"):
        for stages in STAGES:
            record, _ = run(
                arguments,
                epochs=0,
                sparsity=SPARSITY,
                criterion=criterion,
                stages=stages,
                exponential=True,
                start=start,
            )
            assert record.after_pruning is not None
            rows.setdefault(criterion, {})[stages] = record.after_pruning.scores.train_loss
            seconds += record.seconds
    tuned, folder = run(
        arguments,
        epochs=10,
        sparsity=SPARSITY,
        criterion="QM",
        stages=140,
        exponential=True,
        start=start,
    )
    assert baseline.best is not None
    assert tuned.best is not None
    dense, sparse = baseline.best.scores.test_error, tuned.best.scores.test_error

    print("\n" + json.dumps(hardware()))
    print(f"baseline, 20 epochs, seed {arguments.seed}: test error {100 * dense:.2f} %")
    print("training loss after pruning to 0.98847    " + "".join(f"π = {pi:<8}" for pi in STAGES))
    for criterion, losses in rows.items():
        print(f"{criterion:<42}" + "".join(f"{losses[pi]:<12.3f}" for pi in STAGES))
    print(f"QM π 140, fine-tuned 10 epochs: test error {100 * sparse:.2f} %")
    checks = {
        "baseline's test error at most 2.3 %": dense <= 0.023,
        "LM: less loss at π = 140 than at 1": rows["LM"][140] < rows["LM"][1],
        "QM: less loss at 140 than at 14 than at 1": rows["QM"][140]
        < rows["QM"][14]
        < rows["QM"][1],
        "QM π 140, fine-tuned: test error at most 6.5 %": sparse <= 0.065,
        "removed weights exactly 0, sparsity exact": check_zeros(folder),
    }
    for what, holds in checks.items():
        print(f"{'yes' if holds else 'NO':<4} {what}")
    write_json(
        arguments.out,
        {
            "seed": arguments.seed,
            "baseline_test_error": dense,
            "loss_after_pruning": rows,
            "tuned_test_error": sparse,
            "seconds": baseline.seconds + seconds + tuned.seconds,
            "checks": checks,
        },
    )
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
