#!/usr/bin/env bash
# torch: writing to the parameters of a network under fully_shard (FSDP2), after a pass without gradients.
#
# One would guess: a parameter that is set to zero in place stays zero, as it does before the first pass; or the
# assignment raises.
# What happens: after a forward pass that no backward pass follows, network.parameters() are the whole weights that were
# gathered for it, not the shards. Writing to them succeeds and the next outputs show it. The next backward pass
# frees them, and the old values of the shards are back.
# Whom it hurts: whoever evaluates a sharded network, then masks, prunes, clips or initialises its weights, and
# trains on: all of it is undone after one step, and nothing says so.
# Source: https://github.com/pytorch/pytorch/issues/144289,
# https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html (which has parameters converted back after
# the forward pass)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

print("torch", torch.__version__)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
x = torch.randn(3, 8)
with torch.no_grad():
    before = network(x)
    for parameter in network.parameters():
        parameter.zero_()
    zeroed = network(x)
network(x).sum().backward()  # no optimizer: nothing else changes a weight
with torch.no_grad():
    after = network(x)
print("expected: outputs of 0 from then on, as every parameter was set to zero")
print(f"seen: outputs up to {float(zeroed.abs().max()):.3f}, and after a backward pass up to", end=" ")
print(f"{float(after.abs().max()):.3f}, exactly as before: {torch.equal(after, before)}")
assert not zeroed.any() and torch.equal(after, before) and after.abs().max() > 0.01
dist.destroy_process_group()
PYTHON
