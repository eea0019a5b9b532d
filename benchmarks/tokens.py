"""What a stage of pruning a language model costs, beside a pass of its batch.

``python -m benchmarks.tokens`` takes a GPT-2 by its configuration (``--layers 12 --width 768`` is
the one of 124 million weights, which are random: the cost does not depend on them) and a batch of
random tokens.  In each round every method does one stage of a pruning to 50 %, measurement,
selection and the loss afterwards, and the network runs forward and backward once as in training,
one after the other; ratios are of one round.  The gradient alone is what LM measures.  Peak memory
is that of a process that does nothing else, over what it had before.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lossprune
from benchmarks.cells import Cells, print_markdown, words_of
from benchmarks.curvature import PeakMemory

PASS = "forward and backward"
MEASURED = "gradient alone"
METHODS: dict[str, dict[str, Any]] = {
    MEASURED: {},
    "LM": {"criterion": "LM"},
    "QM monte-carlo:1": {"criterion": "QM", "estimator": "monte-carlo:1"},
    "QM monte-carlo:4": {"criterion": "QM", "estimator": "monte-carlo:4"},
}
KEY = ("network", "batch", "memory", "threads", "method")


def language_model(settings: argparse.Namespace) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    warnings.filterwarnings("ignore", message="the network's loss before pruning")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_positions=max(settings.tokens, 1024),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.width // 64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        tie_word_embeddings=not settings.untied,
    )
    return GPT2LMHeadModel(config).eval()


def works(settings: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, ready to be called."""
    model = language_model(settings)
    ids = torch.randint(settings.vocabulary, (settings.examples, settings.tokens))
    batch = {"input_ids": ids, "labels": ids}

    def forward_and_backward() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    budget = settings.memory and settings.memory << 20

    def stage(method: str) -> Any:
        if method == MEASURED:
            return lossprune.measure(
                model, [batch], loss="next_token", ggn_diagonal=False, memory=budget
            )
        return lossprune.prune(
            model,
            data=[batch],
            stages=1,
            sparsity=0.5,
            loss="next_token",
            memory=budget,
            seed=1,
            **METHODS[method],
        )

    stages = {method: (lambda method=method: stage(method)) for method in settings.methods}
    return {PASS: forward_and_backward, **stages}


def peak(settings: argparse.Namespace, method: str) -> int:
    torch.set_num_threads(settings.threads)
    work = works(settings)[method]
    with PeakMemory() as memory:
        work()
    return memory.bytes


def measured(settings: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(settings.threads)
    timed = works(settings)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    # Of one thread the processor's time, which others on the machine disturb less.
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    for round_ in range(settings.rounds + 1):
        for name, work in timed.items():
            began = clock()
            work()
            if round_:  # the first calls set torch up
                seconds[name].append(clock() - began)
    cell = {
        "network": f"{settings.layers} × {settings.width}, {settings.vocabulary} tokens"
        + (", untied" if settings.untied else ""),
        "batch": f"{settings.examples} × {settings.tokens}",
        "memory": settings.memory or 0,
        "threads": settings.threads,
    }
    rows = []
    for name, found in seconds.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            most = pool.apply(peak, (settings, name))
        ratios = [a / b for a, b in zip(found, seconds[PASS], strict=True)]
        row = {"method": name, "seconds": found, "ratios": ratios, "peak_bytes": most}
        rows.append({**cell, **row})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            row["network"],
            row["batch"],
            str(row["memory"] or "default"),
            row["method"],
            f"{statistics.median(row['seconds']):.2f}",
            f"{statistics.median(row['ratios']):.2f} "
            f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    header = ["network", "batch", "memory, MiB", "", "seconds", "of a pass", "peak, MiB"]
    print_markdown(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--untied", action="store_true", help="a head apart from the embedding")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--memory", type=int, default=None, help="MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", type=words_of(str), default=list(METHODS), help="with commas")
    parser.add_argument("--out", type=Path, default=Path("measurements/tokens.json"))
    settings = parser.parse_args()
    cells = Cells(settings.out, "python -m benchmarks.tokens", KEY)
    cells.add(measured(settings))
    show(cells.rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
