#!/usr/bin/env bash
# SparseProp: a sparse convolution of a batch that is no multiple of eight.
#
# One would guess: a layer that is made of a dense one gives its outputs, for any number of images.
# What happens: in its usual layout, on maps at least four wide, the outputs of the images beyond the last
# whole eight are far off, without a word: of every four columns one gets its sum. Eight images are right.
# Whom it hurts: whoever trains by it with a loader that keeps a smaller last batch, and whoever evaluates one
# image: losses and accuracies are of other outputs than the network's.
# Source: https://github.com/IST-DASLab/sparseprop (release 0.1.14)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PATH="$venv/bin:$PATH" # its build calls the first pip and python3 on PATH
pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 scipy==1.17.1 pybind11==3.1.0 setuptools==84.2.1 wheel==0.48.0
pip install --quiet --disable-pip-version-check --no-cache-dir --no-build-isolation --no-deps sparseprop==0.1.14
cd "$folder"
python - <<'PYTHON'
from importlib.metadata import version

import torch
from sparseprop.modules import SparseConv2d
from torch import nn

print("torch", torch.__version__, "sparseprop", version("sparseprop"))
torch.manual_seed(0)
dense = nn.Conv2d(4, 4, 3, padding=1)
with torch.no_grad():
    dense.weight *= torch.rand_like(dense.weight) < 0.2
sparse = SparseConv2d.from_dense(dense)
print("expected: differences from the dense layer of rounding, for 8 images and for 5")
off = {}
for images in (8, 5):
    x = torch.randn(images, 4, 8, 8)
    with torch.no_grad():
        expected, found = dense(x), sparse(x)
    off[images] = float((found - expected).abs().max() / expected.abs().max())
print("seen: greatest difference, of the greatest output,", off)
assert off[8] < 1e-5 and off[5] > 0.1
PYTHON
