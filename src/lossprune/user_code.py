"""Functions that a flag names, as ``package.module:function``, and what goes wrong in them."""

import hashlib
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lossprune.pruning.criteria import Criterion
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import did_you_mean

# What is installed, Python's own modules and this library are nobody's own code.
_OTHERS = tuple(
    {
        str(Path(__file__).parent),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
)


class UsersCodeError(ValueError):
    """What the user's own code raised, as one sentence; the error itself is the cause."""


def find_function(named: str, what: str) -> Callable[..., Any]:
    """Return the function that ``named`` says, as ``package.module:function``.

    Modules are looked for as Python does, and in the working folder.

    Args:
        named: the name.
        what: what messages call it, such as ``"--data"``.

    Raises:
        ValueError: one sentence says what is not there, and what is close to it.
    """
    value = find_object(named, what)
    if not callable(value):
        raise ValueError(f"{what} {named} must be a function, it is {_a_kind_of(value)}")
    return value


def find_object(named: str, what: str) -> Any:
    """Return whatever ``named`` says, as :func:`find_function`."""
    module_name, _, attribute = named.partition(":")
    if not module_name or not attribute or module_name.endswith(".py"):
        raise ValueError(
            f"{what} must be MODULE:FUNCTION, such as mine.networks:build, got {named!r}"
        )
    value = _import(module_name, named, what)
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            close = did_you_mean(part, [name for name in dir(value) if not name.startswith("_")])
            raise ValueError(f"{what} {named}: {module_name} has no {part!r}{close}") from None
    return value


def find_criterion(named: str, what: str) -> Criterion:
    """Return the criterion that ``named`` says, called by that name, as :func:`find_function`."""
    value = find_object(named, what)
    if not isinstance(value, Criterion):
        raise ValueError(f"{what} {named} must be a lossprune.Criterion, it is {_a_kind_of(value)}")
    return replace(value, name=named)


def offering(
    function: Callable[..., Any], offered: Mapping[str, Any], named: str
) -> Callable[[], Any]:
    """Return a call of the function with those arguments offered that its signature names.

    Args:
        function: of the user.
        offered: arguments by name.
        named: what messages call it.

    Raises:
        ValueError: it needs others.

    >>> offering(lambda shape, depth=3: (shape, depth), {"shape": 8, "classes": 10}, "--arch a:b")()
    (8, 3)
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # it is not written in Python
        return function
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    taken = [name for name, one in parameters.items() if one.kind in either and name in offered]
    any_number = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    for name, one in parameters.items():
        if name not in taken and one.default is one.empty and one.kind not in any_number:
            raise ValueError(
                f"{named} needs an argument {name!r}: it can have {', '.join(offered)}, "
                "and others need a default"
            )
    return partial(function, **{name: offered[name] for name in taken})


def file_sha256(named: str) -> str | None:
    """Return the SHA-256 of the file of an imported module; None where it has none."""
    file = getattr(sys.modules.get(named.partition(":")[0]), "__file__", None)
    path = None if file is None else Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def call(function: Callable[[], Any], named: str, what: str) -> Any:
    """Return what the user's function returns.

    Raises:
        UsersCodeError: it raised an exception, or would have ended the process.
    """
    with _blaming(f"{what} {named}: it"):
        return function()


@contextmanager
def blaming_users_code() -> Iterator[None]:
    """Say of an error whether it is of the user's network, loss or forward function, and where.

    Raises:
        UsersCodeError: it is.
    """
    try:
        yield
    except (KeyboardInterrupt, UsersCodeError):
        raise
    except PruningError as error:
        cause: BaseException | None = error
        while isinstance(cause, PruningError):
            cause = cause.__cause__
        place = _place(cause)
        if place is None:
            raise
        raise UsersCodeError(f"{error} ({place}; --debug shows more)") from error
    except BaseException as error:  # the user's code may call sys.exit, or raise what it likes
        if _place(error) is None:
            raise
        raise _raised("your code", error) from error


class Batches:
    """The batches that a function returns, anew for every stage.

    What can be iterated again is kept; a generator is asked for anew each time.
    """

    def __init__(self, function: Callable[[], Any], named: str, what: str) -> None:
        self._function, self._named, self._what = function, named, what
        self._kept: Iterable[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        batches = self._kept
        if batches is None:
            batches = call(self._function, self._named, self._what)
            if not isinstance(batches, Iterable):
                raise ValueError(
                    f"{self._what} {self._named} must return an iterable of batches, "
                    f"it returned {_a_kind_of(batches)}"
                )
            if not isinstance(batches, Iterator):
                self._kept = batches
        with _blaming(f"{self._what} {self._named}: it"):
            yield from batches


def _import(module_name: str, named: str, what: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _raised(f"{what} {named}: importing it", error) from error
        nearby = [path.stem for path in Path().iterdir() if path.suffix == ".py" or path.is_dir()]
        raise ValueError(
            f"{what} {named}: no module {error.name!r} in {here} or among those installed"
            + did_you_mean(error.name, nearby)
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as SystemExit
        raise _raised(f"{what} {named}: importing it", error) from error


@contextmanager
def _blaming(who: str) -> Iterator[None]:
    """Take what is raised as an error of the user's code, but Ctrl-C and the end of a generator."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # as SystemExit
        raise _raised(who, error) from error


def _raised(who: str, error: BaseException) -> UsersCodeError:
    text = " ".join(str(error).split())
    place = _place(error)
    where = "--debug shows where" if place is None else f"{place}; --debug shows more"
    return UsersCodeError(
        f"{who} raised {type(error).__name__}{': ' if text else ''}{text} ({where})"
    )


def _place(error: BaseException | None) -> str | None:
    """Return the file and line of the user's code that the error comes from, the innermost."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not frame.filename.startswith(("<", *_OTHERS)):
                return f"{frame.filename}, line {frame.lineno}"
        error = error.__cause__  # Python turns a StopIteration into another error
    return None


def _a_kind_of(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
