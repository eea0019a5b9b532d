"""Test errors of ``benchmarks.sparse_convolution``: networks fine-tuned both ways."""

import copy
from typing import Any

import lossprune
from benchmarks import defaults
from benchmarks.convolution_epochs import WAYS, Loop
from lossprune.data import load

LR = 0.01


def seeds(count: int, epochs: int, sparsity: float) -> dict[str, Any]:
    """Test errors of a small residual network, fine-tuned both ways from one start a seed."""
    dataset = load("digits", seed=1111)
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    drift = 0.0
    for seed in range(count):
        case = defaults.trained(defaults.digits_resnet, dataset, seed, epochs=20)
        mask = lossprune.prune(case.network, "MP", sparsity=sparsity).mask
        network = mask.apply_(copy.deepcopy(case.network))
        scores = {}
        for way in WAYS:
            loop = Loop(way, network, mask, dataset, lr=LR)
            for epoch in range(epochs):
                loop.train(1000 * seed + epoch)
            (scores[way],) = loop.evaluate(("test",))
            errors[way].append(scores[way].error)
        dense, sparse = (scores[way] for way in WAYS)
        drift = max(drift, abs(sparse.loss - dense.loss) / dense.loss)
        print(f"seed {seed}: dense {dense}, sparse {sparse}", flush=True)
    pairs = zip(errors["sparse"], errors["dense"], strict=True)
    mean, low, high = defaults.interval([sparse - dense for sparse, dense in pairs])
    return {
        "sparsity": sparsity, "epochs": epochs, "errors": errors,
        "difference": {"mean": mean, "low": low, "high": high},
        "largest relative difference of the test loss": drift,
    }  # fmt: skip
