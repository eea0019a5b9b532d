"""What a run leaves, file by file, without what differs from one time to the next.

Left out are seconds, dates and digests over them, process ids, the version of lossprune, and the
folder that all lies in; everything else counts to the bit.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_NOT_LEFT = {".lock", ".holder.json"}  # who holds a folder
_TIMES = re.compile(r"\b\d[\d.,]* ?(ms|s|min|h)\b|\b\d+:\d\d(:\d\d)?\b")
_TIMED = {"seconds", "sparse_seconds", "dense_seconds", "latency", "when", "pid"}
_LEFT_OUT = {"environment/lossprune", "sha256"}  # a digest at the top is one over times
_NOTHING = "nothing"

Part = tuple[str, Any]


@dataclass
class Comparison:
    """Two folders beside each other.

    Attributes:
        files: how many there are.
        tensors: how many are in them.
        differences: the first of each file that differs, in one line.
        ways: of training, that the records name.
    """

    files: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    ways: set[str] = field(default_factory=set)


def compare(one: Path, other: Path) -> Comparison:
    """Compare all files of two folders; the first difference is enough for each file."""
    found = Comparison()
    names = sorted(files_of(one) | files_of(other))
    for name in names:
        found.files += 1
        told = ""
        if not (one / name).exists() or not (other / name).exists():
            told = "in one folder alone"
        else:
            parts = [list(parts_of(folder / name, folder)) for folder in (one, other)]
            found.tensors += sum(isinstance(value, Tensor) for _, value in parts[0])
            found.ways |= {
                value for where, value in parts[0] if re.search(r"training/\d+/mode$", where)
            }
            told = first_difference(*parts)
        if told:
            found.differences.append(f"{name}: {told}")
    return found


def files_of(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in _NOT_LEFT)
    return {str(file.relative_to(folder)) for file in files}


def first_difference(one: list[Part], other: list[Part]) -> str:
    """Name the first part that differs; nothing where all are the same to the bit."""
    for (where, value), (there, another) in zip_longest(one, other, fillvalue=(_NOTHING, None)):
        if where != there:
            return f"{where} in the one, {there} in the other"
        if not same(value, another):
            return f"{where}: {shown(value, another)}"
    return ""


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(raw(one), raw(other))
    return type(one) is type(other) and (one == other or repr(one) == repr(other))  # NaN


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def shown(one: Any, other: Any) -> str:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return " and ".join(f"{it.dtype} {tuple(it.shape)}" for it in (one, other))
        differ = (one != other) | (one.isnan() != other.isnan())
        return f"{int(differ.sum())} of {one.numel()} entries differ"
    if isinstance(one, str) and isinstance(other, str):
        pairs = enumerate(zip(one, other, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), 0)
        one, other = (it[max(0, at - 40) :] for it in (one, other))  # a line may be long
    return " and ".join(f"{it!r:.120}" for it in (one, other))


def parts_of(file: Path, folder: Path) -> Iterator[Part]:
    """Give what is in a file, with its place there."""
    match file.suffix:
        case ".json":
            yield from leaves(json.loads(file.read_text()))
        case ".pt":
            yield from leaves(torch.load(file, weights_only=True))
            yield whole(file)
        case ".safetensors":
            yield from safetensors_of(file)
            yield whole(file)
        case ".parquet":
            import pyarrow.parquet as pq

            yield from leaves(pq.read_table(file).to_pylist())
        case ".onnx":
            yield from leaves(onnx_of(file))
        case ".out" | ".err":
            text = file.read_text().replace(str(folder), ".")
            yield from lines(_TIMES.sub("TIME", text))
        case ".txt" if file.name == "log.txt":
            yield from lines(re.sub(r"(?m)^(\d+\t.*)\t[\d.]+$", r"\1", file.read_text()))
        case ".csv" | ".md" | ".tex" | ".toml" | ".txt" | ".html" | ".svg":
            yield from lines(file.read_text())
        case _:
            yield whole(file)


def whole(file: Path) -> Part:
    return "all bytes", hashlib.sha256(file.read_bytes()).hexdigest()


def lines(text: str) -> Iterator[Part]:
    for number, line in enumerate(text.splitlines(), start=1):
        yield f"line {number}", line


def safetensors_of(file: Path) -> Iterator[Part]:
    with safe_open(file, "pt") as opened:
        for name, value in sorted((opened.metadata() or {}).items()):
            yield f"metadata/{name}", value
        for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
            yield name, opened.get_tensor(name)


def onnx_of(file: Path) -> Any:
    """Return operations, shapes and weights: beside them are line numbers of the exporting code."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    weights = {it.name: torch.tensor(numpy_helper.to_array(it)) for it in graph.initializer}
    nodes = [
        [it.op_type, *it.input, *it.output, *(str(one) for one in it.attribute)]
        for it in graph.node
    ]
    ends = [str(it.type) for it in (*graph.input, *graph.output)]
    return {"weights": weights, "nodes": nodes, "ends": ends}


def leaves(value: Any, where: str = "") -> Iterator[Part]:
    """Give every value in dictionaries and lists with its path, but for times."""
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{where}/{name}" if where else str(name)
            if name not in _TIMED and place not in _LEFT_OUT:
                yield from leaves(item, place)
        if not value:
            yield where, "an empty dictionary"
    elif isinstance(value, (list, tuple)):
        yield f"{where}/length", len(value)
        for number, item in enumerate(value):
            yield from leaves(item, f"{where}/{number}" if where else str(number))
    else:
        yield where, value
