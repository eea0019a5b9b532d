"""Files are whole at any moment: written, or as they were."""

import pytest

from lossprune.files import replacing, write_whole
from tests.processes import begin


def test_a_file_takes_the_place_of_another_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def half(part):
        part.write_bytes(b"half")
        raise OSError("halfway")

    with pytest.raises(OSError, match="halfway"), replacing(path) as part:
        half(part)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, torch
from pathlib import Path
import lossprune
mask = lossprune.Mask({"weight": torch.rand(1000, 100) < 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    mask.save(path)
except OSError as error:
    raise SystemExit(7)
"""


def test_a_full_disk_leaves_no_part_of_a_mask(tmp_path):
    process = begin(FULL, path=tmp_path / "mask.safetensors")
    process.join()
    assert process.exitcode == 7
    assert list(tmp_path.iterdir()) == []
