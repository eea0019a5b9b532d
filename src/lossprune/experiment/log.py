"""What a person reads of a run: its log (``log.txt``), and lines about it.  No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

from lossprune.experiment.record import (
    EpochRecord,
    RunRecord,
    RunStatus,
    Scores,
)
from lossprune.experiment.stage_dict import predicted_change
from lossprune.pruning.names import counted

LOG_HEADER = "n\ttrain_l\ttrain_m\tvalid_l\tvalid_m\ttest_l\ttest_m\ttime"

# The published log's rows are counted from 0, and its training columns are means over the epoch's
# batches while the network was trained.  Ours are what every other column is: an evaluation.
_LOG_COMMENT = (
    "row n, counted from 0, is the network after epoch n + 1",
    "train_l and train_m are evaluations of it, as the other columns, without augmentation: "
    "not means over the epoch's batches in training mode",
)

_LONGEST = 1000  # line that is shown


def log_text(record: RunRecord) -> str:
    """Return the text of ``log.txt``: the published table, and comment lines around it."""
    pruned_at = None if record.after_pruning is None else record.after_pruning.epoch
    lines = [f"# {name}={value}" for name, value in record.config.items()]
    lines += [f"# start weights sha256 {record.start.weights_sha256}"]
    if record.start.removed:
        lines.append(f"# start: {_told_removed(record)}")
    pruning = [f"# {line}" for line in _pruning_lines(record)]
    lines += pruning if not record.epochs or pruned_at == 0 else []
    lines += [*(f"# {line}" for line in _LOG_COMMENT), LOG_HEADER]
    for row in record.epochs:
        lines.append(_log_line(row))
        lines += pruning if _log_pruning_after(record, row.epoch, pruned_at) else []
    if record.status != RunStatus.RUNNING:
        lines.append(f"# {record.status}" + (f": {record.message}" if record.message else ""))
        if record.best is not None:
            best = _epoch_and_row(record.best.epoch)
            lines.append(f"# best {best}: {describe(record.best.scores)}")
    return "\n".join(lines) + "\n"


def _told_removed(record: RunRecord) -> str:
    removed, prunable = record.start.removed, record.prunable
    return (
        f"{removed:,} of {prunable:,} weights were removed before the run and stay so "
        f"(sparsity {removed / prunable:.5f})"
    )


def _log_pruning_after(record: RunRecord, epoch: int, pruned_at: int | None) -> bool:
    at = record.epochs[-1].epoch if pruned_at is None else pruned_at
    return at > 0 and epoch == at


def _pruning_lines(record: RunRecord) -> list[str]:
    lines = []
    if record.before_pruning is not None:
        lines.append(f"before pruning: {describe(record.before_pruning.scores)}")
    lines += [describe_stage(stage, record.stages_in_all) for stage in record.stages]
    if record.after_pruning is not None:
        lines.append(f"after pruning: {describe(record.after_pruning.scores)}")
        lines += told_found(record.stages)
        lines.append(
            f"removed {record.removed} of {record.prunable}: sparsity {record.sparsity:.7f}"
        )
    lines += [
        f"training from {_epoch_and_row(way['from_epoch'])}: {way['mode']}, {way['reason']}"
        for way in record.training
    ]
    return lines


def in_words(scores: Scores) -> str:
    """Return the scores that a person follows, the one that matters most first."""
    return (
        f"validation error {scores.valid_error:.1%}, training loss {scores.train_loss:.3f}, "
        f"test error {scores.test_error:.1%}"
    )


def stage_in_words(stage: Mapping[str, Any]) -> str:
    """Return what came of one pruning stage; without data it has no losses."""
    before, after = stage["loss_before"], stage["loss_after"]
    sparsity = f"sparsity {stage['sparsity']:.5f}"
    if before is None and after is None:
        return sparsity
    predicted = predicted_change(stage)
    return (
        f"training loss {_number(before, '.4f')} -> {_number(after, '.4f')}"
        f"{_at_the_mask(stage, '.4f')}, {sparsity}"
        + ("" if predicted is None else f", predicted change {predicted:.4f}")
        + "".join(f", {found}" for found in _found_in(stage))
    )


def told_compensation(stages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what compensation did over all stages, in one line; None where there was none."""
    steps = [stage["compensation"] for stage in stages if "compensation" in stage]
    if not steps:
        return None
    moved = sum(step["moved"] for step in steps)
    return (
        f"surviving weights were moved in {moved} of {counted(len(steps), 'stage')}: training loss "
        f"{_number(stages[-1]['loss_after'])} after the last one, "
        f"{_number(steps[-1]['loss_without'])} at its mask alone"
    )


def told_found(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what stages found on their way, a line each: how many, λ, and what a budget left."""
    told = []
    if stages and "taken_back" in stages[0]:
        back = sum(len(stage["taken_back"]) for stage in stages)
        told.append(f"{counted(len(stages), 'stage')}, {counted(back, 'longer one')} taken back")
    regs = [stage["reg"] for stage in stages if "reg" in stage]
    if regs:
        low, high = f"{min(regs):.3g}", f"{max(regs):.3g}"
        told.append(f"λ {low if low == high else f'from {low} to {high}'}, chosen at each stage")
    points = [point for stage in stages for point in stage.get("points", ())]
    if points:
        dense = points[0]
        reached = next(p for p in reversed(points) if p["removed"] == stages[-1]["removed"])
        line = f"validation loss {dense['loss']:.4f} before pruning, {reached['loss']:.4f} after"
        if dense["error"] is not None:
            line += f"; validation error {dense['error']:.2%} before, {reached['error']:.2%} after"
        told.append(line)
    return told


def describe(scores: Scores) -> str:
    """Return the six scores in one line, named as the columns of the log."""
    names = LOG_HEADER.split("\t")[1:-1]
    values = vars(scores).values()
    return " ".join(f"{name} {value:.5f}" for name, value in zip(names, values, strict=True))


def describe_stage(stage: Mapping[str, Any], stages: int | None) -> str:
    """Return what happened in one pruning stage, in one line and without its time."""
    predicted = predicted_change(stage)
    number = stage["stage"] if stages is None else f"{stage['stage']}/{stages}"
    return (
        f"stage {number}: sparsity {stage['sparsity']:.5f} "
        f"loss {_number(stage['loss_before'])} -> {_number(stage['loss_after'])}"
        f"{_at_the_mask(stage)} "
        f"predicted change {'none' if predicted is None else format(predicted, '.5f')}"
        + "".join(f" {found}" for found in _found_in(stage))
    )


def _found_in(stage: Mapping[str, Any]) -> list[str]:
    """What a stage came to: of a cost, of λ, and how often it was longer and taken back."""
    found = []
    if "cost" in stage:
        found.append(f"{stage['cost']:.2%} of the cost left")
    if "reg" in stage:
        found.append(f"λ {stage['reg']:.3g}")
    if stage.get("taken_back"):
        found.append(f"{counted(len(stage['taken_back']), 'longer one')} taken back")
    return found


def _at_the_mask(stage: Mapping[str, Any], form: str = ".5f") -> str:
    """The loss before the weights that are left moved, where they were to."""
    step = stage.get("compensation")
    return f" ({_number(step['loss_without'], form)} at the mask alone)" if step else ""


def legible(text: str) -> str:
    r"""Return a line of somebody's text as any terminal, file and library takes it.

    Control characters and halves of characters become question marks, and a long line is cut.

    >>> legible("red: \x1b[31m")
    'red: ?[31m'
    """
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(sign if sign.isprintable() else "?" for sign in cut)


def _number(value: float | None, form: str = ".5f") -> str:
    """JSON has no NaN: a loss that was not finite is null there."""
    return "nan" if value is None else format(value, form)


def summarise(record: RunRecord) -> str:
    """Return what came of a run, in a few lines."""
    lines = [f"{record.status} in {record.seconds:.1f} s"]
    if record.start.removed:
        lines.append(_told_removed(record))
    if record.before_pruning is not None and record.after_pruning is not None:
        before, after = record.before_pruning.scores, record.after_pruning.scores
        lines.append(
            f"pruned {record.removed:,} of {record.prunable:,} weights "
            f"(sparsity {record.sparsity:.5f}): training loss {before.train_loss:.4f} -> "
            f"{after.train_loss:.4f}, test error {before.test_error:.2%} -> {after.test_error:.2%}"
        )
    if (moves := told_compensation(record.stages)) is not None:
        lines.append(moves)
    if record.after_pruning is not None:
        lines += told_found(record.stages)
    if record.best is not None:
        best = record.best.scores
        lines.append(
            f"best epoch {record.best.epoch}: training loss {best.train_loss:.4f}, "
            f"validation error {best.valid_error:.2%}, test error {best.test_error:.2%}"
        )
    return "\n".join(lines)


def _log_line(row: EpochRecord) -> str:
    scores = (f"{value:.5f}" for value in vars(row.scores).values())
    return "\t".join([str(row.epoch - 1), *scores, f"{row.seconds:.2f}"])


def _epoch_and_row(epoch: int) -> str:
    """Name an epoch in the log; epoch 0, before all training, has no row there."""
    return f"epoch {epoch} (n {epoch - 1})" if epoch else "epoch 0"
