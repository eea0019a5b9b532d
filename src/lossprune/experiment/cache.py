"""What runs in one process may share, so that none of them computes it twice."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Cache:
    """Keeps the values last used, a limited number of each kind; without a limit it keeps none.

    Values are shared, so nobody may change them; a key holds all that determines its value.

    >>> cache = Cache({"square": 1})
    >>> cache.get("square", 3, lambda: 9), cache.get("square", 3, lambda: 0)
    (9, 9)
    """

    def __init__(self, limits: Mapping[str, int] | None = None) -> None:
        self._limits = dict(limits or {})
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value kept for this key, or make it and keep it."""
        limit = self._limits.get(kind, 0)
        kept = self._kept.setdefault(kind, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        if limit and len(kept) >= limit:
            kept.popitem(last=False)  # before making the next: they may be large
        value = make()
        if limit:
            kept[key] = value
        return value
