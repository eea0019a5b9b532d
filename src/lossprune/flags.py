"""Flags: fields of a dataclass that the command line sets, and what their values may be.

No torch here: a wrong flag is answered at once.  Every bound is beyond anything that makes sense
and below what computing would choke on: a process that dies of a hundred thousand threads, or
minutes of silence over a billion stages.
"""

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import field
from typing import TypeVar, cast

T = TypeVar("T")

MOST_EPOCHS = 1_000_000
MOST_BATCH = 1_000_000
MOST_RUNS = 100_000  # of a plan: to list them takes seconds
MOST_REG = 1e30  # times θ² it is still a number in single precision

_CPUS = os.cpu_count() or 1
# A thread beyond the CPUs only waits for another.  Not fewer than a large machine has, as a run may
# be planned on a small one.
MOST_THREADS = max(256, 4 * _CPUS)
# A worker is a process with a torch of its own, on this machine.
MOST_WORKERS = max(16, 4 * _CPUS)


def flag(default: T, name: str, help: str, named: str = "never") -> T:  # noqa: A002
    """Return a dataclass field that is also a command-line flag.

    Args:
        default: its value where the flag is not given.
        name: the flag's spelling, without the dashes.
        help: one line for ``--help``.
        named: whether the flag is part of the run folder's name: ``"always"``, ``"changed"``
            (only where it differs from its default) or ``"never"``.
    """
    metadata = {"flag": name, "help": help, "named": named}
    return cast(T, field(default=default, metadata=metadata))


def check(flag: str, value: object, good: bool, accepted: str) -> None:
    """Raise a ValueError that says what ``--flag`` accepts, unless its value is ``good``."""
    if not good:
        raise ValueError(f"--{flag} must be {accepted}, got {value!r}")


def check_whole(flag: str, value: int | None, least: int, most: int | None = None) -> None:
    """Check a whole number; None stands for a flag that is not given."""
    if value is None:
        return
    if most is None:
        check(flag, value, value >= least, f"a whole number of at least {least}")
    else:
        check(flag, value, least <= value <= most, f"a whole number from {least} to {most:,}")


def check_not_negative(flag: str, value: float, most: float = math.inf) -> None:
    """Check a number that may be 0."""
    accepted = "a number of at least 0" if most == math.inf else f"a number from 0 to {most:,g}"
    check(flag, value, math.isfinite(value) and 0 <= value <= most, accepted)


def check_positive(flag: str, value: float, most: float = math.inf) -> None:
    """Check a number that may not be 0."""
    accepted = "a number greater than 0" + ("" if most == math.inf else f", at most {most:,g}")
    check(flag, value, math.isfinite(value) and 0 < value <= most, accepted)


def check_fraction(flag: str, value: float) -> None:
    """Check a sparsity."""
    check(flag, value, 0 <= value < 1, "a number in [0, 1)")


def check_seed(flag: str, value: int) -> None:
    """Check a seed; torch takes 64 bits, and an epoch's number is added."""
    check(flag, value, 0 <= value < 2**62, "a whole number from 0 to 2**62")


def check_threads(value: int | None) -> None:
    """Check a number of threads."""
    check_whole("threads", value, 1, MOST_THREADS)


def check_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Check that a value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"--{name} must be one of {', '.join(choices)}, got {value!r}"
            + did_you_mean(value, choices)
        )


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean …?"`` for the nearest known word, or nothing.

    >>> did_you_mean("VGG12", ["MLP", "VGG11"])
    '; did you mean VGG11?'
    """
    by_lower = {choice.lower(): choice for choice in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {prefix}{by_lower[near[0]]}?" if near else ""
