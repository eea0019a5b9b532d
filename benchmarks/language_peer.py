"""llm-compressor's modifiers on networks of ``benchmarks.language``.

``python benchmarks/language_peer.py FOLDER``, run by its path in any Python with llmcompressor,
takes a Llama that ``save_pretrained`` wrote, ``tokens.safetensors`` and ``jobs.json`` there: of
each job its name, the modifier, the arguments and the type to compute in.  It writes
``NAME.safetensors``, the parameters afterwards, and ``versions.json``.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers import pruning  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.pruning.sparsegpt import (  # pyright: ignore[reportMissingImports]
    sgpt_sparsify,
)
from llmcompressor.modifiers.pruning.wanda import (  # pyright: ignore[reportMissingImports]
    wanda_sparsify,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BATCH = 32


def collated(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(rows)}


def pruned(folder: Path, tokens: Tensor, job: dict[str, Any]) -> dict[str, Tensor]:
    dtype = getattr(torch, job["dtype"])
    torch.set_default_dtype(dtype)
    sgpt_sparsify.SGPT_PRECISION = wanda_sparsify.WANDA_PRECISION = dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    oneshot(
        model=model,
        dataset=DataLoader(list(tokens), batch_size=BATCH, collate_fn=collated),  # pyright: ignore
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}))),
        recipe=getattr(pruning, job["modifier"])(**job["arguments"]),
        pipeline="sequential",
        num_calibration_samples=len(tokens),
    )
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    for job in json.loads((folder / "jobs.json").read_text()):
        save_file(pruned(folder, tokens, job), folder / f"{job['name']}.safetensors")
    packages = ("llmcompressor", "torch", "transformers")
    (folder / "versions.json").write_text(json.dumps({name: version(name) for name in packages}))


if __name__ == "__main__":
    main()
