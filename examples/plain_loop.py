"""Prune a network and fine-tune it in a plain loop: ``python examples/plain_loop.py``."""

import torch
import torch.nn.functional as F
from torch import nn

import lossprune

torch.manual_seed(0)
digits = lossprune.data.load("digits", seed=1111)
inputs, labels = digits.inputs(digits.train.images), digits.train.labels
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
batches = [(inputs[rows], labels[rows]) for rows in torch.randperm(len(labels)).split(100)]


def train(epochs: int) -> float:
    """Train for some epochs and return the test error in percent."""
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return test_error()


@torch.no_grad()
def test_error() -> float:
    """Return the test error in percent."""
    wrong = model(digits.inputs(digits.test.images)).argmax(1) != digits.test.labels
    return 100 * wrong.double().mean().item()


print(f"trained       {train(20):5.1f} % test error")
result = lossprune.prune(model, "QM", sparsity=0.9, data=batches, examples=1000, stages=14)
result.mask.apply_(model)
print(f"pruned        {test_error():5.1f} %")
with result.mask.enforce(model, optimizer):
    print(f"fine-tuned    {train(20):5.1f} %")

zeros = sum(int((weight == 0).sum()) for weight in (model[1].weight, model[3].weight))
print(f"{zeros} weights are exactly 0, {result.mask.removed} were removed")
