#!/usr/bin/env bash
# torch.nn.utils.prune.global_unstructured where two layers share one weight.
#
# One would guess: amount=0.5 removes half of the network's weights, and a weight that layers share is
# masked alike in both.
# What happens: a shared weight is counted, ranked and masked once for each layer. What is removed is half
# of the list with repetitions: here 62.5 % of the weights. And where the limit falls between two copies of
# one weight, each layer gets a mask of its own, and the two compute with different weights from then on.
# Whom it hurts: whoever prunes networks with tied embeddings, shared cells or Siamese arms by walking over
# the layers, as the tutorial does, and reports the amount as the sparsity.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.prune.global_unstructured.html
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
one, two, other = (nn.Linear(10, 10, bias=False) for _ in range(3))
two.weight = one.weight
with torch.no_grad():
    one.weight.mul_(10)  # larger than all of the other layer's
network = nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), other)
total = sum(p.numel() for p in network.parameters())
layers = [(layer, "weight") for layer in network if isinstance(layer, nn.Linear)]
prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
removed = int((other.weight_mask == 0).sum()) + int((one.weight_mask + two.weight_mask == 0).sum())
print(f"expected: {total // 2} of {total} weights removed")
print(f"seen: {removed} of {total}: {removed / total:.1%}")
assert total == 200 and removed == 125
assert one.weight_orig is two.weight_orig

one, two = (nn.Linear(3, 1, bias=False) for _ in range(2))
two.weight = one.weight
prune.global_unstructured([(one, "weight"), (two, "weight")], prune.L1Unstructured, amount=3)
print("seen of 3 in one shared weight of 3: masks", one.weight_mask.tolist(), two.weight_mask.tolist())
assert not torch.equal(one.weight_mask, two.weight_mask)
PYTHON
