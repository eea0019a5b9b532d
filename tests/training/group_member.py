"""One process of a group, for ``test_distributed.py``: RANK WORLD PORT OUT.

Trains in every way that the tests look at, alone or with the others, and saves what came out.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune.data import Dataset, Split, load
from lossprune.networks import NETWORKS
from lossprune.training import dense_training, make_optimizer
from lossprune.training.batch_norm import share_batch_norm_

ENTRIES = 7  # of the batches that batch norms are tried on; three processes take 2, 2 and 3


class InDouble(nn.Module):
    """A network in double precision on the float32 inputs that a data set gives."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.double()

    def forward(self, x):
        return self.network(x.double())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(examples, augmented=False, shape=(3, 8, 8)):
    """Images and labels without sense; every class is there."""
    images = torch.randint(256, (examples, *shape), generator=seeded(1), dtype=torch.uint8)
    split = Split(images, torch.arange(examples) % 3)
    return Dataset("noise", split, split, split, ("a", "b", "c"), (0.5,), (0.3,), 255.0, augmented)


def train(network, dataset, batch_size, epochs=2, mask=None):
    training = dense_training(network, dataset, "a test")
    optimizer = make_optimizer(network, lr=0.05, l2=1e-3)
    if mask is not None:
        mask.enforce(network, optimizer)
    losses = [
        training.train_epoch(optimizer, batch_size=batch_size, generator=seeded(epoch))
        for epoch in range(epochs)
    ]
    splits = (training.evaluate(split) for split in dataset.splits.values())
    evaluations = [number for found in splits for number in (found.loss, found.error)]
    return {
        "losses": torch.tensor(losses),
        "evaluations": torch.tensor(evaluations, dtype=torch.float64),
        **network.state_dict(),
    }


def masked_mlp():
    """1,297 examples: the last batch has 97, of which two processes take 48 and 49."""
    digits = load("digits", seed=1111)
    network = NETWORKS["MLP"](shape=digits.shape, generator=seeded())
    mask = lossprune.prune(network, "MP", sparsity=0.9).mask
    return train(network, digits, 100, mask=mask) | {"mask." + k: v for k, v in mask.items()}


def fewer_examples_than_processes():
    """Batches of two and one: some processes have nothing to do."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return train(InDouble(nn.Sequential(*layers)), noise(5), 2)


def augmented():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    return train(InDouble(nn.Sequential(*layers)), noise(37, augmented=True), 10)


def batch_norm_network():
    """The last batch has two examples: with three processes, one trains on none."""
    network = NETWORKS["PreActResNet18"](shape=(3, 8, 8), classes=3, generator=seeded())
    return train(InDouble(network), noise(26, augmented=True), 8)


def vgg():
    network = NETWORKS["VGG11BN"](shape=(3, 32, 32), classes=3, generator=seeded())
    return train(InDouble(network), noise(5, shape=(3, 32, 32)), 3, epochs=1)


def normalised(norm, x):
    """Two steps of a batch norm on this process's part: outputs, gradients, statistics."""
    holder = nn.Sequential(norm)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1:
        share_batch_norm_(holder)
    part = slice(len(x) * rank // world, len(x) * (rank + 1) // world)
    outputs, slopes = [], []
    for step in range(2):
        mine = (x + step)[part].clone().requires_grad_()
        outputs.append(holder(mine))
        weights = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)[part]
        F.mse_loss(outputs[-1], weights, reduction="sum").backward()
        slopes.append(mine.grad)
    gradients = {f"grad.{name}": p.grad for name, p in holder.named_parameters()}
    return {
        "share.outputs": torch.stack(outputs, 1).detach(),
        "share.slopes": torch.stack(slopes, 1),
        "evaluated": holder.eval()(x).detach(),
        **gradients,
        **holder.state_dict(),
    }


def norms():
    maps = torch.randn(ENTRIES, 4, 3, 2, dtype=torch.float64, generator=seeded(2)) * 3 + 5
    rows = torch.randn(ENTRIES, 4, dtype=torch.float64, generator=seeded(3))
    far = normalised(nn.BatchNorm2d(4), (maps + 4096).float())
    own = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        own.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        own.bias.copy_(torch.arange(4.0))
    return {
        "2d": normalised(own, maps),
        "1d": normalised(nn.BatchNorm1d(4).double(), rows),
        "average": normalised(nn.BatchNorm2d(4, momentum=None).double(), maps),
        "plain": normalised(nn.BatchNorm2d(4, affine=False).double(), maps),
        "untracked": normalised(nn.BatchNorm2d(4, track_running_stats=False).double(), maps),
        "two": normalised(nn.BatchNorm1d(4).double(), rows[:2]),
        "far": {name: far[name] for name in ("share.outputs", "0.running_mean", "0.running_var")},
    }


def outcomes():
    return {
        "masked mlp": masked_mlp(),
        "fewer examples than processes": fewer_examples_than_processes(),
        "augmented": augmented(),
        "batch norm": batch_norm_network(),
        "vgg": vgg(),
        "norms": norms(),
    }


def main(rank, world, port, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
    )
    torch.save(outcomes(), out)
    dist.destroy_process_group()
