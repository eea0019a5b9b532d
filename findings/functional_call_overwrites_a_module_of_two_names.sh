#!/usr/bin/env bash
# torch.func.functional_call on a network in which one module has two names.
#
# One would guess: the network computes with the values given, and is itself as before afterwards.
# What happens: the module's Parameters are gone. In their places are the values given, as plain tensors:
# the network's weights are overwritten, it has nothing to train, and an optimizer made before holds
# tensors that the network no longer has. Nothing is raised. With tie_weights=False it does not happen.
# Whom it hurts: whoever evaluates a network at other weights (pruning by a model of the loss, curvature,
# influence functions, meta-learning) where a layer is used twice, as in nn.Sequential(cell, act, cell).
# Source: https://github.com/pytorch/pytorch/issues/164759
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

print("torch", torch.__version__)
cell = nn.Linear(2, 2)
network = nn.Sequential(cell, nn.ReLU(), cell)
parameter = cell.weight
torch.func.functional_call(network, {"0.weight": torch.zeros(2, 2)}, (torch.randn(3, 2),))
print("expected: the weight is the same Parameter as before, not zero")
print("seen:", type(cell.weight).__name__, cell.weight.tolist())
assert cell.weight is not parameter
assert not isinstance(cell.weight, nn.Parameter)
assert not cell.weight.any() and parameter.all()

cell = nn.Linear(2, 2)
network = nn.Sequential(cell, nn.ReLU(), cell)
parameter = cell.weight
values = {"0.weight": torch.zeros(2, 2)}
torch.func.functional_call(network, values, (torch.randn(3, 2),), tie_weights=False)
print("seen with tie_weights=False:", type(cell.weight).__name__)
assert cell.weight is parameter
PYTHON
