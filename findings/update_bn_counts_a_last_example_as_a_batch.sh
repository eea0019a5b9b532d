#!/usr/bin/env bash
# torch.optim.swa_utils.update_bn over a loader whose last batch is small.
#
# One would guess: the running statistics are those of the data, every example counting once, as in the code
# of stochastic weight averaging by its authors, where a batch of b examples after n others has momentum
# b / (n + b).
# What happens: every batch counts the same. Of 1025 images in batches of 1024 the last one is half of the
# running mean and variance of every layer, in place of a thousandth; here the variance is 38 % too small.
# Whom it hurts: whoever updates with few, large batches after averaging (SWA, EMA, soups) or pruning, or on
# a subset. With hundreds of batches it is not seen. drop_last=True avoids it where the last batch may go.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.optim.swa_utils.update_bn.html,
# https://github.com/timgaripov/swa/issues/10 (the authors' momentum), https://github.com/pytorch/pytorch/pull/30559
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
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

print("torch", torch.__version__)
torch.manual_seed(0)
labels = torch.arange(1025) % 2
images = labels[:, None, None, None] + 0.3 * torch.randn(1025, 1, 1, 1) + 0.3 * torch.randn(1025, 1, 8, 8)


def updated(batch_size):
    norm = nn.BatchNorm2d(1)
    update_bn(DataLoader(TensorDataset(images, labels), batch_size), norm)
    mean, variance = float(norm.running_mean), float(norm.running_var)
    print(f"batches of {batch_size}: mean {mean:.3f}, variance {variance:.3f}")
    return mean, variance


print(f"expected: mean {float(images.mean()):.3f}, variance {float(images.var()):.3f}, or nearly")
print("seen, in", end=" ")
whole = updated(1025)
print("but in", end=" ")
halves = updated(1024)
images_but_one, last = images.split(1024)
assert abs(halves[0] - float(images_but_one.mean() + last.mean()) / 2) < 1e-4
assert abs(halves[1] - float(images_but_one.var() + last.var()) / 2) < 1e-4
assert abs(whole[1] - float(images.var())) < 1e-4 and halves[1] < 0.7 * whole[1]
PYTHON
