#!/usr/bin/env bash
# DeepSparse: two sparse linear layers after each other, for a few examples.
#
# One would guess: an engine gives the network's outputs, for every batch that it is compiled for.
# What happens: with 296 or 300 numbers between two sparse layers, and 8 to 32 examples, outputs differ from the
# network's by about as much as they are large, without a word. For 1 and for 64 examples they are right, with 304
# numbers (a multiple of 16) always, and where nothing is removed from the weights, too. The choice of instructions
# (NM_ARCH=avx2) changes nothing.
# Whom it hurts: whoever serves a pruned perceptron or a head of such layers in small batches, after a check at
# batch 1: the engine has no successor, and nobody mends it.
# Source: https://pypi.org/project/deepsparse/1.8.0/ (the last release; it runs on Python 3.8 to 3.11)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || "$(command -v python3.11 || command -v python3)" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check deepsparse==1.8.0 numpy==1.26.4 onnx==1.14.1 "setuptools<81"
cd "$folder"
export NM_DISABLE_ANALYTICS=1 NM_BIND_THREADS_TO_CORES=0
"$venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnx
from deepsparse import Engine
from onnx import TensorProto, helper, numpy_helper

print("deepsparse", version("deepsparse"), "onnx", onnx.__version__, "numpy", np.__version__)


def difference(between: int, batch: int, kept: float) -> float:
    """Of the engine's outputs from those in double precision, relative to the largest."""
    random = np.random.default_rng(0)
    sizes = 784, between, 100
    weights = []
    for inputs, outputs in ((sizes[0], sizes[1]), (sizes[1], sizes[2])):
        weight = random.standard_normal((outputs, inputs)) / np.sqrt(inputs * kept)
        weights.append((weight * (random.random(weight.shape) < kept)).astype(np.float32))
    first, second = (numpy_helper.from_array(weight, name) for weight, name in zip(weights, "ab"))
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, size])
        for name, size in (("x", 784), ("y", 100))
    )
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["sums"], transB=1),
        helper.make_node("Relu", ["sums"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "b"], ["y"], transB=1),
    ]
    graph = helper.make_graph(nodes, "perceptron", [x], [y], [first, second])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, "model.onnx")
    given = random.standard_normal((batch, 784)).astype(np.float32)
    expected = np.maximum(given.astype(float) @ weights[0].T, 0) @ weights[1].T
    found = Engine("model.onnx", batch_size=batch, num_cores=1).run([given])[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


print("expected: differences of rounding, about 1e-6, everywhere")
right, wrong = [], []
for between, kept in ((300, 0.2), (296, 0.2), (304, 0.2), (300, 1.0)):
    for batch in (1, 8, 16, 32, 64):
        found = difference(between, batch, kept)
        print(f"{between} between, {kept:.0%} kept, {batch:2} examples: {found:.1e}")
        hit = between != 304 and kept < 1 and 8 <= batch <= 32
        (wrong if hit else right).append(found)
assert max(right) < 1e-4, "what was right is not"
assert min(wrong) > 0.1, "it has changed: these are right now"
PYTHON
