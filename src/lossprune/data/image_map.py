"""Photographs decoded once, to one size, in a file that is mapped into memory.

So that a data set of any size can be used: the operating system reads what is asked for, keeps what
memory is free for, and shares it among processes.  Nothing is ever held twice.

The file lies in a folder of its own in the cache (see ``image_cache``): ``images.u8`` holds the
pixels, uint8 (examples, 3, side, side), and ``index.json`` the classes and how many images of each
every split has.  The index is written last.  Until then ``progress.json`` tells how many images are
on the disk: decoding that was stopped, in whatever way, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from lossprune.data.dataset import Split
from lossprune.data.image_cache import Decoded
from lossprune.data.image_file import decoding_bar, opened
from lossprune.files import CACHE_VARIABLE, cache_folder, write_whole
from lossprune.json_text import parse_digested, with_digest
from lossprune.torch_state import count_cores

IMAGES, INDEX, PROGRESS = "images.u8", "index.json", "progress.json"
CHUNK = 2048  # images between two looks back: some seconds of work
NAMED = 10  # unreadable images that a message names


@dataclass(frozen=True)
class Listing:
    """The images of a data set, before they are decoded.

    Attributes:
        classes: label i is the i-th.
        files: the images of each split, those of a class together, classes in order.
        counts: how many of them each class has.
    """

    classes: tuple[str, ...]
    files: Mapping[str, Sequence[Path]]
    counts: Mapping[str, Sequence[int]]


def mapped(
    key: str, source: Path, side: int, listing: Callable[[], Listing], progress: bool | None
) -> Decoded:
    """Return the images of ``source``, square, ``side`` pixels high and wide, as one mapped file.

    Of an image the largest square in the middle is taken and brought to that size.  Of several
    processes that ask at once one decodes, on all cores that it may use; the others wait.

    Args:
        key: a digest that changes with what ``listing`` would give.
        source: the folder that the images come from.
        side: pixels.
        listing: lists them, if they have to be decoded.
        progress: show a bar on standard error; None: only where it is a terminal.

    Raises:
        ValueError: images that cannot be read, by name; too little room on the disk.
        OSError: the cache cannot be written.
    """
    cache = cache_folder()
    origin = hashlib.sha256(f"{source.resolve()} {side}".encode()).hexdigest()[:8]
    folder = cache / f"{source.name}-{origin}-{key[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{origin}.lock"):
        if _index(folder, side) is None:
            for old in cache.glob(f"*-{origin}-*"):  # first, for they may be large
                if old != folder:
                    shutil.rmtree(old)
            _decode(folder, listing(), side, progress)
    index = _index(folder, side)
    if index is None:
        raise OSError(f"{folder} is not as it was written a moment ago")
    return _opened(folder, index, side)


def _index(folder: Path, side: int) -> dict | None:
    """Return the index of a cache that is whole, or None."""
    try:
        index = parse_digested((folder / INDEX).read_bytes())
        size = (folder / IMAGES).stat().st_size
        images = sum(map(sum, index["counts"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if size == images * 3 * side**2 else None


def _opened(folder: Path, index: dict, side: int) -> Decoded:
    # Read-only and shared: for a private mapping memory of the file's length would be set aside.
    pixels = np.memmap(folder / IMAGES, np.uint8, "r").reshape(-1, 3, side, side)
    with warnings.catch_warnings(action="ignore"):  # that it is read-only: so is all of a data set
        images = torch.from_numpy(pixels)
    counts = {name: torch.tensor(of_split) for name, of_split in index["counts"].items()}
    parts = images.split([int(of_split.sum()) for of_split in counts.values()])
    splits = {
        name: Split(part, torch.repeat_interleave(torch.arange(len(of_split)), of_split))
        for part, (name, of_split) in zip(parts, counts.items(), strict=True)
    }
    return Decoded(tuple(index["classes"]), splits)


def _decode(folder: Path, listing: Listing, side: int, progress: bool | None) -> None:
    """Decode what is not on the disk yet, then write the index."""
    folder.mkdir(exist_ok=True)
    files = [file for of_split in listing.files.values() for file in of_split]
    state = _Decoding.read(folder)
    _check_room(folder, (len(files) - state.done) * 3 * side**2)
    target = os.open(folder / IMAGES, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        with (
            ThreadPoolExecutor(count_cores()) as pool,  # Pillow lets other threads run
            decoding_bar(progress) as bar,
        ):
            task = bar.add_task("", total=len(files), completed=state.done)
            while state.done < len(files):
                places = range(state.done, min(state.done + CHUNK, len(files)))
                faults = pool.map(lambda place: _store(target, files[place], place, side), places)
                state = state.further(len(places), [fault for fault in faults if fault])
                os.fsync(target)
                state.write(folder)
                bar.update(task, completed=state.done)
        os.ftruncate(target, len(files) * 3 * side**2)
    finally:
        os.close(target)
    if state.unreadable:
        (folder / PROGRESS).unlink()  # the next attempt begins anew, with what has been put right
        count, named = len(state.unreadable), "; ".join(state.unreadable[:NAMED])
        rest = f"; and {count - NAMED} more" if count > NAMED else ""
        raise ValueError(f"{count} of {len(files)} images cannot be used: {named}{rest}")
    counts = {name: list(of_split) for name, of_split in listing.counts.items()}
    index = with_digest({"classes": listing.classes, "counts": counts})
    write_whole(folder / INDEX, json.dumps(index).encode())
    (folder / PROGRESS).unlink()


def _store(target: int, file: Path, place: int, side: int) -> str | None:
    """Decode one image into its place in the file; return what is wrong with it, if anything."""
    try:
        pixels = _square(str(file), file.read_bytes(), side)
    except ValueError as error:
        return str(error)
    os.pwrite(target, pixels, place * 3 * side**2)
    return None


def _square(name: str, raw: bytes, side: int) -> bytes:
    """Return the middle of an image as uint8 (3, side, side), row by row."""
    with opened(name, raw) as image:
        width, height = image.size
        least = min(width, height)
        left, top = (width - least) / 2, (height - least) / 2
        small = image.convert("RGB").resize(
            (side, side), Image.Resampling.BILINEAR, box=(left, top, left + least, top + least)
        )
        return np.asarray(small).transpose(2, 0, 1).tobytes()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the decoded images take {needed / 1e9:.1f} GB more, but {folder.parent} has "
            f"{free / 1e9:.1f} GB free; {CACHE_VARIABLE} can name another folder"
        )


@dataclass(frozen=True)
class _Decoding:
    """How many images are on the disk, and what was wrong with some of them."""

    done: int = 0
    unreadable: tuple[str, ...] = ()

    @staticmethod
    def read(folder: Path) -> _Decoding:
        try:
            state = parse_digested((folder / PROGRESS).read_bytes())
            return _Decoding(state["done"], tuple(state["unreadable"]))
        except (OSError, ValueError, KeyError, TypeError):
            return _Decoding()

    def further(self, count: int, faults: Sequence[str]) -> _Decoding:
        return _Decoding(self.done + count, (*self.unreadable, *faults))

    def write(self, folder: Path) -> None:
        write_whole(folder / PROGRESS, json.dumps(with_digest(asdict(self))).encode())
