"""What ``mask.enforce`` costs a training step, in every kind of loop.

``python -m benchmarks.trainers`` registers one hook on the optimizer before the enforcement and one
after it, so that the time between them is that of the enforcement alone, in the step where it runs
and with the caches as the step leaves them. A step lasts from one such end to the next.
The table gives the medians, the quartiles of the cost, and the cost as a share of the step.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossprune
from benchmarks.hardware import hardware, write_json

SPARSITY, WARM_UP, LIMIT = 0.9, 5, 0.03
Batch = tuple[Tensor, Tensor]


@dataclass
class Clock:
    """Seconds of enforcement, and the moment each step ended."""

    costs: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    began: float = 0.0

    def enforce(
        self,
        mask: lossprune.Mask,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        fill: bool,
    ) -> None:
        """Enforce between two hooks; ``fill`` does it as ``masked_fill_``, to compare with."""
        optimizer.register_step_post_hook(self._before)
        if fill:
            mask.apply_(model)
            weights = dict(model.named_parameters())
            removed = [(weights[name], ~kept) for name, kept in mask.items()]

            def fill_(*_: Any) -> None:
                with torch.no_grad():
                    for weight, where in removed:
                        weight.masked_fill_(where, 0.0)

            optimizer.register_step_post_hook(fill_)
        else:
            mask.enforce(model, optimizer)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def _after(self, *_: Any) -> None:
        now = time.perf_counter()
        self.costs.append(now - self.began)
        self.ends.append(now)

    def result(self) -> dict[str, float]:
        costs = sorted(self.costs[WARM_UP:])
        ends = self.ends[WARM_UP - 1 :]
        steps = [after - before for before, after in itertools.pairwise(ends)]
        quarter = statistics.quantiles(costs, n=4)
        return {
            "steps": len(costs),
            "step_s": statistics.median(steps),
            "cost_s": statistics.median(costs),
            "cost_low_s": quarter[0],
            "cost_high_s": quarter[2],
            "share": statistics.median(costs) / statistics.median(steps),
        }


def mlp() -> tuple[nn.Module, list[Batch]]:
    """The MLP of the paper on random images of MNIST's size, batch 100."""
    torch.manual_seed(0)
    batches = [(torch.randn(100, 1, 28, 28), torch.randint(10, (100,))) for _ in range(8)]
    return lossprune.networks.NETWORKS["MLP"](), batches


def vgg11() -> tuple[nn.Module, list[Batch]]:
    """VGG11 on random images of CIFAR-10's size, batch 100."""
    torch.manual_seed(0)
    batches = [(torch.randn(100, 3, 32, 32), torch.randint(10, (100,))) for _ in range(2)]
    return lossprune.networks.NETWORKS["VGG11"](), batches


class LastLogits(nn.Module):
    """GPT-2 as (inputs, targets) → loss over characters."""

    def __init__(self) -> None:
        super().__init__()
        from examples.transformers_trainer import tiny_gpt2

        torch.manual_seed(0)
        self.gpt2 = tiny_gpt2(72, width=64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt2(input_ids=tokens).logits.flatten(0, 1)


def gpt2() -> tuple[nn.Module, list[Batch]]:
    """GPT-2 of two layers, width 64, 32 rows of 64 characters."""
    model = LastLogits()
    tokens = [torch.randint(72, (32, 64)) for _ in range(8)]
    return model, [(row, row.flatten()) for row in tokens]


def prepared(
    network: Callable[[], tuple[nn.Module, list[Batch]]],
    make: Callable[..., torch.optim.Optimizer],
    *,
    fill: bool = False,
) -> tuple[nn.Module, list[Batch], torch.optim.Optimizer, Clock]:
    model, batches = network()
    mask = lossprune.prune(model, "MP", sparsity=SPARSITY).mask
    optimizer = make(model.parameters())
    clock = Clock()
    clock.enforce(mask, model, optimizer, fill=fill)
    return model, batches, optimizer, clock


def loop(
    steps: int, network: Any, make: Any, *, fill: bool = False, compiled: bool = False
) -> Clock:
    model, batches, optimizer, clock = prepared(network, make, fill=fill)
    run = torch.compile(model) if compiled else model
    for number in range(steps):
        inputs, labels = batches[number % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(run(inputs), labels).backward()
        optimizer.step()
    return clock


def accumulated(steps: int, network: Any, make: Any) -> Clock:
    """Two batches a step, under autocast and a gradient scaler."""
    model, batches, optimizer, clock = prepared(network, make)
    scaler = torch.amp.GradScaler("cpu")
    for number in range(2 * steps):
        inputs, labels = batches[number % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels) / 2
        scaler.scale(loss).backward()
        if number % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return clock


def lightning(steps: int, network: Any, make: Any) -> Clock:
    import pytorch_lightning as pl

    model, batches, optimizer, clock = prepared(network, make)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def training_step(self, batch: Batch) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    repeated = [batches[number % len(batches)] for number in range(steps)]
    loader = torch.utils.data.DataLoader(repeated, batch_size=None)
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), loader)
    return clock


def transformers(steps: int, make: Any) -> Clock:
    from transformers import Trainer

    from examples.transformers_trainer import arguments, characters

    model, _, optimizer, clock = prepared(gpt2, make)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model.gpt2,
            arguments(folder, steps, save_strategy="no"),
            train_dataset=characters()[0],
            optimizers=(optimizer, schedule),
        ).train()
    return clock


def distributed(steps: int) -> dict[str, float]:
    """The first of two processes of this module, each with the MLP and batches of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "benchmarks.trainers", "--process", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def one_process(steps: int) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model, batches, optimizer, clock = prepared(mlp, OPTIMIZERS["SGD fused"])
    model = DistributedDataParallel(model)
    for number in range(steps):
        inputs, labels = batches[number % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(json.dumps(clock.result()))
    dist.destroy_process_group()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD fused": partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "SGD foreach": partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-3, foreach=True),
}


def rows(steps: int) -> list[tuple[str, str, str, Callable[[], Clock | dict[str, float]]]]:
    few, some = max(steps // 50, 12), max(steps // 5, 20)
    made = OPTIMIZERS
    plain = [
        ("MLP", name, "plain loop", partial(loop, steps, mlp, make)) for name, make in made.items()
    ]
    return [
        *plain,
        (
            "MLP",
            "SGD fused",
            "masked_fill_, not enforce",
            partial(loop, steps, mlp, made["SGD fused"], fill=True),
        ),
        (
            "MLP",
            "AdamW fused",
            "accumulation, AMP, scaler",
            partial(accumulated, some, mlp, made["AdamW fused"]),
        ),
        (
            "MLP",
            "SGD fused",
            "torch.compile",
            partial(loop, steps, mlp, made["SGD fused"], compiled=True),
        ),
        ("MLP", "SGD fused", "DDP, two processes", partial(distributed, some)),
        ("MLP", "SGD fused", "Lightning", partial(lightning, some, mlp, made["SGD fused"])),
        ("VGG11", "SGD fused", "plain loop", partial(loop, few, vgg11, made["SGD fused"])),
        ("VGG11", "AdamW foreach", "plain loop", partial(loop, few, vgg11, made["AdamW foreach"])),
        ("GPT-2", "AdamW fused", "plain loop", partial(loop, some, gpt2, made["AdamW fused"])),
        ("GPT-2", "AdamW foreach", "plain loop", partial(loop, some, gpt2, made["AdamW foreach"])),
        ("GPT-2", "AdamW fused", "Hugging Face", partial(transformers, some, made["AdamW fused"])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000, help="of the MLP; others make fewer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--process", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("measurements/trainers.json"))
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.process:
        one_process(settings.process)
        return
    results = []
    print("| network | optimizer | loop | steps | step ms | cost µs (quartiles) | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network, optimizer, kind, measure in rows(settings.steps):
        measured = measure()
        result = measured.result() if isinstance(measured, Clock) else measured
        results.append({"network": network, "optimizer": optimizer, "loop": kind, **result})
        print(
            f"| {network} | {optimizer} | {kind} | {result['steps']} | "
            f"{result['step_s'] * 1e3:.2f} | {result['cost_s'] * 1e6:.0f} "
            f"({result['cost_low_s'] * 1e6:.0f} to {result['cost_high_s'] * 1e6:.0f}) | "
            f"{result['share']:.1%}{'' if result['share'] < LIMIT else ' (over)'} |",
            flush=True,
        )
    print(f"sparsity {SPARSITY:.0%}, {hardware()}")
    write_json(settings.out, {"command": "python -m benchmarks.trainers", "rows": results})


if __name__ == "__main__":
    main()
