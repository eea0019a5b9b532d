"""Names of parameters: what wrappers put before them, and which was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches

# Modules that hold another one put their attribute's name into every parameter's name: compiled
# modules, sharded data parallel and activation checkpointing anywhere, ...
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# ... and data parallel at the top, by a word that is a name of its own elsewhere.
_IN_FRONT = "module"


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
    known: dict[str, list[str]] = {}
    for key in among:
        known.setdefault(without_wrappers(key), []).append(key)
    found: dict[str, str | None] = {}
    for name in names:
        keys = known.get(without_wrappers(name), [])
        found[name] = name if name in keys else keys[0] if len(keys) == 1 else None
    return found


def did_you_mean(name: str, among: Iterable[str]) -> str:
    """Return ``" (did you mean …?)"`` where a name is close, else nothing.

    >>> did_you_mean("fc1.weigth", ["fc1.weight", "fc2.weight"])
    " (did you mean 'fc1.weight'?)"
    """
    close = get_close_matches(name, list(among), n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return names joined by commas; of many, the first and how many more.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
