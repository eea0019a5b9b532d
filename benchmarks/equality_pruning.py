"""What :mod:`benchmarks.equality` prunes by the public names: criteria, losses, masks."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lossprune
from lossprune.pruning import (
    ESTIMATORS,
    LOSSES,
    SCOPES,
    CrossEntropy,
    Scope,
    prune_by_stage,
    read_mask,
    remove_masks_,
    write_parametrizations_,
    write_torch_pruning_,
)

_VALUES = {"monte-carlo": ":5", "tolerance": ":0.01"}
_TOKENS = 30


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(count: int = 200) -> list[tuple[Tensor, Tensor]]:
    dataset = lossprune.data.load("digits", seed=1)
    train = dataset.train.take(torch.arange(count))
    return list(dataset.batches(train, 64))


def perceptron() -> nn.Module:
    return lossprune.networks.NETWORKS["MLP"](
        shape=(1, 8, 8), classes=10, hidden=(40, 24), generator=seeded(1)
    )


def convolutions() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, groups=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 10),
        )  # fmt: skip


def save(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, each with memory of its own."""
    save_file({key: it.detach().clone() for key, it in tensors.items()}, f"{name}.safetensors")


def write(name: str, values: Any) -> None:
    Path(f"{name}.json").write_text(json.dumps(values, indent=1))


def prune(name: str, network: nn.Module, criterion: Any, data: Any, **settings: Any) -> Any:
    """Prune, and write mask and stages."""
    settings = {"sparsity": 0.9, "stages": 3, "reg": 0.0, "seed": 3} | settings
    result = lossprune.prune(network, criterion, data=data, **settings)
    result.mask.save(f"{name}.safetensors")
    write(name, [[asdict(stage) for stage in result.stages], list(result.unused)])
    return result


def criteria() -> None:
    """Prune by all criteria, on both schedules, with and without penalty, in all scopes."""
    network, data = perceptron(), digits()
    for criterion in lossprune.CRITERIA:
        for schedule in ("linear", "exponential"):
            for reg in (0.0, 1e-2):
                name = f"{criterion}-{schedule}-{reg}"
                prune(name, network, criterion, data, examples=150, schedule=schedule, reg=reg)
        prune(f"{criterion}-convolutions", convolutions(), criterion, data, stages=2, examples=50)
    own = lossprune.Criterion("own", lambda theta, g, h: (g * theta) ** 2 + h, None, True, True)
    prune("own", network, own, data, schedule=[0.2, 0.5, 0.9], stages=None)
    shapes = Scope("own", lambda shape: float(shape[0]))
    for name, scope in {**dict.fromkeys(SCOPES), "own": shapes}.items():
        prune(f"scope-{name}", convolutions(), "QM", data, scope=scope or name, sparsity=0.8)
        prune(f"pattern-{name}", network, "QM", data, scope=scope or name, pattern="2:4",
              sparsity=0.5)  # fmt: skip
    prune("excluded", network, "OBD", data, exclude="first and last")
    prune("chosen", convolutions(), "LM", data, parameters=[nn.Conv2d, "9.*"], scope="layer")
    for estimator in ESTIMATORS:
        given = estimator + _VALUES.get(estimator, "")
        prune(f"estimator-{estimator}", network, "QM", data, estimator=given)
        torch.manual_seed(5)  # which it draws from
        found = lossprune.measure(convolutions(), data, estimator=given, examples=100)
        write_statistics(f"measured-{estimator}", found)
    further(network, data)
    masks(network, data)


def further(network: nn.Module, data: Any) -> None:
    """Go on from a mask, and from within a pruning; measure in little memory."""
    first = prune("first", network, "QM", data, sparsity=0.5)
    prune("second", network, "QM", data, start=first.mask)
    settings = {"sparsity": 0.9, "data": data, "stages": 4, "reg": 0.0}
    stages = [mask for mask, _ in prune_by_stage(network, "LM", **settings)]
    rest = prune_by_stage(network, "LM", **settings, start=stages[1], completed=2)
    for number, (mask, _) in enumerate(rest):
        mask.save(f"rest-{number}.safetensors")
    write_statistics("little", lossprune.measure(convolutions(), data, memory=1 << 20))
    for name, shape in {"VGG11": (3, 32, 32), "ResNet18": (3, 32, 32)}.items():
        made = lossprune.networks.NETWORKS[name](shape=shape, classes=4, generator=seeded(4))
        few = [(torch.randn(3, *shape, generator=seeded(5)), torch.arange(3))]
        write_statistics(f"measured-{name}", lossprune.measure(made, few))


def write_statistics(name: str, found: lossprune.Statistics) -> None:
    parts = {"gradient": found.gradient, "curvature": found.ggn_diagonal}
    save(name, {f"{part}/{key}": its[key] for part, its in parts.items() for key in its or ()})
    write(name, {"loss": float(found.loss)})


def masks(network: nn.Module, data: Any) -> None:
    """Hold a mask through optimizers, and hand it to torch and back."""
    mask = lossprune.prune(network, "MP", sparsity=0.8).mask
    for make in (torch.optim.SGD, torch.optim.Adam):
        trained = copy.deepcopy(network)
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make(trained.parameters(), lr=0.01, weight_decay=1e-3, **options)
        with mask.enforce(trained, optimizer):
            for inputs, targets in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(trained(inputs), targets).backward()
                optimizer.step()
        save(f"enforced-{make.__name__}", trained.state_dict())
    for write_ in (write_torch_pruning_, write_parametrizations_):
        theirs = copy.deepcopy(network)
        write_(theirs, mask)
        save(write_.__name__, theirs.state_dict())
        read_mask(theirs).save(f"{write_.__name__}-read.safetensors")
        remove_masks_(theirs)
        save(f"{write_.__name__}-removed", theirs.state_dict())
    write("layers", [asdict(it) for it in mask.layers()])


def losses() -> None:
    """Prune by QM and LM with all losses."""
    inputs = torch.randn(60, 8, 8, generator=seeded(6)).unsqueeze(1)
    real = torch.rand(60, 10, generator=seeded(7))
    tokens = torch.randint(_TOKENS, (20, 9), generator=seeded(8))
    labels = tokens.roll(1, dims=1).masked_fill(tokens < 5, -100)
    data = {
        "cross_entropy": [(inputs, real.argmax(1))],
        "mse": [(inputs, real)],
        "bce_with_logits": [(inputs, (real > 0.5).float())],
        "token_cross_entropy": [(tokens, labels)],
        "next_token": [(tokens, tokens)],
    }
    with torch.random.fork_rng():
        torch.manual_seed(9)
        reader = nn.Sequential(
            nn.Embedding(_TOKENS, 12), nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, _TOKENS)
        )
    for loss in LOSSES:
        network = reader if "token" in loss else perceptron()
        for criterion in ("QM", "LM"):
            prune(f"{loss}-{criterion}", network, criterion, data[loss], loss=loss)
    weighted = CrossEntropy(weight=torch.linspace(0.5, 2, 10), label_smoothing=0.1)
    prune("weighted", perceptron(), "QM", data["cross_entropy"], loss=weighted)
    prune("torch's own", perceptron(), "OBD", data["mse"], loss=nn.MSELoss())
