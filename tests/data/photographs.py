"""A small folder of photographs of many sizes, laid out as ImageNet's are."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

GREY_EVERY = 7


def photograph(seed: int, kind: str = "JPEG") -> bytes:
    """A smooth picture, 40 to 90 pixels wide and high, even numbers; every seventh is grey."""
    random = np.random.default_rng(seed)
    coarse = random.integers(256, size=(5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(
        (40 + 2 * (seed % 26), 90 - 2 * (seed % 22)), Image.BICUBIC
    )
    if seed % GREY_EVERY == 0:
        image = image.convert("L")
    stream = io.BytesIO()
    image.save(stream, kind, quality=90)
    return stream.getvalue()


def write_photographs(folder: Path, classes: int, **images: int) -> Path:
    """Write so many images a class of each split, as ``<split>/n<class>/<class>_<i>.JPEG``."""
    seed = 0
    for split, count in images.items():
        for label in range(classes):
            place = folder / split / f"n{label:08}"
            place.mkdir(parents=True)
            for number in range(count):
                seed += 1
                (place / f"n{label:08}_{number}.JPEG").write_bytes(photograph(seed))
    return folder
