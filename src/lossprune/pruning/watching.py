"""What a person hears of a pruning: progress on standard error, and warnings.

A warning names the line that has called the library, whenever it comes.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lossprune.progress import Progress, is_watched, shown_progress
from lossprune.pruning.curvature import distributed
from lossprune.pruning.pace import Forecast, LongPruningWarning
from lossprune.pruning.stages import MOST_NAMED, StageRecord, Stages

Warn = Callable[[Warning], None]

_QUIET = 2.0  # seconds of work of which nothing is shown unless asked for


def warn_of_what_is_left_out(stages: Stages, warn: Warn) -> None:
    """Say which matrices are not pruned, if any."""
    if stages.left_out:
        warn(UserWarning(f"{stages.told_left_out()}; {_taking_in(stages.left_out)}"))


def _taking_in(names: Sequence[str]) -> str:
    chosen = repr(["*", *names])
    if len(names) > MOST_NAMED:
        chosen = "['*', *(n for n, part in result.skipped.items() if part.kind == 'matrix')]"
    return f"parameters={chosen} takes them in; parameters='*' leaves them out and says no more"


def warn_of_the_first(stages: Stages, warn: Warn) -> None:
    """Say what the first stage has shown."""
    if stages.unused:
        names = list(stages.unused_modules)
        instead = f"exclude={names if len(names) <= MOST_NAMED else 'result.unused'}"
        warn(UserWarning(f"{stages.told_unused()}; {instead} leaves them out"))
    guess = stages.told_guess()
    if guess is not None:
        warn(UserWarning(guess))


def warning_here() -> Warn:
    """Return what warns, whenever it is, of the line that has called the caller.

    Of several processes one is enough.
    """
    if distributed.rank():
        return lambda warning: None
    frame = sys._getframe(2)
    place = {
        "filename": frame.f_code.co_filename,
        "lineno": frame.f_lineno,
        "module": frame.f_globals.get("__name__"),
        "registry": frame.f_globals.setdefault("__warningregistry__", {}),
    }
    # Not the frame itself, which would keep alive all that there is in it.
    return lambda warning: warnings.warn_explicit(warning, type(warning), **place)


def warning_of_long(warn: Warn) -> Callable[[Forecast], None]:
    """Return what warns of a pruning that will take long."""
    return lambda forecast: warn(LongPruningWarning(forecast.told()))


def shown(progress: bool | None) -> AbstractContextManager[Progress]:
    """Show progress as :func:`lossprune.prune` is asked to."""
    if distributed.rank():  # as well
        return shown_progress(False)
    if progress is None:
        return shown_progress(is_watched(), _QUIET)
    return shown_progress(progress)


def described(record: StageRecord) -> str:
    """Say how a stage went, what matters most first."""
    told = f"sparsity {record.sparsity:.4f}"
    if record.loss_before is None:
        return told
    return f"loss {record.loss_after:.4g}, {record.loss_before:.4g} before, {told}"


def check_watching(progress: Any, on_stage: Any) -> None:
    """Raise a ``ValueError`` unless these are what :func:`lossprune.prune` takes."""
    if progress not in (None, True, False):
        raise ValueError(f"progress must be True, False or None, got {progress!r}")
    if not (on_stage is None or callable(on_stage)):
        raise ValueError(f"on_stage must be a function of (mask, record), got {on_stage!r}")
