"""Right after pruning: the MLPNet on which one-shot pruning papers report, by sparsity.

``python -m benchmarks.oneshot --checkpoint mlpnet.safetensors --data_path data`` prunes the trained
network (784-40-20-10, no biases) and prints its accuracy on MNIST's test images right after, with
what it took in time and in examples: by magnitude, by QM, by both with the weights that are left
compensated at every stage, and, beside these, what plain fine-tuning of the pruned network comes to
with as many examples and with as much time.

``--rows``, ``--sparsities`` and ``--seeds`` choose a part; cells that are in ``--out`` are not done
again, so a long measurement can be stopped, and shared between processes that write one file.
``--table`` prints what is there.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.cells import Cells, Row, mean_and_std, print_markdown, words_of
from benchmarks.draws import Draws
from benchmarks.rivals import BATCH, GRID, SHORTEST, TRIAL, Examples, accuracy, tune
from lossprune.data import load

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
REG, FINISH = 0.01, 5


def _in_words(grid: Sequence[tuple[str, float]]) -> str:
    rates = {name: [f"{lr:g}" for kind, lr in grid if kind == name] for name in dict(grid)}
    return " and ".join(f"{name} {', '.join(values)}" for name, values in rates.items())


NOTE = f"""
Test accuracy in per cent right after pruning, mean ± standard deviation over the seeds. QM with
λ {REG}, exponential stages, fresh training images at each, one thread if not told otherwise.

moved: compensation MOVES THE SURVIVING WEIGHTS at each stage; +{FINISH}: and at {FINISH} more,
  which remove nothing. In rows without, the weights that are left are the dense network's.
again: the same examples at every stage.
tuned: the same stages' mask alone, then SGD or Adam on the surviving weights, batches of {BATCH};
  -examples: as many visits to examples as the moved+{FINISH} network of these stages read examples,
  -seconds: as many as fit into its time, that of the pruning included.
  Optimiser and learning rate are the best, on 5,000 training images apart, of
  {_in_words(GRID)},
  in trials of {TRIAL:.0%} of the budget, or {SHORTEST:,} visits if it is short, not counted here.
examples: read in all, every visit of a fine-tuning counted. s: wall time, median over the cells."""


class MLPNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


@dataclass(frozen=True)
class Method:
    """How a network is pruned, and what happens to the weights that are left."""

    criterion: str
    stages: int = 1
    examples: int = 0  # a stage
    after: str = ""  # moved, moved+5, tuned-examples, tuned-seconds
    fresh: bool = True  # whether each stage has others

    @property
    def name(self) -> str:
        examples = f"{self.examples}{'' if self.fresh else '-again'}"
        drawn = (str(self.stages), examples) if self.stages > 1 else ()
        return "-".join((self.criterion, *drawn, *(self.after,) * bool(self.after)))

    def but(self, after: str, criterion: str | None = None) -> "Method":
        return replace(self, criterion=criterion or self.criterion, after=after)

    @property
    def mask(self) -> "Method":
        """The mask that is fine-tuned."""
        return Method("MP") if self.criterion == "MP" else self.but("")


MOVED, FINISHED = "moved", f"moved+{FINISH}"
TUNED = ("tuned-examples", "tuned-seconds")
QM = {(pi, n): Method("QM", pi, n) for pi in (20, 60) for n in (1000, 4000)}
ROWS = (
    Method("MP"),
    *QM.values(),
    *(method.but(after) for method in QM.values() for after in (MOVED, FINISHED)),
    *(QM[20, 4000].but(after, "MP") for after in (MOVED, FINISHED)),
    *(Method("QM", 20, 1000, after, fresh=False) for after in (MOVED, FINISHED)),
    *(QM[pi, 4000].but(after, c) for pi in (20, 60) for after in TUNED for c in ("MP", "QM")),
)


@dataclass(frozen=True)
class Case:
    """The trained network, the images, and what is pruned: the same for all rows."""

    network: nn.Module
    train: Examples
    test: Examples
    sparsity: float
    seed: int

    def row(self, method: Method, network: nn.Module, mask: lossprune.Mask, **more: object) -> Row:
        """What came of it; the mask is exact, and no removed weight is other than 0."""
        weights = dict(network.named_parameters())
        assert mask.removed == round(mask.total * self.sparsity)
        assert not any(weights[name][~kept].any() for name, kept in mask.items())
        found = {"row": method.name, "sparsity": self.sparsity, "seed": self.seed}
        reached = {"accuracy": accuracy(network, self.test), "removed": mask.removed}
        return {**found, **reached, **more}

    def pruned(self, method: Method) -> tuple[nn.Module, lossprune.Mask, list[Row]]:
        """Network, mask and rows: a compensated pruning passes its 0 further stages on the way."""
        network, moves = copy.deepcopy(self.network), MOVED in method.after
        inputs, targets = self.train
        drawn = Draws(
            len(targets), method.examples, lambda i: (inputs[i], targets[i]), seed=self.seed
        )
        data = drawn if method.fresh else list(drawn)
        compensation = lossprune.Compensation(finish=FINISH) if moves else False
        stages = lossprune.prune_by_stage(
            network,
            method.criterion,
            sparsity=self.sparsity,
            data=data if method.examples else None,
            stages=method.stages,
            reg=0.0 if method.criterion == "MP" else REG,
            compensate=compensation,
        )
        rows, mask, seconds, done, began = [], lossprune.Mask({}), 0.0, 0, time.perf_counter()
        for done, (mask, _) in enumerate(stages, start=1):
            seconds += time.perf_counter() - began
            if done in (method.stages, method.stages + FINISH):
                mask.apply_(network)  # as it may be a copy whose weights nothing has moved
                after = FINISHED if done > method.stages else MOVED if moves else ""
                read = {
                    "seconds": seconds,
                    "examples": (done if method.fresh else 1) * method.examples,
                }
                rows.append(self.row(method.but(after), network, mask, **read))
            began = time.perf_counter()
        return network, mask, rows

    def tuned(self, method: Method, moved: Row) -> Row:
        """The row of the mask alone, fine-tuned with what ``moved`` took."""
        network, mask, (pruned,) = self.pruned(method.mask)
        left = {"visits": moved["examples"]}
        if method.after.endswith("seconds"):
            left = {"seconds": max(moved["seconds"] - pruned["seconds"], 0.0)}
        tuned = tune(network, mask, self.train, **left, seed=self.seed)
        return self.row(
            method,
            tuned.network,
            mask,
            seconds=pruned["seconds"] + tuned.seconds,
            examples=pruned["examples"] + tuned.visits,
            optimizer=tuned.optimizer,
            lr=tuned.lr,
        )


def fill(cells: Cells, case: Case, wanted: list[Method]) -> None:
    """Do what is not done yet."""
    here = {"sparsity": case.sparsity, "seed": case.seed}
    for method in wanted:
        if cells.find(row=method.name, **here):
            continue
        if "tuned" not in method.after:
            rows = case.pruned(method)[2]
        else:
            beside = QM[method.stages, method.examples].but(FINISHED)
            moved = cells.find(row=beside.name, **here)
            if not moved:
                raise SystemExit(f"{method.name} needs {beside.name} of the same cell first")
            rows = [case.tuned(method, moved[0])]
        cells.add(rows)
        for row in rows:
            print(row, file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    print(NOTE, "\n")
    sparsities = sorted({row["sparsity"] for row in rows})
    seeds = len({row["seed"] for row in rows})
    lines = []
    for method in ROWS:
        mine = [row for row in rows if row["row"] == method.name]
        if not mine:
            continue
        cells = [[r["accuracy"] for r in mine if r["sparsity"] == kappa] for kappa in sparsities]
        examples = statistics.median(row["examples"] for row in mine)
        seconds = statistics.median(row["seconds"] for row in mine)
        scores = (mean_and_std(cell) if cell else "" for cell in cells)
        lines.append([method.name, *scores, f"{examples:,.0f}", f"{seconds:.1f}"])
    header = (*(f"{kappa:.0%}" for kappa in sparsities), "examples", "s")
    print_markdown((f"n = {seeds}", *header), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("mlpnet.safetensors"))
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="of MNIST")
    names = "patterns of names, commas between: " + " ".join(method.name for method in ROWS)
    parser.add_argument("--rows", type=words_of(str), default=["*"], help=names)
    parser.add_argument("--sparsities", type=words_of(float), default=SPARSITIES)
    parser.add_argument("--seeds", type=words_of(int), default=range(5), help="such as 0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("measurements/oneshot.json"))
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    cells = Cells(given.out, "python -m benchmarks.oneshot", ("row", "sparsity", "seed"))
    if not given.table:
        measure(cells, given)
    print_table(cells.rows())


def normalised(images: Tensor) -> Tensor:
    return (images.flatten(1) / 255 - 0.1307) / 0.3081


def measure(cells: Cells, given: argparse.Namespace) -> None:
    from safetensors.torch import load_file

    torch.set_num_threads(given.threads)
    dataset = load("mnist", given.data_path, seed=0)
    parts = dataset.train, dataset.valid  # together all 60,000, as the network was trained
    images = torch.cat([part.images for part in parts])
    train = normalised(images), torch.cat([part.labels for part in parts])
    test = normalised(dataset.test.images), dataset.test.labels
    network = MLPNet().eval()
    network.load_state_dict(load_file(given.checkpoint))
    dense = accuracy(network, test)
    total = lossprune.Mask.dense(network).total
    print(f"dense: {dense:.2f} %, {total:,} weights, all prunable", flush=True)
    wanted = [m for m in ROWS if any(fnmatch(m.name, pattern) for pattern in given.rows)]
    for kappa in given.sparsities:
        for seed in given.seeds:
            fill(cells, Case(network, train, test, kappa, seed), wanted)


if __name__ == "__main__":
    main()
