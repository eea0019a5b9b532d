"""Right after pruning, with the weights that are left moved and without: what it is worth where.

``python -m benchmarks.compensation mnist --data_path data``, and so with ``vgg11 --weights
vgg11.safetensors --images images.tar``, ``batch_norm``, ``resnet20 --images images.tar`` and
``gpt2``, prints a table with the scores of each way to prune, and their mean differences from the
same stages without compensation and recalibration, paired by the seed, with 95 % t-intervals.

``--variants`` and ``--seeds`` choose a part; what is in the results is not done again, and
``--table`` prints them.
"""

import argparse
import statistics
import sys
import warnings
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.cells import Cells, Row, mean_and_std, print_markdown, words_of
from benchmarks.compensation_cases import CASES, DENSE, Case, Variant
from benchmarks.defaults import interval

NOTE = """
Right after pruning, mean ± standard deviation over the seeds. In brackets: the mean difference from
the same stages with nothing moved and its 95 % t-interval, paired by seed. "moves": compensation at
every stage moves the surviving weights ("prunable"), or biases and normalisations too ("all").
"batch norm": when running statistics are estimated anew. Stages draw fresh examples."""


def name_of(variant: Variant) -> str:
    """Such as QM-0.9-14-prunable-stages."""
    fields = variant.criterion, variant.sparsity, variant.stages, variant.compensation
    finish = f"+{variant.finish}" if variant.finish else ""
    return "-".join(map(str, fields)) + f"{finish}-{variant.recalibrate}"


def fill(cells: Cells, case: Case, given: argparse.Namespace) -> None:
    """Do what is not done yet."""
    wanted = [
        variant
        for variant in case.variants
        if any(fnmatch(name_of(variant), pattern) for pattern in given.variants)
    ]
    for seed in given.seeds:
        missing = [v for v in (DENSE, *wanted) if not cells.find(seed=seed, **asdict(v))]
        start = case.start(seed, given) if missing else None
        for variant in missing:
            scores = case.measure(start, variant, seed, given)
            how = {"examples": given.examples, "settings": given.compensation}
            row = {"seed": seed, **asdict(variant), **scores, **how}
            cells.add([row])
            print(row, file=sys.stderr, flush=True)


def print_table(case: Case, rows: list[Row]) -> None:
    print(NOTE)
    print(f"{case.about} n = {len({row['seed'] for row in rows})}.\n")
    lines = []
    for variant in (DENSE, *case.variants):
        mine = _by_seed(rows, variant)
        if not mine:
            continue
        beside = {} if variant == variant.as_trained else _by_seed(rows, variant.as_trained)
        how = [variant.criterion, f"{variant.sparsity:.4g}", str(variant.stages)]
        if variant == DENSE:
            how[1:] = ["", ""]
        finish = f" + {variant.finish}" if variant.finish else ""
        words = [variant.compensation + finish, variant.recalibrate]
        how += ["" if word == "none" else word for word in words]
        scores = [_score(mine, beside, name, factor) for name, (_, factor) in case.scores.items()]
        seconds = statistics.median(row["seconds"] for row in mine.values())
        lines.append([*how, *scores, f"{seconds:.1f}"])
    headings = (heading for heading, _ in case.scores.values())
    print_markdown(
        ("criterion", "sparsity", "stages", "moves", "batch norm", *headings, "s"), lines
    )


def _by_seed(rows: list[Row], variant: Variant) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if asdict(variant).items() <= row.items()}


def _score(mine: dict[int, Row], beside: dict[int, Row], name: str, factor: float) -> str:
    digits = 2 if factor > 1 else 3
    text = mean_and_std([factor * row[name] for row in mine.values()], digits)
    both = mine.keys() & beside.keys()
    if not both:
        return text
    mean, low, high = interval([factor * (mine[s][name] - beside[s][name]) for s in sorted(both)])
    limits = f", {low:+.{digits}f} to {high:+.{digits}f}" if len(both) > 1 else ""
    return f"{text} ({mean:+.{digits}f}{limits})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--variants", type=words_of(str), default=["*"], help="such as QM-0.9-*")
    parser.add_argument("--seeds", type=words_of(int), default=range(5), help="such as 0,1,2")
    parser.add_argument("--examples", type=int, help="a stage: 1000, of gpt2 128 rows")
    parser.add_argument(
        "--iterations", type=int, help="of compensation, if not as it is by default"
    )
    parser.add_argument("--fit_examples", type=int, help="that a compensation uses, if not all")
    parser.add_argument("--epochs", type=int, default=20, help="of training, and of fine-tuning")
    parser.add_argument("--steps", type=int, default=1000, help="of training gpt2")
    parser.add_argument("--scored", type=int, default=10_000, help="images of each split")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="of MNIST")
    parser.add_argument("--weights", type=Path, help="of VGG11")
    parser.add_argument("--images", type=Path, help="folder or archive of images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="measurements/compensation-CASE.json")
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    given.examples = given.examples or (128 if given.case == "gpt2" else 1000)
    asked = {"iterations": given.iterations, "examples": given.fit_examples}
    given.compensation = {name: value for name, value in asked.items() if value is not None}
    given.out = given.out or Path(f"measurements/compensation-{given.case}.json")
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # of the time that curvature takes
    key = ("seed", *asdict(DENSE))
    cells = Cells(given.out, f"python -m benchmarks.compensation {given.case}", key)
    if not given.table:
        fill(cells, CASES[given.case], given)
    print_table(CASES[given.case], cells.rows())


if __name__ == "__main__":
    main()
