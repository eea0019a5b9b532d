"""What takes time, with a commit and with this tree: measured in turn, in two processes.

``python -m benchmarks.side_by_side COMMIT`` starts one process with each tree.  For each piece of
work they take turns, a round each, and the table has the seconds of this tree over those of
COMMIT: the median over the rounds, with the least and the most.  A round is the median of several
calls.  Curvature, pruning, sparse, stacked and compacted training, compaction and deployment, by
the public names alone.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORK: dict[str, int] = {  # calls in a round
    "import lossprune.cli, in a new process": 5,
    "measure, VGG11, 40 images": 1,
    "measure, MLP, 1000 images": 5,
    "prune, MLP, QM, 14 stages": 1,
    "prune, MLP, EF-OBD, 14 stages": 1,
    "prune, VGG11, MP, 14 stages": 1,
    "sparse epoch, MLP, 10,000 images": 3,
    "stacked epoch, 4 MLPs, 2,000 images": 2,
    "compacted epoch, VGG11, 200 images": 1,
    "compact, VGG11": 2,
    "deploy, MLP": 2,
    "deploy, VGG11": 1,
    "call of deployed MLP, 1 image": 4000,
    "call of deployed VGG11, 1 image": 100,
    "call of deployed VGG11, 16 images": 20,
}


def prepared(name: str) -> Callable[[], Any]:
    """Return the work of that name, ready to be called."""
    if name.startswith("import"):
        return lambda: subprocess.run([sys.executable, "-c", "import lossprune.cli"], check=True)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(1)
    arch = "MLP" if "MLP" in name else "VGG11"
    if "epoch" in name:
        return epochs(name, arch)
    if name.startswith(("measure", "prune")):
        return curvature(name, arch)
    return deployment(name, arch)


def curvature(name: str, arch: str) -> Callable[[], Any]:
    import torch

    import lossprune

    network = lossprune.networks.NETWORKS[arch]()
    shape, count = ((1, 28, 28), 1000) if arch == "MLP" else ((3, 32, 32), 40)
    batches = [(torch.randn(20, *shape), torch.randint(10, (20,))) for _ in range(count // 20)]
    if name.startswith("measure"):
        return lambda: lossprune.measure(network, batches)
    criterion = name.split(", ")[2]
    data = None if criterion == "MP" else batches
    return lambda: lossprune.prune(network, criterion, sparsity=0.95, data=data, stages=14, seed=1)


def random_mask(network: Any, left: float) -> Any:
    import torch

    import lossprune
    from lossprune.pruning import prunable_weights

    weights = prunable_weights(network)
    return lossprune.Mask({key: torch.rand(w.shape) < left for key, w in weights.items()})


def channel_mask(network: Any, left: float) -> Any:
    """Without most input channels of every layer but the first, so that there is much to cut."""
    import torch

    import lossprune
    from lossprune.pruning import prunable_weights

    kept = {}
    for number, (key, weight) in enumerate(prunable_weights(network).items()):
        kept[key] = torch.rand(weight.shape) < 0.5
        if number:
            kept[key] &= (torch.rand(weight.shape[1]) < left).view(1, -1, *[1] * (weight.ndim - 2))
    return lossprune.Mask(kept)


def epochs(name: str, arch: str) -> Callable[[], Any]:
    import torch

    import lossprune
    from lossprune import training
    from lossprune.data import Dataset, Split

    shape = (1, 28, 28) if arch == "MLP" else (3, 32, 32)
    count = {"sparse": 10_000, "stacked": 2000, "compacted": 200}[name.split(maxsplit=1)[0]]
    split = Split(torch.randint(256, (count, *shape), dtype=torch.uint8), torch.arange(count) % 10)
    few = Split(split.images[:20], split.labels[:20])
    names, zeros, ones = tuple("0123456789"), (0.5,) * shape[0], (0.25,) * shape[0]
    data = Dataset("random", split, few, few, names, zeros, ones, augmented=False)
    networks = [lossprune.networks.NETWORKS[arch]() for _ in range(4 if "4" in name else 1)]
    left = 0.0115 if arch == "MLP" else 0.5
    masks = [(random_mask if arch == "MLP" else channel_mask)(each, left) for each in networks]
    optimizers = [training.make_optimizer(each, lr=0.001, l2=5e-4) for each in networks]
    for each, mask, optimizer in zip(networks, masks, optimizers, strict=True):
        mask.apply_(each)
        mask.enforce(each, optimizer)
    if name.startswith("stacked"):
        stack = training.StackedTraining(networks, masks, [data] * 4)
        generators = lambda: [torch.Generator().manual_seed(7) for _ in networks]  # noqa: E731
        return lambda: stack.train_epoch(optimizers, generators=generators())
    kind = training.SparseTraining if arch == "MLP" else training.CompactedTraining
    one = kind(networks[0], masks[0], data)
    return lambda: one.train_epoch(optimizers[0], generator=torch.Generator().manual_seed(7))


def deployment(name: str, arch: str) -> Callable[[], Any]:
    import torch

    import lossprune

    network = lossprune.networks.NETWORKS[arch]().eval()
    mask = random_mask(network, 0.012 if arch == "MLP" else 0.044)
    shape = (1, 28, 28) if arch == "MLP" else (3, 32, 32)
    example = torch.randn(16 if "16" in name else 1, *shape)
    if name.startswith("compact"):
        return lambda: lossprune.compact(network, mask, example)
    if name.startswith("deploy"):
        return lambda: lossprune.deploy(network, mask, example)
    deployed = lossprune.deploy(network, mask, example)
    return lambda: deployed(example)


def serve() -> None:
    """Do work as standard input names it, and answer with the seconds of a call."""
    works: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in works:
            works.clear()
            works[name] = prepared(name)
            works[name]()
        seconds = []
        for _ in range(WORK[name]):
            began = time.perf_counter()
            works[name]()
            seconds.append(time.perf_counter() - began)
        print(statistics.median(seconds), flush=True)


def compare(trees: list[Path], folder: Path, names: list[str], rounds: int) -> None:
    from benchmarks.equality_runs import environment

    command = [sys.executable, "-m", "benchmarks.side_by_side", "--serve"]
    pipe, servers = subprocess.PIPE, []
    for tree in trees:
        there = environment(tree, folder / "work" / tree.name)
        servers.append(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=there, cwd=folder)
        )
    print(f"{'':<42}{'before':>11}{'now':>11}  now / before (least to most of {rounds})")
    for name in names:
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for server, found in zip(servers, times, strict=True):
                server.stdin.write(f"{name}\n")  # pyright: ignore[reportOptionalMemberAccess]
                server.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
                found.append(float(server.stdout.readline()))  # pyright: ignore
        before, now = (statistics.median(found) for found in times)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        told = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:<42}{before:>11.3g}{now:>11.3g}  {told}", flush=True)
    for server in servers:
        server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="work whose name contains this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    from benchmarks.equality import checkout
    from benchmarks.equality_runs import ROOT

    with tempfile.TemporaryDirectory(prefix="lossprune-side-by-side-") as place:
        folder = Path(place).resolve()
        with checkout(arguments.commit, folder / "before") as tree:
            names = [name for name in WORK if arguments.only in name]
            compare([tree, ROOT], folder, names, arguments.rounds)


if __name__ == "__main__":
    main()
