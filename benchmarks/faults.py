"""Damaged files of a run: is every changed byte refused in one sentence, or without effect?

``python -m benchmarks.faults`` makes runs on the bundled digits, finished and interrupted in three
places, changes 200 times a bit or a stretch of bytes of each of their files, and goes on with the
run, or reads the file as the commands do.  What comes of it is what comes without the damage, or
it is refused in one sentence; anything else is silently wrong, or a traceback, and the exit status
is 1.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lossprune
from benchmarks.hardware import hardware, write_json
from lossprune.cli import main as lossprune_main
from lossprune.experiment import RunConfig, run
from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD, RunFolder
from lossprune.experiment.network_file import read_network
from lossprune.networks import NETWORKS
from lossprune.progress import Silent
from lossprune.report.reading import read_results

REFUSED, SAME, SILENT, TRACEBACK = "refused", "same", "silent", "traceback"
SPARSE = "network.safetensors"


@dataclass(frozen=True)
class Case:
    """A file of a folder, and what is done with it.

    Attributes:
        name: what the table calls it.
        folder: copied before each damage.
        file: that is damaged.
        use: gives what comes of the folder; raises a ValueError of one sentence.
    """

    name: str
    folder: Path
    file: str
    use: Callable[[Path], Any]


class Stopping(Silent):
    """Ends a run as Ctrl-C would when it tells that so many steps of a kind are done."""

    def __init__(self, what: str, done: int) -> None:
        self.what, self.done = what, done

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
        if (what, done) == (self.what, self.done):
            raise KeyboardInterrupt


def cases(work: Path) -> Iterator[Case]:
    """Make the runs, and give what can be damaged of them."""
    config = RunConfig(
        arch="MLP",
        dataset="digits",
        epochs=8,
        prune_epoch=4,
        sparsity=0.9,
        criterion="QM",
        stages=14,
        examples=100,
        lr=0.05,
        threads=1,
        path=work / "finished",
    )
    run(config)
    folder = config.folder
    yield Case("finished", folder, RECORD, lambda it: RunFolder(it).settled())
    yield Case("finished, reported", folder, RECORD, reported)
    yield Case("finished", folder, BEST, lambda it: read_network(it / BEST))
    yield Case("finished", folder, LAST, lambda it: read_network(it / LAST))
    yield Case("finished", folder, MASK, lambda it: lossprune.Mask.load(it / MASK))
    yield sparse_case(work, folder)
    for name, stop in {
        "before pruning": ("epoch", 4),
        "while pruning": ("stage", 7),
        "fine-tuning": ("epoch", 8),
    }.items():
        interrupted = replace(config, path=work / name.replace(" ", "-"))
        with contextlib.suppress(KeyboardInterrupt):
            run(interrupted, Stopping(*stop))
        for file in (CHECKPOINT, RECORD, BEST, MASK, LOG):
            if (interrupted.folder / file).exists():
                yield Case(
                    f"interrupted {name}", interrupted.folder, file, partial(resumed, config)
                )


def sparse_case(work: Path, finished: Path) -> Case:
    network = NETWORKS["MLP"](shape=(1, 8, 8))
    mask = lossprune.Mask.load(finished / MASK)
    (work / "sparse").mkdir()
    lossprune.save_sparse(network, mask, work / "sparse" / SPARSE)

    def loaded(folder: Path) -> Any:
        other = NETWORKS["MLP"](shape=(1, 8, 8))
        return lossprune.load_sparse(folder / SPARSE, other), other.state_dict()

    return Case("sparse file", work / "sparse", SPARSE, loaded)


def reported(folder: Path) -> Any:
    results = read_results(folder)
    return results.runs.drop(columns="folder").to_csv()


def resumed(config: RunConfig, folder: Path) -> Any:
    """Go on with a run by the command line, and return what it leaves but for times."""
    there = replace(config, path=folder.parent)
    here = folder.rename(there.folder)
    flags = {"arch": "MLP", "dataset": "digits", "nepochs": 8, "pe": 4, "pr": 0.9, "pm": "QM"}
    flags |= {"pi": 14, "nex": 100, "lr": 0.05, "threads": 1, "path": there.path}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = lossprune_main(["run", *words])
    if status:
        said = told.getvalue().splitlines()
        error = said[-1].removeprefix("error: ")
        if len(said) > 2 or error == said[-1] or "--debug" in error:
            raise AssertionError(told.getvalue())
        raise ValueError(error)
    record = without_times(json.loads((here / RECORD).read_text()))
    log = [line.rsplit("\t", 1)[0] for line in (here / LOG).read_text().splitlines()]
    return record, log, [(here / name).read_bytes() for name in (BEST, LAST, MASK)]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def damaged(contents: bytes, generator: random.Random) -> bytes:
    """Flip a bit, or put zeros over a stretch of up to 64 bytes."""
    while True:
        changed, place = bytearray(contents), generator.randrange(len(contents))
        if generator.random() < 0.75:
            changed[place] ^= 1 << generator.randrange(8)
        else:
            stretch = changed[place : place + generator.randrange(2, 65)]
            changed[place : place + len(stretch)] = bytes(len(stretch))
        if changed != contents:
            return bytes(changed)


def outcome(case: Case, changed: bytes, reference: Any, work: Path) -> str:
    """Return what comes of the case with this file."""
    try:
        found = used(case, changed, work)
    except ValueError as error:
        sentence = str(error)
        return REFUSED if "\n" not in sentence and len(sentence) < 500 else TRACEBACK
    except Exception:
        return TRACEBACK
    return SAME if equal(found, reference) else SILENT


def used(case: Case, contents: bytes, work: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=work) as place:
        folder = Path(place) / "run"
        shutil.copytree(case.folder, folder)
        (folder / case.file).write_bytes(contents)
        return case.use(folder)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def count(case: Case, damages: int, seed: int, work: Path) -> Counter[str]:
    """Damage the file so many times, and count what comes of it."""
    whole = (case.folder / case.file).read_bytes()
    reference = used(case, whole, work)
    generator = random.Random(f"{seed} {case.name} {case.file}")
    return Counter(
        outcome(case, damaged(whole, generator), reference, work) for _ in range(damages)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--damages", type=int, default=200, help="of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("measurements/faults.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    kinds = (REFUSED, SAME, SILENT, TRACEBACK)
    print(json.dumps(hardware()))
    print(f"{'run':<30}{'file':<22}{'bytes':>9}" + "".join(f"{kind:>11}" for kind in kinds))
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        for case in cases(work):
            counts = count(case, arguments.damages, arguments.seed, work)
            size = (case.folder / case.file).stat().st_size
            print(
                f"{case.name:<30}{case.file:<22}{size:>9,}"
                + "".join(f"{counts[kind]:>11}" for kind in kinds),
                flush=True,
            )
            row = {"run": case.name, "file": case.file, "bytes": size}
            rows.append({**row, **{kind: counts[kind] for kind in kinds}})
    bad = sum(row[SILENT] + row[TRACEBACK] for row in rows)
    seconds = time.perf_counter() - began
    write_json(arguments.out, {"seed": arguments.seed, "seconds": seconds, "files": rows})
    print(f"{bad} of {arguments.damages * len(rows)} silently wrong or a traceback")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
