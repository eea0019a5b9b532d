"""A folder that ``from_pretrained`` loads, written part by part."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lossprune.checkpoints.reading import INDEX
from lossprune.files import replacing, write_whole
from lossprune.pruning.mask import Mask

RECORD = "record.json"
_TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx"}


class CheckpointWriter:
    """Tensors in files of so many parts, and the index of them.

    Args:
        folder: new or empty; made if it is not there.
        source: whose other files, configuration and tokenizer, are copied.
        parts: how many there will be.

    Raises:
        ValueError: the folder holds something, or cannot be made.
    """

    def __init__(self, folder: Path, source: Path, parts: int) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there and holds something: give a new or empty folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from None
        self._folder, self._parts = folder, parts
        self._places: dict[str, str] = {}
        self._bytes = 0
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in _TENSORS and path.name not in (INDEX, RECORD):
                shutil.copyfile(path, folder / path.name)

    def write(self, part: int, tensors: Mapping[str, Tensor], mask: Mask | None) -> None:
        """Write a part, from 1, and which of its weights are kept."""
        from safetensors.torch import save_file

        numbers = f"{part:05}-of-{self._parts:05}.safetensors"
        with replacing(self._folder / f"model-{numbers}") as path:
            plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, path, {"format": "pt"})
        self._places |= dict.fromkeys(tensors, f"model-{numbers}")
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if mask:
            mask.save(self._folder / f"mask-{numbers}")

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the index, and the record last: a folder with one is whole."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._places}
        for name, values in ((INDEX, index), (RECORD, record)):
            write_whole(self._folder / name, (json.dumps(values, indent=1) + "\n").encode())
