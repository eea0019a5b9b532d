"""CIFAR-10's batches are pickles: this reads them and can run nothing.

A pickle may name any function and have it called. Here the few names that such a file needs stand
for harmless constructions made in this module, and any other name is refused before it is looked
up. numpy's own functions are not called either, so the file may come from any version of it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, Literal

import numpy as np

PIXELS = 3 * 32 * 32
CLASSES = 10


def read_batch(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return (data, labels) of a batch: uint8 (n, 3072), and int64 (n,) with labels from 0 to 9.

    Args:
        raw: the pickle of a dict with the keys ``data`` and ``labels``, as bytes or text.

    Raises:
        ValueError: it is not such a pickle, or names something that such pickles do not need.
    """
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError(f"it holds a {type(batch).__name__}, not a dict")
        entries = {_text(key): value for key, value in batch.items()}
        missing = [key for key in ("data", "labels") if key not in entries]
        if missing:
            raise ValueError(f"its dict lacks {' and '.join(missing)}")
        data, labels = _data(entries["data"]), _labels(entries["labels"])
    except ValueError:
        raise
    except Exception as error:  # A damaged pickle can make its opcodes fail in any way.
        raise ValueError(f"it is not a readable pickle ({error})") from None
    if len(data) != len(labels):
        raise ValueError(f"it holds {len(data)} images but {len(labels)} labels")
    return data, labels


def _data(value: Any) -> np.ndarray:
    data = value.array() if isinstance(value, _Array) else None
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        found = type(value).__name__ if data is None else f"{data.dtype} of shape {data.shape}"
        raise ValueError(f"its data must be uint8 of shape (n, {PIXELS}), got {found}")
    return data


def _labels(value: Any) -> np.ndarray:
    labels = value.array().tolist() if isinstance(value, _Array) else value
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("its labels must be a list of whole numbers")
    for position, label in enumerate(labels):
        if not 0 <= label < CLASSES:
            raise ValueError(
                f"label {label} of example {position} is outside the {CLASSES} classes "
                f"(0 to {CLASSES - 1})"
            )
    return np.array(labels, dtype=np.int64)


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Dtype:
    """Stands for ``numpy.dtype``: the code of a number type, such as u1 or i8."""

    def __init__(self, code: bytes | str = "", *_: Any):
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = _text(state[1])

    def dtype(self) -> np.dtype:
        if self.code not in ("u1", "i4", "i8"):
            raise ValueError(f"it holds an array of the type {self.code!r}")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for ``numpy.ndarray``: keeps the parts of one until all are read."""

    raw: bytes = b""
    type: _Dtype = _Dtype()
    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, fortran, self.raw = state
        self.order = "F" if fortran else "C"

    def array(self) -> np.ndarray:
        return np.frombuffer(self.raw, self.type.dtype()).reshape(self.shape, order=self.order)


def _reconstruct(*_: Any) -> _Array:
    """Begin an array whose contents follow: pickle protocols up to 4."""
    return _Array()


def _frombuffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """Return a whole array: pickle protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that Python 3 wrote for Python 2 to read."""
    return text.encode(encoding) if encoding == "latin1" else b""


ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Looks names up in ``ADMITTED`` and nowhere else."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in ADMITTED:
            raise ValueError(f"it names {module}.{name}, which such a file does not need")
        return ADMITTED[module, name]
