"""Two trees of lossprune: does whatever they compute agree to the bit?

``python -m benchmarks.equality COMMIT`` checks out COMMIT into a temporary folder, makes ten runs
with that tree and with this one, and compares what they leave: masks, weights, logs, records,
reports, deployed networks, and what the commands say.  Each command is a process of its own with
one thread; both trees go at once.  Left out are times, and what holds them
(:mod:`benchmarks.equality_files`).  The exit status is 1 if anything differs, 2 if the comparison
could not be made.

What depends on the machine's load is not left to it: ``lossprune.deploy`` finds a clock by which
every interval is a little shorter than the one before, so that it keeps the last of what it tries;
reports are made of records whose seconds are 0; a run that is killed at three moments is compared
when it has ended, and begun by COMMIT in both folders, so that this tree goes on with its files.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.equality_files import Comparison, compare
from benchmarks.equality_runs import ROOT, RUNS, Doing, FailedError, environment

SIDES = ("commit", "here")
MOST_SHOWN = 10  # differences of a run
TRAININGS = {"dense", "sparse", "compacted", "stacked", "distributed"}


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Give the tree of a commit, and take it away again."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)  # noqa: PLW1510
    if done.returncode:
        raise FailedError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def check_imported(tree: Path, folder: Path) -> None:
    """Raise if Python takes lossprune from elsewhere than the tree."""
    program = "import lossprune; print(lossprune.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(tree, folder),
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.stdout.strip() != str(tree / "src" / "lossprune" / "__init__.py"):
        raise FailedError(f"lossprune of {tree} is not imported: {found.stdout}{found.stderr}")


def compare_runs(names: Sequence[str], trees: Sequence[Path], work: Path) -> list[Comparison]:
    """Make the runs with both trees, and print a row for each."""
    doing, found = Doing(), []
    print(f"{'run':<26}{'files':>6}{'tensors':>9}{'seconds':>9}  result")
    with ThreadPoolExecutor(len(trees)) as pool:
        try:
            jobs = [
                [
                    pool.submit(one_run, doing, name, tree, trees[0], work / str(at) / side)
                    for tree, side in zip(trees, SIDES, strict=True)
                ]
                for at, name in enumerate(names)
            ]
            for at, (name, pair) in enumerate(zip(names, jobs, strict=True)):
                told = [job.result() for job in pair]
                result = compare(work / str(at) / "commit", work / str(at) / "here")
                failed = [f"{side}: {it}" for side, (_, it) in zip(SIDES, told, strict=True) if it]
                result.differences[:0] = failed
                print_row(name, result, max(taken for taken, _ in told))
                found.append(result)
        finally:
            doing.stop()
            pool.shutdown(cancel_futures=True)
    return found


def print_row(name: str, result: Comparison, seconds: float) -> None:
    """Print what came of a run, and below it what differs."""
    differ = result.differences
    told = f"{len(differ)} differ" if differ else "equal"
    print(f"{name:<26}{result.files:>6}{result.tensors:>9}{seconds:>9.1f}  {told}", flush=True)
    for line in differ[:MOST_SHOWN]:
        print(f"    {line}", flush=True)


def one_run(doing: Doing, name: str, tree: Path, begin: Path, folder: Path) -> tuple[float, str]:
    """Return the seconds that a run took, and how it failed."""
    began, error = time.perf_counter(), ""
    try:
        doing.do(name, tree, begin, folder)
    except FailedError as failed:
        error = str(failed)
    return time.perf_counter() - began, error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("commit")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=RUNS,
        default=list(RUNS),
        metavar="RUN",
        help=f"some of: {', '.join(RUNS)}",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="lossprune-equality-") as place:
            work = Path(place).resolve()
            with checkout(arguments.commit, work / "tree") as tree:
                for one in (tree, ROOT):
                    check_imported(one, work / "0" / "commit")
                print(f"{git('-C', str(tree), 'log', '-1', '--format=%h %s')}, and {ROOT}")
                found = compare_runs(arguments.only, (tree, ROOT), work)
    except FailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    ways = set().union(*(it.ways for it in found))
    different = sum(bool(it.differences) for it in found)
    missing = TRAININGS - ways if arguments.only == list(RUNS) else set()
    print(f"trained: {', '.join(sorted(ways))}")
    if missing:
        print(f"nothing was trained: {', '.join(sorted(missing))}")
    print(
        f"{different} of {len(found)} runs differ: {sum(it.files for it in found)} files, "
        f"{sum(it.tensors for it in found)} tensors, {time.perf_counter() - began:.0f} s"
    )
    return 1 if different or missing else 0


if __name__ == "__main__":
    sys.exit(main())
