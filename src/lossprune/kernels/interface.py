"""What a compiled file and the Python that calls it agree on: numbers and structures.

Numbers are written in Python alone and given to the file by the build.  Structures are written in
both, and the build compares them: ``MIRRORED`` in ``lossprune.h``, the header of all files.

>>> class Pair(ctypes.Structure):
...     _fields_ = (("a", ctypes.c_int32), ("b", ctypes.c_int32))
>>> macros({"WIDTH": 7}, {"Pair": Pair})["SIZE_OF_Pair"], fields({"Pair": Pair})
(8, {'FIELDS_OF_Pair': 'FIELD(Pair,a,0)FIELD(Pair,b,4)'})
"""

import ctypes
import re
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

HEADER = Path(__file__).with_name("lossprune.h")
Structures = Mapping[str, type[ctypes.Structure]]  # by their names in the file
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class Activation(IntEnum):
    """What a layer's outputs go through; every compiled file knows the names."""

    IDENTITY = 0
    RELU = 1
    TANH = 2
    GELU = 3
    GELU_TANH = 4  # torch's GELU with approximate="tanh"
    SIGMOID = 5
    SILU = 6
    HARDSIGMOID = 7
    HARDSWISH = 8
    CLAMP = 9  # between two bounds
    LEAKY_RELU = 10  # of a slope below 0
    ELU = 11  # of a factor below 0


def macros(constants: Mapping[str, int], structures: Structures) -> dict[str, int]:
    """Return what the build of a file is given: its constants, the sizes, what all files know."""
    sizes = {f"SIZE_OF_{name}": ctypes.sizeof(mirror) for name, mirror in structures.items()}
    return {**Activation.__members__, **constants, **sizes}


def fields(structures: Structures) -> dict[str, str]:
    """Return what a build in C is given besides: where in each structure its fields begin."""
    return {
        f"FIELDS_OF_{name}": "".join(
            f"FIELD({name},{field},{getattr(mirror, field).offset})"
            for field, *_ in mirror._fields_
        )
        for name, mirror in structures.items()
    }


def texts(source: Path) -> dict[Path, str]:
    """Return the text of a C file and of all that it includes of ours, by path.

    >>> list(texts(HEADER)) == [HEADER]
    True
    """
    found: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = file.read_text()
            for name in _INCLUDE.findall(found[file]):
                beside = (file.with_name(name), HEADER.with_name(name))
                waiting += [path for path in beside if path.is_file()][:1]
    return found


def check_mirrors(source: Path, said: str) -> None:
    """Raise RuntimeError where a compiler said that a structure differs from its mirror."""
    if found := re.search(r"(\w+) disagrees with its mirror", said):
        raise RuntimeError(
            f"{source.name} and its mirror in Python disagree about the structure {found[1]}"
        )
