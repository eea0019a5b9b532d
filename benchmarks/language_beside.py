"""Wanda and SparseGPT beside llm-compressor's modifiers, on the same network and examples."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cells import Row, print_markdown
from benchmarks.gpt2 import held_out_loss

if TYPE_CHECKING:
    from benchmarks.language import Case

WORKER = Path(__file__).with_name("language_peer.py")
MODIFIERS = {"Wanda": "WandaPruningModifier", "SparseGPT": "SparseGPTModifier"}
LAYERS = r"re:.*\.layers\..*_proj$"
# SparseGPTModifier removes int(n s) + 1 of the n weights in its blocks of this many columns.
COLUMNS = 128


def beside(cases: list["Case"], targets: list[str], python: str) -> None:
    """Print, of each case, method and target, in what the two differ."""
    lines, versions = [], ""
    for seed, case in enumerate(cases):
        jobs = [
            job for target in targets for name in MODIFIERS for job in _jobs(case, name, target)
        ]
        versions = _run(case, jobs, python)
        for job in jobs:
            found = _compared(case, job)
            lines.append([f"{job['target']}, {job['title']}", str(seed), *found])
    print(f"\nbeside {versions}\n")
    header = ("κ", "seed", "removed here", "there", "by both", "moved apart", "nats here", "there")
    print_markdown(header, lines)


def _jobs(case: "Case", method: str, target: str) -> list[Row]:
    """As anyone would ask; where that is another number, as many as here; and that in float64."""
    pattern = ":" in target
    share = 0.5 if pattern else float(target)
    asked: Row = {"target": target, "method": method, "modifier": MODIFIERS[method]}
    usual: Row = {"sparsity": share, "targets": [LAYERS]}
    if pattern:
        usual["mask_structure"] = target
    jobs = [asked | {"title": method, "arguments": usual, "dtype": "float32"}]
    if method == "SparseGPT" and not pattern:
        sizes = [w.shape[0] * COLUMNS for n, w in case.network.named_parameters() if "_proj" in n]
        exact = usual | {"sparsity": [(round(size * share) - 0.5) / size for size in sizes]}
        jobs.append(jobs[0] | {"title": "… as many", "arguments": exact})
    jobs.append(jobs[-1] | {"title": "… in float64", "dtype": "float64"})
    return [
        job | {"name": f"{target}-{method}-{k}".replace(":", "-")} for k, job in enumerate(jobs)
    ]


def _run(case: "Case", jobs: list[Row], python: str) -> str:
    folder = case.folder
    save_file(
        {"input_ids": case.fit[: case.settings.examples].contiguous()},
        folder / "tokens.safetensors",
    )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "peer.log").open("w") as log:
        subprocess.run(
            [python, str(WORKER), str(folder)],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
    versions: Mapping[str, str] = json.loads((folder / "versions.json").read_text())
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _compared(case: "Case", job: Row) -> list[str]:
    case = case.of_type(getattr(torch, job["dtype"]))
    result = case.pruned(job["method"], job["target"])
    own = case.applied(result)
    theirs = case.loaded(load_file(case.folder / f"{job['name']}.safetensors"))
    pairs = [(own.get_parameter(n), theirs.get_parameter(n)) for n in result.mask]
    here = torch.cat([(one == 0).flatten() for one, _ in pairs])
    there = torch.cat([(other == 0).flatten() for _, other in pairs])
    apart = max(_apart(one, other) for one, other in pairs)
    return [
        f"{int(here.sum()):,}",
        f"{int(there.sum()):,}",
        f"{float((here & there).sum() / torch.minimum(here.sum(), there.sum())):.5f}",
        f"{apart:.1e}",
        *(f"{held_out_loss(network, case.test):.4f}" for network in (own, theirs)),
    ]


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of weights that both keep, beside the largest of these weights."""
    both = (one != 0) & (other != 0)
    return ((one - other)[both].abs().max() / one[both].abs().max()).item()
