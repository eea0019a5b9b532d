"""Fine-tune under autocast, a gradient scaler and gradient accumulation."""

import torch
import torch.nn.functional as F
from torch import nn

import lossprune

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = torch.float16 if device == "cuda" else torch.bfloat16
digits = lossprune.data.load("digits", seed=1111).to(device)
inputs, labels = digits.inputs(digits.train.images), digits.train.labels
batches = list(zip(inputs.split(50), labels.split(50), strict=True))
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
scaler = torch.amp.GradScaler(device)

mask = lossprune.prune(model, "LM", sparsity=0.8, data=batches, examples=1000, stages=14).mask
mask.enforce(model, optimizer)  # once; the scaler calls optimizer.step() itself, or skips it
for _ in range(10):
    for number, (x, y) in enumerate(batches, start=1):
        with torch.autocast(device, dtype=precision):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss / 2).backward()
        if number % 2 == 0:  # a step for every two batches
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

print(f"loss {loss.item():.3f}")
zeros = sum(int((weight == 0).sum()) for weight in (model[1].weight, model[3].weight))
print(f"{zeros} weights are exactly 0, {mask.removed} were removed")
