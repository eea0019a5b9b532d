#!/usr/bin/env bash
# torch.utils.flop_counter.FlopCounterMode over a TransformerEncoder in evaluation mode, and over an LSTM.
#
# One would guess: a forward pass takes as many operations whether gradients are recorded or not, and an
# LSTM takes four thirds of what a GRU of the same size takes.
# What happens: in evaluation mode without gradients, where one measures inference, the encoder takes its
# fused path, of which nothing is counted: the total is 0, without a word. An LSTM is always 0, though a GRU
# and an RNN are counted.
# Whom it hurts: whoever prunes or compresses to a share of the operations, reports savings, or compares
# architectures by this counter: transformer encoders and LSTMs look free, and in a network that has other
# layers too the total is just too small.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html (when the fused
# path is taken), https://github.com/pytorch/pytorch/issues/126268 (the same total where inference mode is on)
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
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
tokens = torch.randn(2, 10, 64)


def counted(module: nn.Module, *, gradients: bool) -> int:
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        module(tokens)
    return counter.get_total_flops()


layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
# Two operations for each multiply-add of the four weight matrices alone.
products = 2 * 20 * 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 128)
recording, inference = (counted(encoder, gradients=on) for on in (True, False))
print(f"expected: at least {products:,} for the encoder, with and without gradients")
print(f"seen: {recording:,} with gradients, {inference:,} without")
gru, lstm = (
    counted(kind(64, 64, batch_first=True).eval(), gradients=False) for kind in (nn.GRU, nn.LSTM)
)
print(f"expected: {gru * 4 // 3:,} for an LSTM, by the {gru:,} of a GRU of its size")
print(f"seen: {lstm:,}")
assert recording >= products
assert inference == 0
assert gru == 2 * 20 * 6 * 64 * 64
assert lstm == 0
PYTHON
