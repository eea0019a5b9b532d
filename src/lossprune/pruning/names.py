"""Names: of parameters, what wrappers put before them and which was meant; how many, and lists."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from lossprune.spelling import nearest

T = TypeVar("T")

# Modules that hold another one put their attribute's name into every parameter's name: compiled
# modules, sharded data parallel and activation checkpointing anywhere, ...
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# ... and data parallel at the top, by a word that is a name of its own elsewhere.
_IN_FRONT = "module"
# PEFT puts a network into two modules, and a layer that it adapts into one: names that others use,
# so that they are looked through only where a name is not found otherwise.
_ADAPTED, ADAPTED_LAYER = ["base_model", "model"], "base_layer"


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has in the network itself, without what wraps it.

    >>> without_wrappers("module._orig_mod.layer.0.weight")
    'layer.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] == _IN_FRONT:
        del parts[0]
    return ".".join(parts)


def look_up(names: Iterable[str], among: Iterable[str]) -> dict[str, str | None]:
    """Return, of each name, which of ``among`` it is, or alone differs from by wrappers only.

    >>> look_up(["fc.weight", "conv.weight"], ["module.fc.weight", "module.fc.bias"])
    {'fc.weight': 'module.fc.weight', 'conv.weight': None}
    """
    names, among = list(names), list(among)
    found = _look_up(names, among, without_wrappers)
    missing = [name for name, key in found.items() if key is None]
    return found | _look_up(missing, among, _without_adapters)


def _look_up(
    names: Iterable[str], among: Iterable[str], plain: Callable[[str], str]
) -> dict[str, str | None]:
    known: dict[str, list[str]] = {}
    for key in among:
        known.setdefault(plain(key), []).append(key)
    found: dict[str, str | None] = {}
    for name in names:
        keys = known.get(plain(name), [])
        found[name] = name if name in keys else keys[0] if len(keys) == 1 else None
    return found


def _without_adapters(name: str) -> str:
    parts = [part for part in without_wrappers(name).split(".") if part != ADAPTED_LAYER]
    return ".".join(parts[2:] if parts[:2] == _ADAPTED else parts)


def did_you_mean(name: str, among: Iterable[str]) -> str:
    """Return ``" (did you mean …?)"`` where a name is close, else nothing.

    >>> did_you_mean("fc1.weigth", ["fc1.weight", "fc2.weight"])
    " (did you mean 'fc1.weight'?)"
    """
    close = nearest(name, among)
    return "" if close is None else f" (did you mean {close!r}?)"


def find_in(table: Mapping[str, T], name: str, what: str, otherwise: str = "") -> T:
    """Return the entry of that name.

    Raises:
        ValueError: there is none; the message lists those there are, and says what else will do.

    >>> find_in({"sgd": 1, "adam": 2}, "adam", "optimizer")
    2
    >>> find_in({"sgd": 1, "adam": 2}, "Adam", "optimizer")
    Traceback (most recent call last):
    ValueError: unknown optimizer 'Adam' (did you mean 'adam'?); choose one of: sgd, adam
    """
    if isinstance(name, str) and name in table:
        return table[name]
    hint = did_you_mean(name, table) if isinstance(name, str) else ""
    raise ValueError(f"unknown {what} {name!r}{hint}; choose one of: {', '.join(table)}{otherwise}")


def counted(count: int, one: str, several: str | None = None) -> str:
    """Return so many of something, in words.

    >>> counted(1, "run"), counted(1234, "run"), counted(2, "criterion", "criteria")
    ('1 run', '1,234 runs', '2 criteria')
    """
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return names joined by commas; of many, the first and how many more.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def together(some: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Return the outermost modules of which every name is among some, and the names left over.

    >>> together(["ema.a.weight", "ema.b.weight"], ["a.weight", "ema.a.weight", "ema.b.weight"])
    ('ema',)
    """
    gone = set(some)
    others = [name for name in every if name not in gone]
    found: dict[str, None] = {}
    for name in some:
        parts = name.split(".")
        heads = [".".join(parts[:count]) for count in range(1, len(parts))]
        alone = [h for h in heads if not any(other.startswith(f"{h}.") for other in others)]
        found[alone[0] if alone else name] = None
    return tuple(found)
