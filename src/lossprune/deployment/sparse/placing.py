"""Where the values of a sparse network lie: places that are used again, and parts of joined maps.

Maps that are joined are written where the joined one lies, which then costs nothing.  A map has one
such place; where it is joined twice, the second join copies it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lossprune.deployment.sparse.steps import MapJoin, Shape, SparseStep

_Gap = tuple[int, int]  # start and length of elements that hold nothing any more


class FeatureMap(NamedTuple):
    """Where a value lies: of offsets and distances, all in elements, ``sparse_network.c`` tells."""

    offset: int
    plane: int
    row: int
    origin: int
    height: int
    width: int
    halo: int
    channels: int

    @property
    def size(self) -> int:
        """Elements, in whole cache lines."""
        return whole_lines(self.channels * self.plane)


class Part(NamedTuple):
    """A value as part of another: of ``whole``, after so many of its channels."""

    whole: str
    before: int


def parts_of_joined(
    steps: Sequence[SparseStep], shapes: Mapping[str, Shape], inputs: Collection[str]
) -> dict[str, Part]:
    """Return the values that lie in a joined map, which is in none itself.

    Inputs have places of their own.

    >>> joints = {"c": ("a", "b"), "d": ("c", "a")}
    >>> steps = [SparseStep("", reads, made, MapJoin()) for made, reads in joints.items()]
    >>> found = parts_of_joined(steps, dict.fromkeys("abcd", (3, 1, 1)), [])
    >>> {name: (part.whole, part.before) for name, part in found.items()}
    {'a': ('d', 0), 'b': ('d', 3), 'c': ('d', 0)}
    """
    direct: dict[str, Part] = {}
    for step in steps:
        if isinstance(step.operation, MapJoin):
            before = 0
            for name in step.reads:
                if name not in direct and name not in inputs:
                    direct[name] = Part(step.target, before)
                before += shapes[name][0]
    found = {}
    for name, part in direct.items():
        while part.whole in direct:
            outer = direct[part.whole]
            part = Part(outer.whole, outer.before + part.before)
        found[name] = part
    return found


def placed(
    uses: Sequence[Iterable[str]],
    maps: Mapping[str, FeatureMap],
    parts: Mapping[str, Part],
    inputs: Collection[str],
    outputs: Collection[str],
) -> tuple[dict[str, FeatureMap], int]:
    """Return the maps at their offsets, and where the last of them ends.

    Places are used again when nothing reads them any more.

    Args:
        uses: the values that each step reads or writes, in order.
        maps: of all values, those of one joined map with the same rows and planes.
        parts: the values that lie in others.
        inputs: the values that are there from the first.
        outputs: those that are there to the last.
    """

    def whole(name: str) -> str:
        return parts[name].whole if name in parts else name

    used = [{whole(name) for name in names} for names in uses]
    last = {name: k for k, names in enumerate(used) for name in names}
    last |= {whole(name): len(uses) for name in outputs}
    offsets: dict[str, int] = {}
    gaps: list[_Gap] = []
    end = 0
    for name in inputs:
        offsets[name] = end
        end += maps[name].size
    for k, names in enumerate(used):
        for name in sorted(names - offsets.keys()):
            start, gaps = _fitted(gaps, maps[name].size)
            if start is None:
                start, end = end, end + maps[name].size
            offsets[name] = start
        freed = [(offsets[name], maps[name].size) for name in names if last[name] == k]
        gaps = _merged([*gaps, *freed])
    places = {}
    for name, one in maps.items():
        offset = offsets[whole(name)] + (parts[name].before * one.plane if name in parts else 0)
        places[name] = one._replace(offset=offset)
    return places, end


def _fitted(gaps: list[_Gap], size: int) -> tuple[int | None, list[_Gap]]:
    """Return where the first gap of that size starts, if there is one, and what is left of all."""
    for k, (start, length) in enumerate(gaps):
        if length >= size:
            left = [(start + size, length - size)] if length > size else []
            return start, [*gaps[:k], *left, *gaps[k + 1 :]]
    return None, gaps


def _merged(gaps: list[_Gap]) -> list[_Gap]:
    """Return gaps in order, neighbours as one."""
    out: list[_Gap] = []
    for start, length in sorted(gaps):
        if out and sum(out[-1]) == start:
            start, length = out[-1][0], out[-1][1] + length
            out.pop()
        out.append((start, length))
    return out


def whole_lines(numbers: int) -> int:
    """Return so many numbers, or as many more as fill the last cache line.

    A vector across two lines takes twice as long.
    """
    return -(-numbers // 16) * 16
