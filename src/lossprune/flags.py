"""Flags: fields of a dataclass that the command line sets, how they are read, what they may be.

No torch here: a wrong flag is answered at once, in one sentence.  Every bound is beyond anything
that makes sense and below what computing would choke on: a process that dies of a hundred thousand
threads, or minutes of silence over a billion stages.
"""

import math
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from lossprune.spelling import nearest

T = TypeVar("T")

MOST_EPOCHS = 1_000_000
MOST_BATCH = 1_000_000
MOST_RUNS = 100_000  # of a plan: to list them takes seconds
MOST_REG = 1e30  # times θ² it is still a number in single precision

AUTO: Final = "auto"  # in the place of a number that is to be found
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
            (only where it differs from its default), ``"asked"`` (the same, and in the record too)
            or ``"never"``.
    """
    metadata = {"name": name, "help": help, "named": named}
    return cast(T, field(default=default, metadata=metadata))


@dataclass(frozen=True)
class Flag:
    """A flag as its dataclass declares it.

    Attributes:
        name: its spelling, without the dashes.
        field: what the code calls it.
        kinds: the types that a value may have, such as ``(int, NoneType)``; where ``str`` stands
            beside a number's, of all text the word ``auto`` alone.
        default, help, named: as :func:`flag` says.
    """

    name: str
    field: str
    kinds: tuple[type, ...]
    default: Any
    help: str
    named: str


@cache
def declared_flags(config: type) -> Mapping[str, Flag]:
    """Return the flags of a dataclass by their names, in its order."""
    hints = get_type_hints(config)
    declared = [
        Flag(
            field=item.name,
            kinds=_kinds(hints[item.name]),
            default=item.default,
            **item.metadata,
        )
        for item in fields(config)
    ]
    return {flag.name: flag for flag in declared}


def _kinds(hint: Any) -> tuple[type, ...]:
    kinds = get_args(hint) or (hint,)
    return tuple(str if get_origin(kind) is Literal else kind for kind in kinds)


def parse(config: type[T], words: Sequence[str]) -> T:
    """Return the dataclass with the flags that the words of a command line set.

    A value follows its flag or stands behind ``=``; a flag of a ``bool`` takes none.  Dashes in a
    name may stand for its underscores; nothing is abbreviated.  Of a flag given twice the last one
    counts, and ``--`` may end the line.

    Raises:
        ValueError: a flag is unknown, lacks its value, or has one that it does not accept.
    """
    flags = declared_flags(cast(type, config))
    values: dict[str, Any] = {}
    rest = iter(words[:-1] if words[-1:] == ["--"] else words)
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: flags begin with --")
        spelled, joined, text = word[2:].partition("=")
        name = spelled.replace("-", "_")
        if name not in flags:
            hint = did_you_mean(name, flags, "--") or "; see --help"
            raise ValueError(f"unknown flag --{spelled}{hint}")
        flag = flags[name]
        if bool in flag.kinds:
            if joined:
                raise ValueError(f"--{name} takes no value, got {text!r}")
            values[flag.field] = True
            continue
        if not joined:
            text = next(rest, "--")
            if text.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        values[flag.field] = _read(flag, text, apart=not joined)
    return config(**values)


def _read(flag: Flag, text: str, apart: bool) -> Any:
    """Return the value that a word says; ``apart``: it does not stand behind ``=``."""
    if NoneType in flag.kinds and text == "None":
        return None
    for kind, accepted in ((int, "a whole number"), (float, "a number")):
        if kind in flag.kinds:
            if str in flag.kinds and text == AUTO:
                return AUTO
            try:
                return kind(text)
            except ValueError:
                accepted += f" or {AUTO}" * (str in flag.kinds)
                raise ValueError(f"--{flag.name} must be {accepted}, got {text!r}") from None
    if apart and text.startswith("-") and text[1:2].isalpha():  # a flag of one dash, it seems
        raise ValueError("the flags could not be read; see --help")
    return Path(text) if Path in flag.kinds else text


def words_of(config: type, values: Mapping[str, Any]) -> list[str]:
    """Return the words that set these values, by field, on a command line; defaults are left out.

    >>> from lossprune.experiment import RunConfig
    >>> words_of(RunConfig, {"criterion": "QM", "stages": 14, "exponential": True, "lr": 0.01})
    ['--pm', 'QM', '--pi', '14', '--exp']
    """
    words: list[str] = []
    for flag in declared_flags(config).values():
        value = values.get(flag.field, flag.default)
        if value != flag.default:
            words += [f"--{flag.name}"] if value is True else [f"--{flag.name}", str(value)]
    return words


_KIND_NAMES = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", NoneType: "None"}
_MOST_COLUMNS = 100


def help_text(config: type, usage: str) -> str:
    """Return what ``--help`` says: usage, the first line of the docstring, every flag."""
    told = {"-h, --help": "show this help message and exit"}
    for flag in declared_flags(config).values():
        numeric = int in flag.kinds or float in flag.kinds
        names = _KIND_NAMES | ({str: AUTO} if numeric else {})
        kinds = "|".join(names[kind] for kind in flag.kinds if kind is not bool)
        told[f"--{flag.name} {kinds}".rstrip()] = flag.help + _default(flag)
    return "\n".join(
        [f"usage: {usage} [-h] [FLAGS]", "", *_to_width(first_line(config)), "", *entries(told)]
    )


def _default(flag: Flag) -> str:
    """A switch is off unless given, and what None does the help of a flag says."""
    return "" if flag.default is None or flag.default is False else f" (default: {flag.default})"


def entries(told: Mapping[str, str]) -> list[str]:
    """Return a line for each entry and what is told of it, which goes on below where it is long."""
    column = max(map(len, told)) + 4
    lines = []
    for entry, text in told.items():
        first, *others = _to_width(text, column)
        lines.append(f"  {entry:<{column - 2}}{first}")
        lines += [" " * column + line for line in others]
    return lines


def _to_width(text: str, taken: int = 0) -> list[str]:
    """Break a text into lines of the terminal's width, of which some columns are taken."""
    width = min(shutil.get_terminal_size().columns, _MOST_COLUMNS) - taken
    return textwrap.wrap(text, max(width, 20), break_on_hyphens=False)


def first_line(config: type) -> str:
    """Return what a command does: the first line of the docstring of its flags."""
    return (config.__doc__ or "").partition("\n")[0]


def check(flag: str, value: object, good: bool, accepted: str) -> None:
    """Raise a ValueError that says what ``--flag`` accepts, unless its value is ``good``."""
    if not good:
        raise ValueError(f"--{flag} must be {accepted}, got {value!r}")


def check_auto(flag: str, value: object, accepted: str) -> None:
    """Check that text in the place of a number is the word ``auto``."""
    if isinstance(value, str):
        check(flag, value, value == AUTO, f"{accepted} or {AUTO}")


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


_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


def read_bytes(flag: str, value: str) -> int:
    """Return a number of bytes, of which K, M, G and T are 2¹⁰, 2²⁰, 2³⁰ and 2⁴⁰.

    >>> read_bytes("memory", "1.5G")
    1610612736
    """
    found = _BYTES.fullmatch(value)
    size = 0
    if found:
        size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    check(flag, value, 1 <= size < 1 << 60, "a number of bytes of at least 1, such as 512M or 2G")
    return size


def listed_names(names: str) -> list[str]:
    """Return names that are joined by commas.

    >>> listed_names("fc1, conv*")
    ['fc1', 'conv*']
    """
    return [name.strip() for name in names.split(",")]


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


def check_one_or_own(name: str, value: str, choices: Iterable[str], own: str) -> None:
    """Check that a value is a choice, or names the user's own, which messages call ``own``.

    Nothing is imported here.

    >>> check_one_or_own("arch", "mine.models:build", ["MLP"], "MODULE:FUNCTION")
    >>> check_one_or_own("arch", "mine.py:build", ["MLP"], "MODULE:FUNCTION")
    Traceback (most recent call last):
    ValueError: --arch must be MODULE:FUNCTION, as Python imports it, got 'mine.py:build'
    """
    if ":" in value:
        module, _, attribute = value.partition(":")
        words = (*module.split("."), *attribute.split("."))
        good = all(map(str.isidentifier, words)) and not module.endswith(".py")
        if not good:
            raise ValueError(f"--{name} must be {own}, as Python imports it, got {value!r}")
        return
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"--{name} must be one of {', '.join(choices)}, or {own} of your own, got {value!r}"
            + did_you_mean(value, choices)
        )


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean …?"`` for the nearest known word, or nothing.

    >>> did_you_mean("VGG12", ["MLP", "VGG11"])
    '; did you mean VGG11?'
    """
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {prefix}{near}?"
