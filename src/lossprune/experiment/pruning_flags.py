"""The flags of one run that say how its network is pruned, and what they need of one another.

No torch here: a wrong flag is answered at once.
"""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lossprune.experiment.flags_together import check_together
from lossprune.flags import (
    AUTO,
    MOST_EPOCHS,
    MOST_REG,
    check_auto,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_one_or_own,
    check_whole,
    flag,
    listed_names,
)
from lossprune.pruning.costs import share_gone
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS, find_estimator
from lossprune.pruning.patterns import final_sparsity, find_pattern
from lossprune.pruning.schedules import MOST_STAGES
from lossprune.pruning.scopes import SCOPES

RECALIBRATIONS = ("no", "stages", "end")
_LONGEST_NAMES = 80  # of what is named: it is part of a folder's name
_NAMES = re.compile(rf"(?=.{{1,{_LONGEST_NAMES}}}$)[\w.*?!\[\] -]+(,[\w.*?!\[\] -]+)*")


class Unsaid(float):
    """A number that stands where none is given."""


@dataclass(frozen=True)
class PruningFlags:
    """How the network of a run is pruned.

    Raises:
        ValueError: a value that its flag does not accept, or flags that do not go together.
    """

    sparsity: float | None = flag(
        Unsaid(0.956),
        "pr",
        "fraction of the weights to remove, in [0, 1); with --pattern what that says, and with "
        "--max_loss_increase or --max_error_increase, if not given, as much as these allow",
        "always",
    )
    criterion: str = flag(
        "MP",
        "pm",
        f"pruning criterion: {', '.join(CRITERIA)}; or MODULE:NAME of a lossprune.Criterion",
        "always",
    )
    stages: int | Literal["auto"] = flag(
        1, "pi", "number of pruning stages π; auto: as far each as its model holds", "always"
    )
    exponential: bool = flag(
        False, "exp", "remove the same fraction of what remains at each stage", "always"
    )
    prune_epoch: int = flag(
        0, "pe", "prune after this many epochs: 0 at the start, -1 never", "always"
    )
    reg: float | Literal["auto"] = flag(
        0.0, "reg", "step-size penalty λ on every saliency; auto: found at each stage", "always"
    )
    examples: int = flag(1000, "nex", "training examples to measure at each stage", "always")
    start: Path | None = flag(
        None,
        "model_0",
        "network to start from, such as a best_model.pt, or what lossprune prune wrote, of which "
        "removed weights stay removed; none: a new one",
        "always",
    )
    estimator: str = flag(
        "exact",
        "estimator",
        f"of the curvature: {', '.join(ESTIMATORS)}; a value may follow, as in monte-carlo:20",
        "changed",
    )
    scope: str | None = flag(
        None,
        "scope",
        f"which weights compete: {', '.join(SCOPES)}; the criterion's default",
        "asked",
    )
    pattern: str = flag(
        "unstructured", "pattern", "unstructured, or N:M such as 2:4, without --pr", "asked"
    )
    multiply_adds: float | None = flag(
        None,
        "multiply_adds",
        "instead of --pr: the share of the multiply-adds that is left, in (0, 1]",
        "asked",
    )
    parameters: str = flag(
        "all",
        "parameters",
        "which weights to prune: all, or names or patterns, joined by commas",
        "asked",
    )
    exclude: str = flag("none", "exclude", "which of them not, in the same way, or none", "asked")
    compensate: bool = flag(
        False,
        "compensate",
        "each stage also moves the weights that are left to where a second-order model has them",
        "asked",
    )
    finish: int = flag(
        0, "finish", "with --compensate: stages more that move weights at the final mask", "asked"
    )
    recalibrate: str = flag(
        "no",
        "recalibrate",
        "statistics of batch normalisation anew at the mask: no, stages (after each) or end",
        "asked",
    )
    average: float | None = flag(
        None,
        "average",
        "share kept of what earlier stages measured, in [0, 1); LM, QM: 0.9 with auto or budget",
        "asked",
    )
    tolerance: float | None = flag(
        None, "tolerance", "with --pi auto: nats that the model may be off; 0.1", "asked"
    )
    max_examples: int | None = flag(
        None, "max_examples", "with --pi auto: the most that all stages read together", "asked"
    )
    pruning_seconds: float | None = flag(
        None,
        "seconds",
        "with --pi auto: about how long all stages may take; what is pruned then depends on the "
        "machine",
        "asked",
    )
    max_loss_increase: float | None = flag(
        None, "max_loss_increase", "prune until the validation loss has risen by this", "asked"
    )
    max_error_increase: float | None = flag(
        None,
        "max_error_increase",
        "prune until the validation error has risen by so many percentage points",
        "asked",
    )

    def __post_init__(self) -> None:
        check_one_or_own("pm", self.criterion, CRITERIA, "MODULE:NAME")
        check_one_of("estimator", self.estimator.partition(":")[0], ESTIMATORS)
        try:
            find_estimator(self.estimator)
        except ValueError as error:
            raise ValueError(f"--estimator {self.estimator}: {error}") from None
        self._settle_scope()
        self._settle_sparsity()
        for name in ("parameters", "exclude"):
            object.__setattr__(self, name, _checked_names(name, getattr(self, name)))
        check_auto("pi", self.stages, "a whole number")
        if self.stages != AUTO:
            check_whole("pi", self.stages, 1, MOST_STAGES)
        check_whole("pe", self.prune_epoch, -1, MOST_EPOCHS)
        check_auto("reg", self.reg, "a number of at least 0")
        if self.reg != AUTO:
            check_not_negative("reg", self.reg, MOST_REG)
        check_whole("nex", self.examples, 1)  # the data set says how many there are
        check_one_of("recalibrate", self.recalibrate, RECALIBRATIONS)
        check_together(self)

    def _settle_scope(self) -> None:
        """Check the scope; one that the criterion takes anyway is not asked for."""
        if self.scope is None:
            return
        check_one_of("scope", self.scope, SCOPES)
        known = CRITERIA.get(self.criterion)
        if known is not None and self.scope == known.scope:
            object.__setattr__(self, "scope", None)

    def _settle_sparsity(self) -> None:
        """Check sparsity and pattern together; of one alone, take the other from it."""
        asked = None if isinstance(self.sparsity, Unsaid) else self.sparsity
        if asked is not None:
            check_fraction("pr", asked)
        if self.multiply_adds is not None:
            share_gone("--multiply_adds", self.multiply_adds)
            if asked is not None or self.pattern != "unstructured":
                raise ValueError("--multiply_adds is given instead of --pr and --pattern")
        try:
            pattern = find_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if pattern is not None:
            try:
                final_sparsity(asked, pattern)
            except ValueError:
                raise ValueError(
                    f"--pr {asked} with --pattern {pattern}: such a pattern removes "
                    f"{pattern.sparsity:g} of the weights; leave --pr out"
                ) from None
            settled = pattern.sparsity
        elif asked is None and (self.has_budget or self.multiply_adds is not None):
            settled = None
        elif self.sparsity is None:
            raise ValueError(
                "--pr None is for a pruning that --max_loss_increase or --max_error_increase ends, "
                "or --multiply_adds: give one of them, or a number in [0, 1)"
            )
        else:
            settled = float(self.sparsity)
        object.__setattr__(self, "sparsity", settled)

    @property
    def has_budget(self) -> bool:
        """Whether what the pruning costs ends it."""
        return self.max_loss_increase is not None or self.max_error_increase is not None

    @property
    def schedule(self) -> str:
        """The name of the pruning schedule, a key of :data:`lossprune.pruning.SCHEDULES`."""
        return "exponential" if self.exponential else "linear"

    @property
    def stages_in_all(self) -> int | None:
        """How many stages there are with those at the final mask; None: it is found on the way."""
        ends = self.sparsity is not None or self.multiply_adds is not None
        return stages_in_all(self.stages, self.finish, ends=ends)

    @property
    def prunes(self) -> bool:
        """Whether the run prunes at all."""
        return self.prune_epoch >= 0


def stages_in_all(stages: int | str, finish: int, *, ends: bool) -> int | None:
    """Return how many stages these flags make; None: it is found on the way.

    ``ends`` is whether a sparsity or a share of a cost says how far they go; a budget may end them
    before.
    """
    if isinstance(stages, str) or not ends:
        return None
    return stages + finish


def _checked_names(flag: str, names: str) -> str:
    """Return the names without spaces at commas; they become part of a folder's name.

    >>> _checked_names("exclude", "fc1, fc2*")
    'fc1,fc2*'
    """
    joined = ",".join(listed_names(names))
    if not _NAMES.fullmatch(joined):
        raise ValueError(
            f"--{flag} must be names of parameters or modules, or patterns of them, joined by "
            f"commas, of at most {_LONGEST_NAMES} signs, got {names!r}"
        )
    return joined
