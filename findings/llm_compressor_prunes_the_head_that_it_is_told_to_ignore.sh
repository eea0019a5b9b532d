#!/usr/bin/env bash
# llm-compressor's WandaPruningModifier and SparseGPTModifier with ignore=["lm_head"], and on GPT-2.
#
# One would guess: ignore=["lm_head"], as its recipes for quantization say, leaves the head as it is; and GPT-2,
# whose blocks hold nothing but linear layers, loses half of the weights of its blocks.
# What happens: the head is pruned all the same, without a warning: a layer that matches `targets` itself goes by its
# name and a dot, "lm_head.", which "lm_head" does not match ("re:.*lm_head" does); the warning that there is for
# heads asks whether the name ends in "lm_head". Of GPT-2, whose layers are transformers' Conv1D, the blocks lose
# nothing, with targets=["Conv1D"] neither; the head alone is pruned, and as it is tied, half of the embeddings.
# Whom it hurts: whoever reports a network as half sparse that is not, or wonders at its loss.
# Source: https://github.com/vllm-project/llm-compressor/issues/1231 and 1421 (recipes with ignore=["lm_head"]).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check llmcompressor==0.14.0.1 torch==2.13.0 transformers==5.17.0
cd "$folder"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$venv/bin/python" - <<'PYTHON'
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger.remove()
print("llmcompressor 0.14.0.1, torch", torch.__version__)
torch.manual_seed(0)
ends = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
LlamaForCausalLM(
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, **ends)
).save_pretrained("llama")
GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=32, n_layer=1, n_head=2, **ends)).save_pretrained("gpt2")
tokens = list(torch.randint(50, (32, 16)))


def zeros(kind, folder, modifier, **asked):
    """The share of zeros of the blocks' matrices, of the head, and of the embeddings."""
    model = kind.from_pretrained(folder)
    oneshot(
        model=model,
        dataset=DataLoader(tokens, batch_size=8, collate_fn=lambda rows: {"input_ids": torch.stack(rows)}),
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}))),
        recipe=modifier(sparsity=0.5, **asked),
        pipeline="sequential",
        num_calibration_samples=len(tokens),
    )
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or ".layers." in n)]
    removed = sum(int((p == 0).sum()) for p in blocks) / sum(p.numel() for p in blocks)
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    found = [removed, *(float((p == 0).float().mean()) for p in (head, words))]
    asked_for = f"{modifier.__name__}({', '.join(f'{k}={v}' for k, v in asked.items())})"
    print(f"{folder}, {asked_for}: blocks {found[0]:.3f}, head {found[1]:.3f}, embeddings {found[2]:.3f}")
    return [round(share, 2) for share in found]


print("share of zeros; expected: blocks 0.5, head and embeddings 0; seen:")
for modifier in (WandaPruningModifier, SparseGPTModifier):
    assert zeros(LlamaForCausalLM, "llama", modifier, ignore=["lm_head"]) == [0.5, 0.5, 0.0]
    assert zeros(LlamaForCausalLM, "llama", modifier, ignore=["re:.*lm_head"]) == [0.5, 0.0, 0.0]
    assert zeros(GPT2LMHeadModel, "gpt2", modifier) == [0.0, 0.5, 0.5]
    assert zeros(GPT2LMHeadModel, "gpt2", modifier, targets=["Conv1D"]) == [0.0, 0.0, 0.0]
PYTHON
