"""The folder that a command writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossprune.experiment.folder import RECORD, RunFolder
from lossprune.json_text import parse_json
from lossprune.text_table import aligned

NETWORK, ONNX, TABLE = "network.safetensors", "network.onnx", "table.md"


def check_out(out: Path, format: str, overwrite: bool) -> None:  # noqa: A002
    """Check that a command may write into ``out``, before its work begins.

    A folder that is new or empty will do, and one that the same command wrote where ``overwrite``
    says so.  Nothing else that is there is ever replaced.

    Raises:
        ValueError: it will not do.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    if format_of(out) != format:
        raise ValueError(
            f"--out {out} holds other files ({', '.join(names[:3])}): give a new or empty folder"
        )
    if not overwrite:
        raise ValueError(
            f"--out {out} holds an earlier result: --overwrite replaces it, or give another folder"
        )


def open_out(out: Path) -> RunFolder:
    """Make the folder where it is not there, and take away the record of what it held.

    The record is written last: a folder with one is whole.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {out}: {error.strerror}") from error
    return RunFolder(out)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(values, indent=1) + "\n").encode()


def told_files(out: Path, files: Mapping[str, str]) -> list[str]:
    """Return what to print of the files in ``out``, each with what it is."""
    lines = aligned(list(files.items()), left=2)
    return [f"written in {out}:", *(f"  {line}" for line in lines)]


def format_of(out: Path) -> str | None:
    """Return the format of the record in a folder; None where there is none that can be read."""
    try:
        record = parse_json((out / RECORD).read_text(encoding="utf-8"))
        return record.get("format") if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None
