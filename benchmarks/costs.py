"""What a share of the multiply-adds costs, by the scope that finds it.

``python -m benchmarks.costs --networks vgg11.safetensors --data_path images.tar`` prunes a trained
VGG11 to a quarter and a tenth of its multiply-adds, by MP and QM, in three scopes: by saliency per
multiply-add, by saliency alone, and in proportion to the layers' sides, each cut to the same share.
It prints the sparsity, the loss and the error on test images right after pruning and after a short
fine-tuning of the weights that are left, mean ± standard deviation over the seeds (of the examples
that are drawn and of the order in fine-tuning) where there are several.  ``--arch PreActResNet18
--networks best_model.pt`` does it with another network; where one has running statistics, they are
estimated anew after each stage.  ``--tuned 10000 --judged 2000`` takes a part of the images.
Finished cells are kept in ``--out``.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from benchmarks.cells import Cells, Row, mean_and_std, print_markdown
from benchmarks.choices import Case, fill, some
from lossprune.experiment.stage_examples import StageExamples
from lossprune.networks import NETWORKS
from lossprune.pruning.norms import tracking_norms

SHARES = (0.25, 0.1)
SCOPES = ("multiply-adds", "global", "erdos-renyi-kernel")
CRITERIA = ("MP", "QM")


def tested(case: Case, network: nn.Module) -> tuple[float, float]:
    """Loss and error on the test images that are judged."""
    judged, loss, wrong = some(case.dataset.test, case.judged), 0.0, 0
    network.eval()
    with torch.no_grad():
        for inputs, targets in case.dataset.batches(judged, 500):
            outputs = network(inputs)
            loss += float(F.cross_entropy(outputs, targets, reduction="sum"))
            wrong += int((outputs.argmax(1) != targets).sum())
    return loss / len(judged), wrong / len(judged)


def tune_(case: Case, network: nn.Module, mask: lossprune.Mask, given: argparse.Namespace) -> None:
    """Train the weights that are left, for some epochs."""
    train = some(case.dataset.train, given.tuned)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=given.lr, momentum=0.9, weight_decay=given.weight_decay
    )
    generator = torch.Generator().manual_seed(case.seed)
    network.train()
    with mask.enforce(network, optimizer):
        for _ in range(given.nepochs):
            order = torch.randperm(len(train), generator=generator)
            for inputs, targets in case.dataset.batches(train, 128, order=order):
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()
                optimizer.step()


def cell(case: Case, criterion: str, scope: str, share: float, given: argparse.Namespace) -> Row:
    """One pruning, tested, and tested again after fine-tuning."""
    network = copy.deepcopy(case.network)
    examples = StageExamples(case.dataset, case.examples, case.seed)

    def next_examples(mask: lossprune.Mask, record: lossprune.StageRecord) -> None:
        examples.stage = record.stage + 1

    result = lossprune.prune(
        network,
        criterion,
        multiply_adds=share,
        scope=scope,
        data=examples,
        examples=case.examples,
        recalibrate="stages" if tracking_norms(network) else None,
        progress=False,
        on_stage=next_examples,
    )
    result.apply_(network)
    assert result.cost is not None
    loss, error = tested(case, network)
    tune_(case, network, result.mask, given)
    tuned_loss, tuned_error = tested(case, network)
    return {
        "sparsity": result.mask.sparsity,
        "left": result.cost.share,
        "loss": loss,
        "error": error,
        "tuned_loss": tuned_loss,
        "tuned_error": tuned_error,
    }


def print_table(cells: Cells, cases: list[Case], given: argparse.Namespace) -> None:
    lines = []
    for share in given.shares:
        for criterion in given.criteria:
            for scope in SCOPES:
                rows = [
                    row
                    for case in cases
                    for row in cells.find(**key_of(case, criterion, scope, share, given))
                ]
                sparsity = statistics.fmean(100 * row["sparsity"] for row in rows)
                lines.append(
                    [
                        f"{share:.0%}, {criterion}, {scope}",
                        f"{sparsity:.2f} %",
                        mean_and_std([row["loss"] for row in rows]),
                        mean_and_std([100 * row["error"] for row in rows]),
                        mean_and_std([row["tuned_loss"] for row in rows]),
                        mean_and_std([100 * row["tuned_error"] for row in rows]),
                    ]
                )
    header = ("", "sparsity", "loss", "error, %", "loss, tuned", "error, tuned, %")
    print_markdown(header, lines)


def key_of(case: Case, criterion: str, scope: str, share: float, given: argparse.Namespace) -> Row:
    return {
        "arch": given.arch,
        "seed": case.seed,
        "criterion": criterion,
        "scope": scope,
        "share": share,
        "nepochs": given.nepochs,
        "tuned": given.tuned,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--networks", type=Path, nargs="+", required=True, help="one, or one a seed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1111])
    parser.add_argument("--arch", default="VGG11", choices=NETWORKS)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--examples", type=int, default=1000, help="of a stage")
    parser.add_argument("--judged", type=int, help="test images; default: all")
    parser.add_argument("--tuned", type=int, help="training images of fine-tuning; default: all")
    parser.add_argument("--nepochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight_decay", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("measurements/costs.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = ("arch", "seed", "criterion", "scope", "share", "nepochs", "tuned")
    cells = Cells(given.out, " ".join(sys.argv), names)
    networks = given.networks * len(given.seeds) if len(given.networks) == 1 else given.networks
    cases = [Case(path, seed, given) for path, seed in zip(networks, given.seeds, strict=True)]
    for case in cases:
        loss, error = tested(case, case.network)
        print(f"seed {case.seed}, dense: loss {loss:.4f}, error {error:.2%}")
        for share in given.shares:
            for criterion in given.criteria:
                for scope in SCOPES:
                    key = key_of(case, criterion, scope, share, given)
                    asked = (case, criterion, scope, share, given)
                    fill(cells, key, lambda asked=asked: cell(*asked))
    print()
    print_table(cells, cases, given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
