#!/usr/bin/env bash
# accelerate: writing to the parameters of a network under cpu_offload.
#
# One would guess: a parameter that is set to zero in place is zero the next time the network runs; or the
# assignment raises.
# What happens: the network's parameters are on the meta device and the values elsewhere; each layer fetches
# them when it is called. Writing to the parameter succeeds, changes nothing, and the outputs are the old.
# Whom it hurts: whoever prunes, masks or edits a large language model that device_map or cpu_offload has
# put where it fits: the sparsity that was asked for is not in the network, and nothing says so.
# Source: https://huggingface.co/docs/accelerate/package_reference/big_modeling,
# https://github.com/huggingface/accelerate/issues/1711
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import accelerate
import torch
from torch import nn

print("torch", torch.__version__, "accelerate", accelerate.__version__)
torch.manual_seed(0)
network, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
with torch.no_grad():
    before = network(x)
accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
with torch.no_grad():
    for parameter in network.parameters():
        parameter.zero_()
    after = network(x)
print("expected: outputs of 0, as every parameter was set to zero")
print(f"seen: outputs up to {float(after.abs().max()):.3f}, exactly as before:", end=" ")
print(f"{torch.equal(after, before)}; parameters on", next(network.parameters()).device)
assert torch.equal(after, before) and after.abs().max() > 0.01
PYTHON
