"""Functions that a flag names, as ``package.module:function``, and what goes wrong in them."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lossprune.experiment.config import did_you_mean


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
    if not module_name or not attribute or named.endswith(".py"):
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


def call(function: Callable[[], Any], named: str, what: str) -> Any:
    """Return what the user's function returns.

    Raises:
        ValueError: it raised an exception, which is the cause.
    """
    try:
        return function()
    except Exception as error:
        raise _raised(named, what, error) from error


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
        try:
            yield from batches
        except GeneratorExit:
            raise
        except Exception as error:
            raise _raised(self._named, self._what, error) from error


def _import(module_name: str, named: str, what: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _raised(named, what, error, "importing it") from error
        nearby = [path.stem for path in Path().iterdir() if path.suffix == ".py" or path.is_dir()]
        raise ValueError(
            f"{what} {named}: no module {error.name!r} in {here} or among those installed"
            + did_you_mean(error.name, nearby)
        ) from None
    except (Exception, SystemExit) as error:
        raise _raised(named, what, error, "importing it") from error


def _raised(named: str, what: str, error: BaseException, doing: str = "it") -> ValueError:
    text = " ".join(str(error).split())
    return ValueError(
        f"{what} {named}: {doing} raised {type(error).__name__}{': ' if text else ''}{text} "
        "(--debug shows where)"
    )


def _a_kind_of(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
