"""A tiny GPT-2 pruned by MP, LM and QM: its loss on held-out text.

``python -m benchmarks.gpt2`` trains a GPT-2 of two layers on the characters of ten chapters of
*Alice's Adventures in Wonderland*, once a seed, prunes each by every criterion at 50 % and 80 %,
and gives the mean loss per character of the last two chapters right after pruning and after a short
fine-tuning, removed weights held at zero by ``mask.enforce``.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.hardware import hardware, write_json
from examples.transformers_trainer import characters, tiny_gpt2

BATCH, LR, TUNING_LR = 32, 3e-3, 1e-3
METHODS = [
    ("MP", 1, 0.0),
    *((name, stages, reg) for name in ("LM", "QM") for stages in (1, 14) for reg in (0.0, 1e-3)),
]
SPARSITIES = (0.5, 0.8)


def train(model: nn.Module, ids: Tensor, *, steps: int, lr: float, seed: int, mask: Any) -> None:
    """AdamW with a linear decay on random rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    enforcement = mask.enforce(model, optimizer) if mask is not None else None
    generator = torch.Generator().manual_seed(seed)
    for rows in itertools.islice(shuffled(len(ids), generator), steps):
        optimizer.zero_grad()
        model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        optimizer.step()
        schedule.step()
    if enforcement is not None:
        enforcement.remove()


def shuffled(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor) -> float:
    """Mean over all characters but each row's first; rows are equally long, so means add."""
    parts = [(model(input_ids=rows, labels=rows).loss.item(), len(rows)) for rows in ids.split(128)]
    return sum(loss * rows for loss, rows in parts) / len(ids)


def one_seed(seed: int, settings: argparse.Namespace) -> list[dict[str, Any]]:
    training, held_out, vocabulary = characters()
    ids = torch.stack([row["input_ids"] for row in training])
    test = torch.stack([row["input_ids"] for row in held_out])
    torch.manual_seed(seed)
    dense = tiny_gpt2(vocabulary, width=settings.width)
    began = time.perf_counter()
    train(dense, ids, steps=settings.steps, lr=LR, seed=seed, mask=None)
    print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)
    before = held_out_loss(dense, test)
    tuned = copy.deepcopy(dense)
    train(tuned, ids, steps=settings.tuning, lr=TUNING_LR, seed=seed + 100, mask=None)
    rows = [
        {"seed": seed, "criterion": "dense", "stages": 0, "reg": 0.0, "sparsity": 0.0}
        | {"pruned": before, "tuned": held_out_loss(tuned, test), "seconds": 0.0}
    ]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    batches = [{"input_ids": ids[r], "labels": ids[r]} for r in order.split(BATCH)]
    for sparsity, (criterion, stages, reg) in itertools.product(SPARSITIES, METHODS):
        began = time.perf_counter()
        needs = {} if criterion == "MP" else {"data": batches, "examples": settings.examples}
        mask = lossprune.prune(
            dense,
            criterion,
            sparsity=sparsity,
            stages=stages,
            reg=reg,
            loss="next_token",
            estimator="monte-carlo",
            seed=seed,
            **needs,
        ).mask
        seconds = time.perf_counter() - began
        model = mask.apply_(copy.deepcopy(dense))
        pruned = held_out_loss(model, test)
        train(model, ids, steps=settings.tuning, lr=TUNING_LR, seed=seed + 100, mask=mask)
        weights = dict(model.named_parameters())
        assert all(not weights[name][~kept].any() for name, kept in mask.items())
        rows.append(
            {"seed": seed, "criterion": criterion, "stages": stages, "reg": reg}
            | {"sparsity": sparsity, "pruned": pruned, "tuned": held_out_loss(model, test)}
            | {"seconds": seconds}
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over seeds of each method."""
    lines = [
        "| κ | criterion | π | λ | pruned | fine-tuned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("sparsity", "criterion", "stages", "reg")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in keys) == key]
        sparsity, criterion, stages, reg = key
        lines.append(
            f"| {sparsity:.0%} | {criterion} | {stages or '–'} | {reg:g} | "
            f"{spread([row['pruned'] for row in same])} | "
            f"{spread([row['tuned'] for row in same])} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of training, 32 rows of 64 each")
    parser.add_argument("--tuning", type=int, default=100, help="steps of fine-tuning")
    parser.add_argument("--examples", type=int, default=128, help="rows measured a stage")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("measurements/gpt2.json"))
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows = [row for seed in range(settings.seeds) for row in one_seed(seed, settings)]
    print(table(rows))
    print(f"n = {settings.seeds} seeds, mean (min to max), {hardware()}")
    arguments = {name: str(value) for name, value in vars(settings).items()}
    write_json(
        settings.out,
        {"command": "python -m benchmarks.gpt2", "arguments": arguments, "rows": rows},
    )


if __name__ == "__main__":
    main()
