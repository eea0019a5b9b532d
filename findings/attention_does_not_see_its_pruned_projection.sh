#!/usr/bin/env bash
# torch.nn.utils.prune on the output projection of nn.MultiheadAttention.
#
# One would guess: as for any nn.Linear, the weight is weight_orig * weight_mask at every call, so that a
# saved state dict loads into a pruned network and gives the same outputs.
# What happens: attention reads out_proj.weight and never calls out_proj, so the hook that recomputes the
# weight never runs. After load_state_dict, which matches all keys, the layer still computes with what it
# had before: other outputs, without a word.
# Whom it hurts: everyone who prunes a transformer made of torch's own attention and saves it, or trains
# it on (the weight's graph is that of the day it was pruned: a second backward raises).
# Source: https://github.com/pytorch/pytorch/issues/78109,
# https://github.com/pytorch/pytorch/issues/69353
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import prune

print("torch", torch.__version__)
torch.manual_seed(0)


def pruned():
    network = nn.MultiheadAttention(8, 2, batch_first=True)
    prune.l1_unstructured(network.out_proj, "weight", amount=0.5)
    return network


saved, loaded = pruned(), pruned()
print(loaded.load_state_dict(saved.state_dict()))
x = torch.randn(4, 5, 8)
with torch.no_grad():
    difference = float((saved(x, x, x)[0] - loaded(x, x, x)[0]).abs().max())
layer = loaded.out_proj
stale = float((layer.weight - layer.weight_orig * layer.weight_mask).detach().abs().max())
print("expected: the same outputs, a difference of 0")
print(f"seen: outputs differ by {difference:.3f}, weight and weight_orig * weight_mask by {stale:.3f}")
assert difference > 0.01 and stale > 0.01

with torch.no_grad():
    saved.out_proj(x), loaded.out_proj(x)  # calls that run the hooks
    difference = float((saved(x, x, x)[0] - loaded(x, x, x)[0]).abs().max())
print(f"seen after the layer itself was called once: {difference:.3f}")
assert difference == 0
PYTHON
