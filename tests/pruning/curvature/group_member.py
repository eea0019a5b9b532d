"""One process of a group, for ``test_distributed.py``: RANK WORLD PORT OUT.

Does everything that the tests look at, and saves what came out.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from lossprune.pruning import PruningError

EXAMPLES = 20  # shared by three processes as 6, 7 and 7


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5)
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 2, 5, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(5, (EXAMPLES,), generator=generator)
    return list(zip(inputs.split(8), targets.split(8), strict=True))


def measured():
    return lossprune.measure(network(), batches(), examples=19)


def pruned(criterion):
    return lossprune.prune(
        network(), criterion, sparsity=0.9, data=batches(), examples=19, stages=4, reg=1e-3
    )


def shuffled():
    model = network()
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    loader = DataLoader(
        TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True))),
        batch_size=8,
        shuffle=True,
    )
    before = torch.get_rng_state()
    result = lossprune.prune(model, "LM", sparsity=0.5, data=loader, examples=10, stages=3)
    assert torch.equal(torch.get_rng_state(), before)
    return result


def failing():
    """The second process has too few examples; neither may wait for the other for ever."""
    data = batches() if dist.get_rank() == 0 else batches()[:1]
    with pytest.raises(PruningError):
        lossprune.measure(network(), data, examples=EXAMPLES)


def one_example():
    """Fewer examples than processes: some have nothing to do."""
    inputs, targets = batches()[0]
    return lossprune.measure(network(), [(inputs[:1], targets[:1])])


def drawn():
    """How many of 1000 equally likely labels were drawn for six examples, which are all alike."""
    model = nn.Linear(1, 1000, bias=False)
    nn.init.zeros_(model.weight)
    data = [(torch.ones(6, 1), torch.zeros(6, dtype=torch.int64))]
    generator = torch.Generator().manual_seed(0)
    statistics = lossprune.measure(model, data, estimator="monte-carlo:1", generator=generator)
    # The mean over examples of (p − 1)² for a drawn label, of p² for another.
    return {
        "labels": int((statistics.ggn_diagonal["weight"] > 0.1).sum()),
        "generator": generator.get_state(),
    }


def plain(result):
    """As tensors and numbers that torch.load reads back without unpickling code."""
    if isinstance(result, lossprune.PruningResult):
        return {"mask": dict(result.mask), "losses": [s.loss_after for s in result.stages]}
    return {
        "loss": result.loss,
        "gradient": dict(result.gradient),
        "ggn_diagonal": dict(result.ggn_diagonal),
        "examples": result.examples,
    }


def outcomes():
    return {
        "measured": plain(measured()),
        "one example": plain(one_example()),
        "shuffled": plain(shuffled()),
        "drawn": drawn(),
        **{criterion: plain(pruned(criterion)) for criterion in ("MP", "LM", "QM")},
    }


def main(rank, world, port, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
    )
    failing()
    torch.save(outcomes(), out)
    dist.destroy_process_group()
