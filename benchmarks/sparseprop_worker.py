"""SparseProp's layers, timed on request by ``benchmarks.sparse_convolution``.

``PYTHON -m benchmarks.sparseprop_worker``, with the Python of an environment that has sparseprop,
reads a request of JSON a line and writes an answer a line:

* ``{"problem": FILE}`` makes the layer and answers how far each way to compute it is from what is
  expected;
* ``{"way": NAME, "direction": "forward", "threads": 1}`` answers seconds.

The ways are the layouts that SparseProp has.  *Over batch* is computed with the images of a batch
innermost: as it is called, with inputs and gradients that are copied into that layout, and in a
*chain* of such layers, where they lie in it already.  Its outputs come in that layout, and what
copies them back is not counted.  It is right for batches of a multiple of 8 alone, so others are
filled up.  *Over rows* is computed in torch's layout.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timed_layer import PADDING, Problem, TimedLayer, difference

LANES = 8  # images that are computed together


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    try:
        import sparseprop  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sys.exit(f"SparseProp cannot be imported: {error}")

    def answer(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer(version("sparseprop"))
    ways: dict[str, TimedLayer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "problem" in request:
            problem, expected = Problem.load(request["problem"])
            ways = ways_of(problem)
            answer({name: difference(way.results(), expected) for name, way in ways.items()})
        else:
            answer(ways[request["way"]].seconds(request["direction"], request["threads"]))


def ways_of(problem: Problem) -> dict[str, TimedLayer]:
    if problem.linear:
        return {"as called": linear(problem)}
    return {
        "over batch, as called": over_batch(problem, chain=False),
        "over batch, in a chain": over_batch(problem, chain=True),
        "over rows": over_rows(problem),
    }


def linear(problem: Problem) -> TimedLayer:
    from sparseprop.modules import SparseLinear  # pyright: ignore[reportMissingImports]

    dense = nn.Linear(*reversed(problem.weight.shape), bias=False)
    dense.weight.data.copy_(problem.weight)
    layer = SparseLinear.from_dense(dense)
    return TimedLayer(layer, layer.W_val, problem.x, problem.gradient, first=problem.first)


def over_batch(problem: Problem, *, chain: bool) -> TimedLayer:
    images = len(problem.x)
    x, gradient = filled(problem.x), filled(problem.gradient)
    if chain:
        x, gradient = batch_last(x), batch_last(gradient)
    layer = convolution(problem, over_rows=False)
    first = problem.first
    return TimedLayer(
        layer, layer.W_val, x, gradient, first=first, plain=lambda maps: maps[:images]
    )


def over_rows(problem: Problem) -> TimedLayer:
    layer = convolution(problem, over_rows=True)
    return TimedLayer(layer, layer.W_val, problem.x, problem.gradient, first=problem.first)


def convolution(problem: Problem, *, over_rows: bool) -> Any:
    from sparseprop.modules import SparseConv2d  # pyright: ignore[reportMissingImports]

    outputs, inputs, size, _ = problem.weight.shape
    dense = nn.Conv2d(inputs, outputs, size, padding=PADDING, bias=False)
    dense.weight.data.copy_(problem.weight)
    return SparseConv2d.from_dense(dense, vectorizing_over_on=over_rows)


def filled(maps: Tensor) -> Tensor:
    """With images of zeros up to a multiple of what is computed together."""
    return F.pad(maps, (0,) * 7 + (-len(maps) % LANES,))


def batch_last(maps: Tensor) -> Tensor:
    return maps.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


if __name__ == "__main__":
    main()
