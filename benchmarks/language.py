"""A small GPT-2 and a small Llama pruned by every method: their loss on held-out text.

``python -m benchmarks.language`` trains both, two layers of width 128, on the characters of ten
chapters of *Alice's Adventures in Wonderland*, once a seed, and prunes the weights of their blocks
to 50 and 70 % and to 2:4: by magnitude, Wanda and SparseGPT block by block, and by LM and QM
(Monte-Carlo), which see the loss; some with compensation too ("moved").  It gives the mean loss a
character of the last two chapters, in nats, right after pruning.  Trained networks are kept in
``--networks``, finished cells in ``--out``.  ``--peer PYTHON``, that of an environment with
llm-compressor, sets Wanda and SparseGPT beside its modifiers on the same networks and examples.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lossprune
from benchmarks.cells import Cells, Row, mean_and_std, print_markdown
from benchmarks.gpt2 import BATCH, held_out_loss, train
from benchmarks.language_beside import beside
from examples.transformers_trainer import CONTEXT, characters, tiny_gpt2

WIDTH, LR = 128, 1e-3
# With ten iterations on 205 rows a pruning in four stages took over a minute of one core.
MOVES = lossprune.Compensation(iterations=5, examples=64)
BY_BLOCK: dict[str, dict[str, Any]] = {
    "MP, by block": {"criterion": "MP"},
    "MP, by block, moved": {"criterion": "MP", "compensate": True},
    "Wanda": {"criterion": "Wanda"},
    "Wanda, moved": {"criterion": "Wanda", "compensate": True},
    "SparseGPT": {"criterion": "SparseGPT"},
}
GLOBAL: dict[str, dict[str, Any]] = {
    "MP": {"criterion": "MP"},
    "LM": {"criterion": "LM"},
    "LM, moved": {"criterion": "LM", "compensate": MOVES},
    "QM": {"criterion": "QM", "estimator": "monte-carlo:1"},
    "QM, moved": {"criterion": "QM", "estimator": "monte-carlo:1", "compensate": MOVES},
}
METHODS = BY_BLOCK | GLOBAL
TARGETS = ("0.5", "0.7", "2:4")
KEY = ("network", "seed", "steps", "target", "method", "examples", "stages")


def llama(vocabulary: int) -> LlamaForCausalLM:
    """Return one in which two query heads share one of keys and values."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


NETWORKS: dict[str, Callable[[int], PreTrainedModel]] = {
    "GPT-2": lambda vocabulary: tiny_gpt2(vocabulary, width=WIDTH),
    "Llama": llama,
}


class Case:
    """A trained network, its data and what they are pruned by."""

    def __init__(self, name: str, seed: int, settings: argparse.Namespace) -> None:
        training, held_out, self.vocabulary = characters()
        self.ids = torch.stack([row["input_ids"] for row in training])
        self.test = torch.stack([row["input_ids"] for row in held_out])
        self.settings = settings
        self.folder = settings.networks / f"{name}-{seed}-{settings.steps}"
        if not (self.folder / "config.json").exists():
            self._train(name, seed)
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        self.network: nn.Module = model.eval()
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))
        self.fit = self.ids[order]
        self.dense = held_out_loss(self.network, self.test)

    def _train(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        network = NETWORKS[name](self.vocabulary)
        train(network, self.ids, steps=self.settings.steps, lr=LR, seed=seed, mask=None)
        network.save_pretrained(self.folder)

    def pruned(self, method: str, target: str, **more: Any) -> lossprune.PruningResult:
        shape: dict[str, Any] = (
            {"pattern": target} if ":" in target else {"sparsity": float(target)}
        )
        asked: dict[str, Any] = {
            "data": [{"input_ids": rows, "labels": rows} for rows in self.fit.split(BATCH)],
            "examples": self.settings.examples,
            "progress": False,
        }
        if method in BY_BLOCK:
            return lossprune.prune_by_block(self.network, **BY_BLOCK[method], **shape, **asked)
        if method != "MP":
            asked["stages"] = self.settings.stages
        return lossprune.prune(
            self.network,
            **GLOBAL[method],
            **shape,
            **asked,
            loss="next_token",
            seed=0,
            exclude="lm_head",
        )

    def cell(self, method: str, target: str) -> Row:
        began = time.process_time()
        result = self.pruned(method, target)
        seconds = time.process_time() - began
        nats = held_out_loss(self.applied(result), self.test)
        return {"nats": nats, "seconds": seconds, "dense": self.dense}

    def of_type(self, dtype: torch.dtype) -> "Case":
        case = copy.copy(self)
        case.network = copy.deepcopy(self.network).to(dtype)
        return case

    def applied(self, result: lossprune.PruningResult) -> nn.Module:
        return result.apply_(copy.deepcopy(self.network))

    def loaded(self, parameters: dict[str, Tensor]) -> nn.Module:
        network = copy.deepcopy(self.network)
        network.load_state_dict(parameters)
        return network


def measured(settings: argparse.Namespace, cells: Cells, case: Case, key: Row) -> None:
    """Prune by every method that is not in the cells yet."""
    for target in settings.targets:
        for method in settings.methods:
            own = key | {"target": target, "method": method}
            if not cells.find(**own):
                cells.add([own | case.cell(method, target)])
                print(".", end="", flush=True)


def table(settings: argparse.Namespace, cells: Cells, network: str) -> None:
    """Mean and deviation over seeds of each method at each target; seconds of all targets."""
    rows = [
        row
        for seed in range(settings.seeds)
        for row in cells.find(network=network, seed=seed, **shared(settings))
    ]
    dense = mean_and_std([*{row["seed"]: row["dense"] for row in rows}.values()], 3)
    print(f"\n{network}, dense {dense} nats, n = {settings.seeds}\n")
    lines = []
    for method in settings.methods:
        same = [row for row in rows if row["method"] == method]
        nats = [[row["nats"] for row in same if row["target"] == t] for t in settings.targets]
        seconds = statistics.median(row["seconds"] for row in same)
        lines.append([method, *(mean_and_std(values, 3) for values in nats), f"{seconds:.1f}"])
    print_markdown(("", *settings.targets, "seconds"), lines)


def shared(settings: argparse.Namespace) -> Row:
    return {name: getattr(settings, name) for name in ("steps", "examples", "stages")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="of training, 32 rows of 64 each")
    parser.add_argument("--networks", type=Path, default=Path("measurements/language"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--examples", type=int, default=128, help="rows to prune on, a stage")
    parser.add_argument("--stages", type=int, default=4, help="of LM and QM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, default=Path("measurements/language.json"))
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.peer:
        cases = [Case("Llama", seed, settings) for seed in range(settings.seeds)]
        beside(cases, settings.targets, settings.peer)
        return 0
    cells = Cells(settings.out, " ".join(sys.argv), KEY)
    for network in NETWORKS:
        for seed in range(settings.seeds):
            key = {"network": network, "seed": seed, **shared(settings)}
            measured(settings, cells, Case(network, seed, settings), key)
        table(settings, cells, network)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
