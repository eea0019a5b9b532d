"""Reading the files in a tar archive, compressed or not, without unpacking it."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

CHUNK = 1 << 20


def read_archive(
    path: Path, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield (name, contents) of the regular files whose name is ``wanted``, as stored.

    The archive is read to its end, for a gzip file's checksum stands there.

    Raises:
        ValueError: the archive is truncated, damaged, or none.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                # A link has no contents here, and following one could lead anywhere.
                if member.isfile() and wanted(name) and (file := archive.extractfile(member)):
                    yield name, file.read()
            while archive.fileobj and archive.fileobj.read(CHUNK):
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} is not an archive that can be read: {error}") from None
