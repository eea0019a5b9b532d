"""One process of a group, for ``test_distributed.py``: RANK WORLD PORT OUT.

Does everything that the tests look at, and saves what came out.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import lossprune
from lossprune.pruning import PruningError
from lossprune.pruning.names import without_wrappers

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
    model, with_norms = network(), normalised()
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    loader = DataLoader(dataset(), batch_size=8, shuffle=True)
    lossprune.measure(model, loader)  # else refused, as they would differ
    lossprune.recalibrate(with_norms, loader)  # as well
    before = torch.get_rng_state()
    result = lossprune.prune(model, "LM", sparsity=0.5, data=loader, examples=10, stages=3)
    assert torch.equal(torch.get_rng_state(), before)
    return result


def dataset(examples=EXAMPLES):
    return TensorDataset(*(torch.cat(it)[:examples] for it in zip(*batches(), strict=True)))


def data_parallel():
    """One example at a time: the processes run the network different numbers of times."""
    model = nn.Sequential(*network(), nn.BatchNorm1d(5, dtype=torch.float64))
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    before = [id(it) for it in (*model.parameters(), *model.buffers())]
    data = batches()
    result = lossprune.prune(model, "QM", sparsity=0.5, data=data, examples=19, stages=2, memory=1)
    assert [id(it) for it in (*model.parameters(), *model.buffers())] == before
    mask = {without_wrappers(name): kept for name, kept in result.mask.items()}
    return {"mask": mask, "losses": [s.loss_after for s in result.stages]}


def divided():
    """What a sampler gives this process of 18 examples: every second or third; alone, all."""
    data = dataset(18)
    sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    return DataLoader(data, batch_size=4, sampler=sampler)


def measured_in_shares():
    return lossprune.measure(network(), divided(), sharded=True)


def pruned_in_shares(criterion):
    return lossprune.prune(
        network(), criterion, sparsity=0.9, data=divided(), examples=12, stages=2, sharded=True
    )


def failing():
    """The second process has too few examples; neither may wait for the other for ever."""
    data = batches() if dist.get_rank() == 0 else batches()[:1]
    for use in (
        lambda: lossprune.measure(network(), data, examples=EXAMPLES),
        lambda: lossprune.prune(network(), "LM", sparsity=0.5, data=data, examples=EXAMPLES),
        lambda: lossprune.recalibrate(normalised(), data, examples=EXAMPLES),
    ):
        with pytest.raises(PruningError, match=f"{EXAMPLES} examples were asked for"):
            use()


def refused():
    """Each process has other data than the next, and nothing says that it is its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = BatchSamplerShard(BatchSampler(range(EXAMPLES), 4, drop_last=False), world, rank)
    by_accelerate = DataLoader(dataset(), batch_sampler=shard)
    inputs, targets = batches()[0]
    unalike = [(inputs, (targets + rank) % 5)]
    for data, reason in (
        (divided(), "DistributedSampler has num_replicas="),
        (by_accelerate, "BatchSamplerShard has num_processes="),
        (unalike, "different data, their first batches show"),
        (iter(divided()), "different data, their first batches show"),
    ):
        with pytest.raises(PruningError, match=f"{reason}.* give sharded=True"):
            lossprune.measure(network(), data)
        with pytest.raises(PruningError, match=f"{reason}.* give sharded=True"):
            lossprune.recalibrate(normalised(), data)
    with pytest.raises(PruningError, match="DistributedSampler has num_replicas="):
        lossprune.prune(network(), "LM", sparsity=0.5, data=divided())
    share = [it[: 3 if rank else 2] for it in batches()[0]]
    with pytest.raises(PruningError, match=f"{3 * world} .*3 of them of this process,.* only 2"):
        lossprune.measure(network(), [share], examples=3 * world, sharded=True)


def normalised():
    """Layers that wait for all processes in training mode, and run on GPUs alone."""
    return nn.Sequential(
        *network(),
        nn.SyncBatchNorm(5, dtype=torch.float64),
        nn.Linear(5, 5, dtype=torch.float64),
        nn.SyncBatchNorm(5, dtype=torch.float64),
    )


def recalibrated(*, sharded):
    """With all batches; or with some, of which a process has more than another, or larger ones."""
    data = batches()
    if sharded and dist.is_initialized():
        data = data[dist.get_rank() :: dist.get_world_size()]
    model = lossprune.recalibrate(normalised(), data, sharded=sharded)
    return {name: value for name, value in model.named_buffers() if "running_" in name}


def pruned_and_recalibrated():
    return lossprune.prune(
        normalised(),
        "QM",
        sparsity=0.8,
        data=batches(),
        examples=19,
        stages=2,
        recalibrate="stages",
    )


def compensated(*, sharded):
    """With all batches, or with the share that a sampler gives."""
    model = network()
    with torch.no_grad():  # so that what fits some examples fits others
        data = [(inputs, model(inputs).argmax(1)) for inputs, _ in (*batches(), *batches())]
    if sharded and dist.is_initialized():
        data = data[dist.get_rank() :: dist.get_world_size()]
    settings = lossprune.Compensation(8, finish=1)
    result = lossprune.prune(
        model, "QM", sparsity=0.8, data=data, stages=2, sharded=sharded, compensate=settings
    )
    return {
        "weights": dict(result.weights),
        "dampings": [stage.compensation.damping for stage in result.stages],
        "moved": [stage.compensation.moved for stage in result.stages],
        "apart": [stage.compensation.apart for stage in result.stages],
    }


def scanned(*, sharded):
    data = divided() if sharded else batches()
    found = lossprune.sensitivity(network(), data, "EF-OBD", sparsities=(0.5, 0.9), sharded=sharded)
    return {"loss": found.loss, "examples": found.examples, "rows": found.rows()}


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
        **{criterion: plain(pruned(criterion)) for criterion in ("MP", "LM", "QM", "GraSP")},
        "data parallel": data_parallel(),
        "QM, recalibrated": plain(pruned_and_recalibrated()),
        "compensated": compensated(sharded=False),
        "compensated in shares": compensated(sharded=True),
        "sensitivity": scanned(sharded=False),
        "sensitivity in shares": scanned(sharded=True),
        "recalibrated": recalibrated(sharded=False),
        "recalibrated in shares": recalibrated(sharded=True),
        "in shares": plain(measured_in_shares()),
        **{
            f"{criterion} in shares": plain(pruned_in_shares(criterion))
            for criterion in ("QM", "EF-OBD", "GraSP", "SynFlow", "random")
        },
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
    refused()
    torch.save(outcomes(), out)
    dist.destroy_process_group()
