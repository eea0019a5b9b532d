"""Prune and fine-tune in several processes.

``torchrun --nproc_per_node 2 examples/distributed.py``
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lossprune


def main() -> None:
    """Prune, and fine-tune for ten epochs."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same network everywhere
    digits = lossprune.data.load("digits", seed=1111)
    inputs, labels = digits.inputs(digits.train.images)[:1200], digits.train.labels[:1200]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    # Every process gives the same network and data; they share the work and get the same mask.
    batches = list(zip(inputs.split(100), labels.split(100), strict=True))
    mask = lossprune.prune(network, "QM", sparsity=0.8, data=batches, stages=14).mask

    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mask.enforce(model, optimizer)  # the mask's names are those of the network inside
    for _ in range(10):
        for x, y in batches[rank::processes]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    zeros = sum(int((weight == 0).sum()) for weight in (network[1].weight, network[3].weight))
    print(
        f"process {rank} of {processes}: {zeros} weights are exactly 0, {mask.removed} were removed"
    )
    dist.barrier()  # none leaves while another still waits for it


dist.init_process_group("gloo")
main()  # what holds the group is gone when it ends
dist.destroy_process_group()
