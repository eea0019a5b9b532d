"""Peak memory and time of pruning a folder of save_pretrained, block by block.

    python -m benchmarks.checkpoints --folder dense [--hidden 2048 --layers 16 --texts 4]

A Llama-like network of random weights in bfloat16 is written to the folder, if it is not there yet.
Each criterion then prunes it in a process of its own; told are the weights, the
seconds, the most memory that was resident, and what the process had before it began.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CRITERIA = ("MP", "Wanda")
TOKENS = 128


def made(folder: Path, hidden: int, layers: int) -> None:
    """Write the network."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    network = LlamaForCausalLM(config)
    network.save_pretrained(folder, max_shard_size="500MB")


def measured(folder: Path, criterion: str, texts: int) -> dict[str, float]:
    """Prune it, in this process."""
    import torch

    import lossprune

    torch.manual_seed(0)
    tokens = torch.randint(32000, (texts, TOKENS))
    data = [{"input_ids": part, "labels": part} for part in tokens.split(1)]
    import transformers  # noqa: F401 - its memory is not that of a pruning

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        found = lossprune.prune_checkpoint(folder, out, criterion, sparsity=0.5, data=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "weights": found.total,
        "removed": found.removed,
        "seconds": round(found.seconds, 1),
        "before_mib": before >> 10,
        "peak_mib": peak >> 10,
    }


def main() -> None:
    """Print a line a criterion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--texts", type=int, default=4, help=f"of {TOKENS} tokens")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--one", help="in this process")
    given = parser.parse_args()
    if given.one == "make":
        made(given.folder, given.hidden, given.layers)
    elif given.one:
        print(json.dumps(measured(given.folder, given.one, given.texts)))
    else:
        ones = given.criteria if given.folder.exists() else ["make", *given.criteria]
        for one in ones:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.checkpoints", *sys.argv[1:], "--one", one],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            if one != "make":
                print(one, done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
