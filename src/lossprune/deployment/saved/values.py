"""Values as JSON and back: frozen dataclasses by their annotations, and plain containers.

A file may say anything: what is read is of the annotated type, or refused by name.
"""

import dataclasses
import enum
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

_PLAIN = (bool, int, float, str, types.NoneType)
_LARGEST = 2**62
_DTYPES = ("float32", "float64", "int64", "int32", "bool")
_MAKE: Mapping[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "slice": lambda items: slice(*items),
}
_SLICE = "slice", 3
_TAG, _NAME = "is", "name"


def described(value: Any) -> Any:
    """Return a value of dataclasses, enumerations, mappings and tuples as JSON has it.

    >>> from lossprune.deployment.sparse.windows import MapNearest
    >>> described(MapNearest((2, 3)))
    {'is': 'MapNearest', 'factor': [2, 3]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {_TAG: type(value).__name__, **described(fields)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [described(item) for item in value]
    return value


def read(kind: Any, said: Any, where: str) -> Any:
    """Return what :func:`described` was given, which is of the type ``kind``.

    Fields that a dataclass has a default for may be missing.

    Raises:
        ValueError: it is not; the message begins with ``where``.
    """
    return _reader(kind)(kind, said, where)


def _reader(kind: Any) -> Callable[[Any, Any, str], Any]:
    origin = get_origin(kind)
    if kind is Any:
        return lambda _, said, __: said
    if dataclasses.is_dataclass(kind):
        return _read_fields
    if origin in (Union, types.UnionType):
        return _read_one_of
    if origin is tuple:
        return _read_tuple
    if origin is Mapping:
        return _read_names
    return _read_member if issubclass(kind, enum.Enum) else _read_plain


def _read_plain(kind: type, said: Any, where: str) -> Any:
    number = kind is float and type(said) is int
    if not (number or type(said) is kind) or (kind is int and not 0 <= said < _LARGEST):
        raise ValueError(f"{where} is {said!r:.40}, which is no {kind.__name__} that fits")
    return float(said) if number else said


def _read_member(kind: Any, said: Any, where: str) -> Any:
    if isinstance(said, str) and said in kind.__members__:
        return kind[said]
    raise ValueError(f"{where} is {said!r:.40}, which is no {kind.__name__} known here")


def _read_names(kind: Any, said: Any, where: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise ValueError(f"{where} has no names")
    _, item = get_args(kind)
    return {name: read(item, value, f"{where}, {name!r}") for name, value in said.items()}


def _read_fields(kind: Any, said: Any, where: str) -> Any:
    if not isinstance(said, dict) or said.get(_TAG) != kind.__name__:
        raise ValueError(f"{where} is no {kind.__name__}")
    hints, fields = get_type_hints(kind), {item.name: item for item in dataclasses.fields(kind)}
    if more := said.keys() - fields.keys() - {_TAG}:
        raise ValueError(f"{where} says {min(more)!r}, which is not known here")
    for name, item in fields.items():
        optional = (item.default, item.default_factory) != (dataclasses.MISSING,) * 2
        if name not in said and not optional:
            raise ValueError(f"{where} does not say its {name}")
    return kind(
        **{
            name: read(hints[name], value, f"{where}, {name}")
            for name, value in said.items()
            if name != _TAG
        }
    )


def _read_one_of(kind: Any, said: Any, where: str) -> Any:
    kinds: list[Any] = [one for one in get_args(kind) if one is not types.NoneType]
    if said is None and len(kinds) < len(get_args(kind)):
        return None
    if len(kinds) == 1:
        return read(kinds[0], said, where)
    named = {one.__name__: one for one in kinds}
    found = said.get(_TAG) if isinstance(said, dict) else None
    if not isinstance(found, str) or found not in named:
        raise ValueError(f"{where} is {found!r:.40}, which is not known here")
    return read(named[found], said, where)


def _read_tuple(kind: Any, said: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(said, list):
        raise ValueError(f"{where} is no list")
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(said)
    if len(kinds) != len(said):
        raise ValueError(f"{where} has {len(said)} items, not {len(kinds)}")
    pairs = zip(kinds, said, strict=True)
    return tuple(read(one, item, f"{where}, {k}") for k, (one, item) in enumerate(pairs))


def tree(value: Any, name: Callable[[Any], str | None] = lambda _: None) -> Any:
    """Return numbers, strings, types and names in containers as JSON has them.

    Args:
        value: of these.
        name: says the name that a leaf is; None where it is none.

    Raises:
        TypeError: it holds something else.

    >>> leaves(tree((1, ["a", {"b": None}]))) == (1, ["a", {"b": None}])
    True
    """
    named = name(value)
    if named is not None:
        return {_NAME: named}
    if type(value) in _PLAIN:
        return value
    kind, inside = _inside(value)
    if isinstance(inside, dict):
        return {kind: {key: tree(item, name) for key, item in inside.items()}}
    if isinstance(inside, list):
        return {kind: [tree(item, name) for item in inside]}
    return {kind: inside}


def _inside(value: Any) -> tuple[str, Any]:
    """Return the kind of a container and what it holds, as JSON has that."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):  # fx has its own
        return "list" if isinstance(value, list) else "tuple", list(value)
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return "dict", dict(value)
    if isinstance(value, slice):
        return "slice", [value.start, value.stop, value.step]
    if value is Ellipsis:
        return "ellipsis", None
    if isinstance(value, torch.dtype):
        return "dtype", str(value).removeprefix("torch.")
    raise TypeError(f"a {type(value).__name__}")


def leaves(said: Any, named: Callable[[str], Any] | None = None) -> Any:
    """Return what :func:`tree` was given; ``named`` makes a leaf of each name.

    Raises:
        ValueError: it is no such thing.
    """
    if type(said) in _PLAIN:
        return said
    if not isinstance(said, dict) or len(said) != 1:
        raise ValueError("a value is in no container that is known here")
    ((kind, inside),) = said.items()
    if kind == _NAME and named is not None and isinstance(inside, str):
        return named(inside)
    if isinstance(inside, list) and (kind in ("tuple", "list") or (kind, len(inside)) == _SLICE):
        return _MAKE[kind]([leaves(item, named) for item in inside])
    if kind == "dict" and isinstance(inside, dict):
        return {key: leaves(item, named) for key, item in inside.items()}
    if kind == "ellipsis" or (kind == "dtype" and inside in _DTYPES):
        return Ellipsis if kind == "ellipsis" else getattr(torch, str(inside))
    raise ValueError(f"a value is in a container {kind!r:.40}, which is not known here")
