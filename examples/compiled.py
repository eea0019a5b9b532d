"""Fine-tune with ``torch.compile``: the network and the optimizer's step (needs a C++ compiler)."""

import torch
import torch.nn.functional as F
from torch import nn

import lossprune

torch.manual_seed(0)
digits = lossprune.data.load("digits", seed=1111)
inputs, labels = digits.inputs(digits.train.images)[:1200], digits.train.labels[:1200]
batches = list(zip(inputs.split(100), labels.split(100), strict=True))
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

mask = lossprune.prune(model, "QM", sparsity=0.8, data=batches, stages=14).mask
mask.enforce(model, optimizer)  # before or after compiling: the parameters are the same
compiled, step = torch.compile(model), torch.compile(optimizer.step)
for _ in range(5):
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        step()

print(f"loss {loss.item():.3f}")
zeros = sum(int((weight == 0).sum()) for weight in (model[1].weight, model[3].weight))
print(f"{zeros} weights are exactly 0, {mask.removed} were removed")
