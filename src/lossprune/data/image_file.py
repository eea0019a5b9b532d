"""Image files: which of a folder's entries are, and their decoding, with every fault named."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lossprune.progress import redraws

SUFFIXES = (".jpg", ".jpeg", ".png")
GREY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones are not."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def entries(folder: Path, *, folders: bool) -> list[str]:
    """Return the names of the folders, or of the images, in a folder, sorted; none of no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as found:
        return sorted(
            entry.name
            for entry in found
            if not entry.name.startswith(".")
            and (entry.is_dir() if folders else is_image(entry.name) and entry.is_file())
        )


@contextmanager
def opened(name: str, raw: bytes) -> Iterator[Image.Image]:
    """Open a JPEG or PNG; what goes wrong then, or while it is decoded, names the image.

    Raises:
        ValueError: it is not an image, is damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG")) as image:
            if image.mode not in GREY + COLOUR:
                raise ValueError(f"its pixels are of the type {image.mode}, more than 8 bits each")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def decoding_bar(progress: bool | None) -> Progress:
    """Return a bar on standard error that counts images; None: only where it is a terminal."""
    show = redraws() if progress is None else progress
    columns = TextColumn("decoding images"), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not show)
