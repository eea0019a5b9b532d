"""What :mod:`benchmarks.equality` builds and deploys by the public names."""

import hashlib
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.equality_calls import Clock
from benchmarks.equality_pruning import convolutions, perceptron, save, seeded, write
from lossprune.deployment import count_live

_SHAPE = (3, 32, 32)


def digest(tensor: Tensor) -> list[Any]:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw.tobytes()).hexdigest()]


def networks() -> None:
    """Build every network: its tensors as digests, logits, and what a batch changes of it."""
    inputs = torch.randn(2, *_SHAPE, generator=seeded(1))
    for name, build in lossprune.networks.NETWORKS.items():
        network = build(shape=_SHAPE, classes=7, generator=seeded(2))
        # By name and settings: what a class that is not public is called is no result.
        modules = [[key, it.extra_repr()] for key, it in network.named_modules()]
        built = {key: digest(it) for key, it in network.state_dict().items()}
        found = {}
        with torch.no_grad():
            found["train"] = network.train()(inputs)
            found["eval"] = network.eval()(inputs)
        trained = {key: digest(it) for key, it in network.named_buffers()}
        save(f"logits-{name}", found)
        write(f"network-{name}", {"built": built, "trained": trained, "modules": modules})


def deployment() -> None:
    """Compact, deploy and save pruned networks; the command ``deploy`` exports one as well."""
    time.perf_counter = Clock()
    small = torch.randn(6, 1, 8, 8, generator=seeded(3))
    large = torch.randn(3, *_SHAPE, generator=seeded(4))
    deployed("perceptron", perceptron(), small, 0.95)
    deployed("convolutions", convolutions().eval(), small, 0.9)
    for name in ("VGG11BN", "PreActResNet18"):
        network = lossprune.networks.NETWORKS[name](
            shape=_SHAPE, classes=7, generator=seeded(5)
        ).eval()
        deployed(name, network, large, 0.99)


def deployed(name: str, network: nn.Module, inputs: Tensor, sparsity: float) -> None:
    mask = lossprune.prune(network, "MP", sparsity=sparsity).mask
    compaction = lossprune.compact(network, mask, inputs)
    save(f"{name}-compacted", compaction.model.state_dict())
    compaction.mask.save(f"{name}-compacted-mask.safetensors")
    told: dict[str, Any] = {
        "live": asdict(count_live(network, mask)),
        "layers": [asdict(it) for it in compaction.layers],
        "parameters": [compaction.parameters_before, compaction.parameters_after],
        "multiply_adds": [compaction.multiply_adds_before, compaction.multiply_adds_after],
        "left_dense": compaction.left_dense,
    }
    found = {}
    with torch.no_grad():
        found["compacted"] = compaction.model.eval()(inputs)
        for count in {len(inputs), 1 if inputs[0].numel() < 100 else len(inputs)}:
            fast = lossprune.deploy(network, mask, inputs[:count], seconds=0.05)
            found[f"deployed-{count}"], found[f"one-{count}"] = fast(inputs), fast(inputs[:1])
            told[f"deployed-{count}"] = [[asdict(it) for it in fast.layers], list(fast.notes)]
            told[f"state-{count}"] = {key: digest(it) for key, it in fast.state_dict().items()}
    save(f"{name}-outputs", found)
    for values in ("exact", "float16"):
        file = f"{name}-sparse-{values}.safetensors"
        lossprune.save_sparse(network, mask, file, values=values)
        told[f"loaded-{values}"] = lossprune.load_sparse(file, network) == mask
        save(f"{name}-loaded-{values}", network.state_dict())
    write(name, told)
