#!/usr/bin/env bash
# schedulefree: removed weights that are set to zero after every step, and optimizer.eval().
#
# One would guess: weights that are zero after each optimizer.step() are zero when training is over.
# What happens: optimizer.eval() computes the parameters anew from a second copy of the weights, z, which
# was never masked. All removed weights are back, in the network that is evaluated and saved. Setting z to
# zero as well holds them.
# Whom it hurts: everyone who fine-tunes a pruned network by masking after each step, which is right for
# the optimizers of torch: the sparsity is there all through training and gone in the file.
# Source: https://github.com/facebookresearch/schedule_free (README: train, eval and the sequences x, y, z)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import schedulefree
import torch
from torch import nn

print("torch", torch.__version__, "schedulefree", version("schedulefree"))


def back_after_eval(hold_z):
    torch.manual_seed(0)
    network, x = nn.Linear(8, 4), torch.randn(16, 8)
    removed = torch.rand(4, 8) < 0.5
    optimizer = schedulefree.AdamWScheduleFree(network.parameters(), lr=0.01)
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
        network.weight.data[removed] = 0
        if hold_z:
            optimizer.state[network.weight]["z"][removed] = 0
    before = int(network.weight[removed].count_nonzero())
    optimizer.eval()
    return before, int(network.weight[removed].count_nonzero()), int(removed.sum())


before, after, removed = back_after_eval(hold_z=False)
print("expected: none of the removed weights is back")
print(f"seen: {before} of {removed} before optimizer.eval(), {after} of {removed} after it")
assert (before, after) == (0, removed)
before, after, removed = back_after_eval(hold_z=True)
print(f"seen with z held at zero as well: {after} of {removed}")
assert after == 0
PYTHON
