"""``lossprune demo``: the published experiment in miniature, offline and in seconds."""

import contextlib
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossprune.commands import EXIT_OK
from lossprune.experiment import RunConfig, RunRecord
from lossprune.experiment.folder import BEST
from lossprune.flags import check_threads, flag
from lossprune.progress import Progress, Within, shown_progress
from lossprune.pruning.names import counted
from lossprune.text_table import print_table

TRAINING_EPOCHS, FINE_TUNING_EPOCHS = 60, 20
SPARSITY, STAGES = 0.95, (1, 14)
CRITERIA = ("MP", "LM", "QM", "OBD")
_COMMON = {"arch": "MLP", "dataset": "digits", "device": "cpu"}

_TITLE = "MLP on digits: training loss and test error before pruning, after it, and fine-tuned"
_COLUMNS = (
    *("criterion", "π"),
    *("loss before", "loss pruned", "loss fine-tuned"),
    *("error before", "error pruned", "error fine-tuned"),
    "sparsity",
)


@dataclass(frozen=True)
class DemoConfig:
    """Train a small network on the bundled digits, prune it by every criterion, fine-tune it.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    threads: int = flag(1, "threads", "CPU threads; for so small a network one is as fast")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_threads(self.threads)


def do(config: DemoConfig) -> int:
    """Train, prune by all criteria at both numbers of stages, fine-tune, and print a table."""
    with tempfile.TemporaryDirectory(prefix="lossprune-demo-") as folder, shown_progress() as told:
        records = _compute(Path(folder), config.threads, told)
    print_table(_TITLE, _COLUMNS, _rows(records), left=0, ruled=len(STAGES))
    print(_what_next())
    return EXIT_OK


def _compute(folder: Path, threads: int, progress: Progress) -> list[RunRecord]:
    from lossprune.experiment import run

    common: dict[str, Any] = {**_COMMON, "threads": threads, "path": folder}
    progress.note(f"training an MLP on 1,297 digits for {TRAINING_EPOCHS} epochs")
    dense = RunConfig(prune_epoch=-1, epochs=TRAINING_EPOCHS, **common)
    run(dense, Within(progress))
    progress.close("epoch")
    plan = [(criterion, stages) for criterion in CRITERIA for stages in STAGES]
    progress.note(f"pruning it in {len(plan)} ways, fine-tuning {FINE_TUNING_EPOCHS} epochs each")
    records = []
    progress.advance("way", 0, len(plan))
    for done, (criterion, stages) in enumerate(plan, start=1):
        config = RunConfig(
            criterion=criterion,
            stages=stages,
            exponential=True,
            sparsity=SPARSITY,
            epochs=FINE_TUNING_EPOCHS,
            start=dense.folder / BEST,
            **common,
        )
        records.append(run(config, Within(progress)))
        progress.close("epoch")
        loss = _losses(records[-1])[1]
        how = f"{criterion} in {counted(stages, 'stage')}"
        progress.advance("way", done, len(plan), f"{how}, training loss {loss:.3f} after pruning")
    return records


def _losses(record: RunRecord) -> list[float]:
    return [scores.train_loss for scores in _moments(record)]


def _moments(record: RunRecord) -> list[Any]:
    """Scores before pruning, after it, and of the best network after fine-tuning."""
    moments = (record.before_pruning, record.after_pruning, record.best)
    return [moment.scores for moment in moments if moment is not None]


def _rows(records: Sequence[RunRecord]) -> list[list[str]]:
    return [
        [
            record.config["pm"],
            str(record.config["pi"]),
            *(f"{loss:.3f}" for loss in _losses(record)),
            *(f"{scores.test_error:.1%}" for scores in _moments(record)),
            f"{record.sparsity:.4f}",
        ]
        for record in records
    ]


def next_commands() -> list[list[str]]:
    """Return the arguments of three commands worth trying next; the first needs no network."""
    prune = ["run", "--arch", "MLP", "--pm", "QM", "--pi", "140", "--exp", "--reg", "1e-3"]
    return [
        [*prune, "--dataset", "digits", "--pe", "40", "--nepochs", "60"],
        ["data", "mnist"],
        [*prune, "--pr", "0.98847", "--pe", "20", "--nepochs", "30"],
    ]


def _what_next() -> str:
    comments = (
        "the same in 140 stages with a step-size penalty, kept in results/",
        "MNIST, downloaded into data/ if it is not there",
        "the published network on MNIST: train, prune to 1.2 %, fine-tune",
    )
    lines = ["", "More stages make the loss model local: compare π 1 and 14. Next, try", ""]
    for comment, command in zip(comments, next_commands(), strict=True):
        lines += [f"  # {comment}", _in_lines(command)]
    return "\n".join(lines)


def _in_lines(arguments: Sequence[str]) -> str:
    """Return a command as a shell takes it, in lines that no terminal breaks."""
    text = textwrap.fill(
        shlex.join(arguments),
        width=70,
        initial_indent=f"  {_program()} ",
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text.replace("\n", " \\\n")


def _program() -> str:
    """How this program can be called again: by name, or by its path where it is not on PATH."""
    called = Path(sys.argv[0])
    if called.name != "lossprune" or shutil.which("lossprune") == str(called):
        return "lossprune"
    with contextlib.suppress(ValueError):
        called = called.absolute().relative_to(Path.cwd())
    return shlex.quote(str(called))
