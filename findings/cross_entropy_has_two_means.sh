#!/usr/bin/env bash
# torch.nn.functional.cross_entropy with class weights: labels as indices, and as one-hot probabilities.
#
# One would guess: the same labels in two spellings have the same mean loss.
# What happens: with indices the sum is divided by the weights of the labels that were seen, with
# probabilities by the number of examples. The losses, and with them gradients, curvature and every
# threshold or penalty chosen for them, differ by the labels' mean weight, here 2.5.
# Whom it hurts: whoever turns on mixup, distillation or label smoothing by hand on unbalanced classes, or
# compares saliencies and damping across the two.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html (the two formulas of
# "mean"), https://github.com/pytorch/pytorch/pull/61044
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import torch
from torch.nn import functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
logits, weight = torch.randn(4, 3), torch.tensor([1.0, 2.0, 5.0])
labels = torch.tensor([0, 1, 2, 1])
by_index = float(F.cross_entropy(logits, labels, weight))
one_hot = F.one_hot(labels, 3).float()
by_probability = float(F.cross_entropy(logits, one_hot, weight))
print("expected: one value")
print(f"seen: {by_index:.4f} by index, {by_probability:.4f} by probability, ", end="")
print(f"ratio {by_probability / by_index:.4f}; mean weight {float(weight[labels].mean()):.4f}")
assert abs(by_probability / by_index - float(weight[labels].mean())) < 1e-5
assert abs(float(F.cross_entropy(logits, one_hot)) - float(F.cross_entropy(logits, labels))) < 1e-6
PYTHON
