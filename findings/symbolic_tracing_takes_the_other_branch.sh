#!/usr/bin/env bash
# torch.fx.symbolic_trace of a network with an optional argument.
#
# One would guess: a traced network called without the argument computes what the network computes without
# it; or tracing raises, as it does for other conditions on inputs.
# What happens: while tracing every argument is a Proxy, which is not None, so "if mask is None" is False,
# and the branch for a given argument is what is recorded. Called with the very default, the graph gives
# the other branch's result, without a word.
# Whom it hurts: whatever rewrites networks by their graph (structured pruning, batch-norm folding,
# quantisation, deployment): forward(x, mask=None) is everywhere. Bind defaults by concrete_args, and
# compare outputs.
# Source: https://github.com/pytorch/pytorch/issues/50178, https://github.com/pytorch/pytorch/issues/45685
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import torch
from torch import fx, nn

print("torch", torch.__version__)


class Network(nn.Module):
    def forward(self, x, gate=None):
        if gate is None:
            return torch.relu(x)
        return torch.sigmoid(x)


network, x = Network(), torch.tensor([-1.0, 2.0])
traced = fx.symbolic_trace(network)
print("expected:", network(x).tolist())
print("seen:", traced(x).tolist())
assert torch.equal(traced(x), torch.sigmoid(x))
bound = fx.symbolic_trace(network, concrete_args={"gate": None})
print("seen with concrete_args={'gate': None}:", bound(x).tolist())
assert torch.equal(bound(x), network(x))
PYTHON
