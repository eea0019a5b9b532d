"""What λ, stages and sparsity that are found on the way come to, beside those chosen beforehand.

``python -m benchmarks.choices reg --networks a/best_model.pt b/best_model.pt --data_path data``
prunes each trained MLP (one a seed, in the order of ``--seeds``) by LM, QM and OBD in 140 stages to
98.847 %, at nine fixed λ and at λ "auto", with statistics averaged over stages and without, and
prints by how much the loss over all training examples rises, beside the fixed λ of the lowest mean,
paired over the seeds with 95 % t-intervals, and the time beside that of the fixed ones.
``stages`` does it for 1 to 140 fixed stages and for "auto" with ceilings on the examples that are
read; ``budget`` finds the sparsity at which the validation error has risen by half a point, and
what a bisection finds that prunes anew for every sparsity.  Finished cells are kept in ``--out``.
``--arch VGG11 --networks vgg11.safetensors --dataset folder --data_path images.tar --stages 14
--regs 0 0.001 0.01 0.1`` does it with another network; one network stands for all seeds, which then
draw the examples alone, and ``--judged 5000`` takes the loss over so many of the training examples,
and as many at most of the validation examples.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from benchmarks.cells import Cells, Row, print_markdown
from benchmarks.defaults import T
from lossprune.data import Dataset, Split, load
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.experiment.stage_examples import StageExamples
from lossprune.networks import NETWORKS
from lossprune.pruning import prune_by_stage

SPARSITY = 0.98847
REGS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
COUNTS = (1, 3, 7, 14, 35, 70, 140)  # of stages; ceilings on the examples, in those of a stage
POINTS = 0.5  # of validation error
CRITERIA = ("LM", "QM", "OBD")


def some(split: Split, count: int | None) -> Split:
    """So many examples of a split, the same ones each time, of all classes; None: all of it."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split if count is None else split.take(order[:count])


class Case:
    """A trained network, its data, and what is measured of a pruning of it."""

    def __init__(self, path: Path, seed: int, given: argparse.Namespace) -> None:
        self.seed, self.examples, self.judged = seed, given.examples, given.judged
        self.dataset: Dataset = load(given.dataset, given.data_path, seed=seed)
        self.network: nn.Module = NETWORKS[given.arch]()
        weights, metadata, _ = read_network(path, "")
        load_weights_(self.network, given.arch, path, weights, metadata, "")
        self.network.eval()
        self.dense = self.loss(self.network)

    def loss(self, network: nn.Module) -> float:
        """The mean over the training examples that are judged."""
        total, judged = 0.0, some(self.dataset.train, self.judged)
        with torch.no_grad():
            for inputs, targets in self.dataset.batches(judged, 1000):
                total += float(F.cross_entropy(network(inputs), targets, reduction="sum"))
        return total / len(judged)

    def valid(self) -> list[Any]:
        return list(self.dataset.batches(some(self.dataset.valid, self.judged), 1000))

    def pruned(self, criterion: str, **asked: Any) -> tuple[lossprune.Mask, Row]:
        """The mask, and what came of it."""
        network = copy.deepcopy(self.network)
        examples = StageExamples(self.dataset, self.examples, self.seed)
        began, mask, count = time.perf_counter(), lossprune.Mask({}), 0
        stages = prune_by_stage(network, criterion, data=examples, examples=self.examples, **asked)
        for reached, _ in stages:
            mask, count = reached, count + 1
            examples.stage += 1
        seconds = time.perf_counter() - began
        rise = self.loss(mask.apply_(network)) - self.dense
        row = {"rise": rise, "seconds": seconds, "measured": count, "sparsity": mask.sparsity}
        return mask, row


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % t-interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def fill(cells: Cells, key: Row, make: Any) -> None:
    """Add a cell, unless it is there."""
    if not cells.find(**key):
        cells.add([{**key, **make()}])
        print(".", end="", flush=True)


def reg(cases: Sequence[Case], cells: Cells, given: argparse.Namespace) -> None:
    ways: list[Row] = [{"reg": reg, "average": 0.0} for reg in given.regs]
    ways += [{"reg": "auto", "average": average} for average in (0.0, 0.9)]
    for case in cases:
        for criterion in given.criteria:
            for way in ways:
                key = {"what": "reg", "seed": case.seed, "criterion": criterion, **way}
                asked = {"sparsity": given.sparsity, "stages": given.stages, **way}
                fill(cells, key, lambda c=case, m=criterion, a=asked: c.pruned(m, **a)[1])
    lines = []
    for criterion in given.criteria:
        found: dict[tuple[Any, float], list[Row]] = {
            (way["reg"], way["average"]): [
                cells.find(what="reg", seed=case.seed, criterion=criterion, **way)[0]
                for case in cases
            ]
            for way in ways
        }
        rises = {way: [row["rise"] for row in rows] for way, rows in found.items()}
        best = min(given.regs, key=lambda one: statistics.fmean(rises[one, 0.0]))
        # The time of fixed runs, of each seed the median over λ.
        fixed = [
            statistics.median(found[one, 0.0][k]["seconds"] for one in given.regs)
            for k in range(len(cases))
        ]
        for average in (0.0, 0.9):
            auto = found["auto", average]
            pairs = zip(rises["auto", average], rises[best, 0.0], strict=True)
            times = [row["seconds"] / base for row, base in zip(auto, fixed, strict=True)]
            lines.append(
                [
                    f"{criterion}, auto, average {average:g}",
                    interval(rises["auto", average]),
                    f"{best:g}: {statistics.fmean(rises[best, 0.0]):.3f}",
                    interval([one - other for one, other in pairs]),
                    f"{statistics.fmean(times):.2f} ({min(times):.2f} to {max(times):.2f})",
                ]
            )
    print_markdown(("", "rise of the loss", "best fixed λ", "auto − best", "× time of one"), lines)


def stages(cases: Sequence[Case], cells: Cells, given: argparse.Namespace) -> None:
    ways: list[Row] = [{"stages": count, "ceiling": 0} for count in COUNTS]
    ways += [{"stages": "auto", "ceiling": count} for count in COUNTS]
    lines = []
    for criterion in given.criteria:
        for way in ways:
            asked: Row = {"sparsity": given.sparsity, "stages": way["stages"]}
            if way["ceiling"]:
                asked["max_examples"] = way["ceiling"] * given.examples
            rows = []
            for case in cases:
                key = {"what": "stages", "seed": case.seed, "criterion": criterion, **way}
                fill(cells, key, lambda c=case, m=criterion, a=asked: c.pruned(m, **a)[1])
                rows += cells.find(**key)
            read = [row["measured"] * given.examples for row in rows]
            lines.append(
                [
                    f"{criterion}, {way['stages']}, at most {way['ceiling'] or way['stages']}",
                    f"{statistics.fmean(read):,.0f}",
                    interval([row["rise"] for row in rows]),
                    f"{statistics.fmean(row['seconds'] for row in rows):.1f}",
                ]
            )
    print_markdown(("", "examples read", "rise of the loss", "seconds"), lines)


def budget(cases: Sequence[Case], cells: Cells, given: argparse.Namespace) -> None:
    lines = []
    for criterion in given.criteria:
        for case in cases:
            key = {"what": "budget", "seed": case.seed, "criterion": criterion}
            fill(cells, key, lambda c=case, m=criterion: _budget(c, m, given.to))
            (row,) = cells.find(**key)
            lines.append(
                [
                    f"{criterion}, seed {case.seed}",
                    f"{100 * row['sparsity']:.2f} %",
                    f"{100 * row['bisected']:.2f} %",
                    f"{row['measured']} and {row['bisected_stages']}",
                    f"{row['seconds'] / row['bisected_seconds']:.3f}",
                ]
            )
    print_markdown(("", "sparsity", "bisected", "stages measured", "time"), lines)


def _budget(case: Case, criterion: str, to: float) -> Row:
    valid = case.valid()
    _, row = case.pruned(criterion, validation=valid, max_error_increase=POINTS)

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            wrong = sum(int((network(x).argmax(1) != y).sum()) for x, y in valid)
        return wrong / sum(len(y) for _, y in valid)

    began, limit = time.perf_counter(), error(case.network) + POINTS / 100
    low, high, measured = 0.0, 0.999, 0
    while high - low > to:
        middle = (low + high) / 2
        mask, found = case.pruned(criterion, sparsity=middle)
        measured += found["measured"]
        keeps = error(mask.apply_(copy.deepcopy(case.network))) <= limit + 1e-12
        low, high = (middle, high) if keeps else (low, middle)
    seconds = time.perf_counter() - began
    return {**row, "bisected": low, "bisected_stages": measured, "bisected_seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=("reg", "stages", "budget"))
    parser.add_argument("--networks", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1111, 1112, 1113, 1114, 1115])
    parser.add_argument("--arch", default="MLP", choices=NETWORKS)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--judged", type=int, help="training examples of the loss; default: all")
    parser.add_argument("--sparsity", type=float, default=SPARSITY)
    parser.add_argument("--regs", type=float, nargs="+", default=list(REGS))
    parser.add_argument("--to", type=float, default=1e-4, help="sparsity that a bisection is to")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--stages", type=int, default=140)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    more = {"reg": ("reg", "average"), "stages": ("stages", "ceiling"), "budget": ()}[given.what]
    out = given.out or Path(f"measurements/choices-{given.what}.json")
    cells = Cells(out, " ".join(sys.argv), ("what", "seed", "criterion", *more))
    networks = given.networks * len(given.seeds) if len(given.networks) == 1 else given.networks
    pairs = zip(networks, given.seeds, strict=False)
    cases = [Case(path, seed, given) for path, seed in pairs]
    {"reg": reg, "stages": stages, "budget": budget}[given.what](cases, cells, given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
