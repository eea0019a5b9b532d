"""All records of a results folder in one Parquet file, from which the report can be made again."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lossprune.experiment.folder import RunFolder
from lossprune.experiment.log import log_text
from lossprune.experiment.record import RunRecord
from lossprune.json_text import parse_json
from lossprune.report.source import attempt

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lossprune.report.reading import Results
    from lossprune.report.records_table import StoredRun

T = TypeVar("T")

FORMAT = "lossprune records 1"
_GROUP = 64  # runs written and read at a time
_FORMAT, _NAME, _LEFT_OUT = b"lossprune.format", b"lossprune.name", b"lossprune.left_out"


def check_arrow() -> None:
    """Raise a ValueError that says what to install where there is no pyarrow."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"records in Parquet files need pyarrow: pip install 'lossprune[parquet]' ({error})"
        ) from None


def write_records(results: "Results", path: Path) -> None:
    """Write all runs of a report, and what it left out, into one file.

    Raises:
        ValueError: it cannot be written, a record has gone, or it holds what no column can hold.
    """
    check_arrow()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write --records {path}: {error.strerror or error}") from error
    RunFolder(path.parent).save(path.name, lambda part: _write(results, part))


def _write(results: "Results", path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lossprune.report.records_table import ERRORS, LOSSES, SCHEMA, StoredRun, to_table

    of_epochs = "epochs.list.element."
    metadata = {
        _FORMAT: FORMAT,
        _NAME: results.source.name,
        _LEFT_OUT: json.dumps([[item.path, item.reason] for item in results.left_out]),
    }
    folders = results.runs["folder"].tolist()
    records, layers = results.source.records(folders), results.source.layers(folders)
    runs = map(StoredRun, folders, records, layers)
    with pq.ParquetWriter(
        path,
        SCHEMA.with_metadata(metadata),
        compression="zstd",
        compression_level=9,
        use_dictionary=[of_epochs + name for name in ERRORS],  # type: ignore[arg-type]
        column_encoding={of_epochs + name: "BYTE_STREAM_SPLIT" for name in (*LOSSES, "seconds")},
        write_page_checksum=True,
    ) as writer:
        while group := list(islice(runs, _GROUP)):
            try:
                writer.write_table(to_table(group))
            except (pa.ArrowException, TypeError, KeyError, AttributeError) as error:
                among = f"{group[0].folder} to {group[-1].folder}"
                raise ValueError(f"one of the records {among} fits no column: {error}") from error


class RecordsFile:
    """A file that :func:`write_records` wrote, as a source of a report like a ``ResultsFolder``.

    Raises:
        ValueError: it is not such a file, or damaged; one sentence says which.
    """

    folder = None

    def __init__(self, path: Path) -> None:
        check_arrow()
        self.path = path
        with _told(path), self._opened() as file:
            schema = file.schema_arrow
        metadata = schema.metadata or {}
        _check(path, schema)
        with _told(path):
            self.name = metadata[_NAME].decode()
            self._left_out: list[tuple[str, str]] = [
                (str(where), str(why)) for where, why in parse_json(metadata[_LEFT_OUT])
            ]

    def read(self, take: Callable[[RunRecord], T]) -> Iterator[tuple[str, T | str]]:
        """Give where each run was, and what ``take`` makes of its record, or why there is none."""
        for run in self._runs():
            yield run.folder, attempt(take, lambda run=run: run.record)
        yield from self._left_out

    def records(self, folders: Collection[str]) -> Iterator[RunRecord]:
        """Give the records of these runs, which are in the order of the file."""
        wanted = set(folders)
        return (run.record for run in self._runs() if run.folder in wanted)

    def layers(self, folders: Iterable[str]) -> Iterator[dict[str, float] | None]:
        """Give the sparsity of each layer of these runs, in their order; None without a mask."""
        from lossprune.report.records_table import layers_of

        known: dict[str, dict[str, float] | None] = {}
        for table in self._tables(["folder", "layers"]):
            for row in table.to_pylist():
                known[row["folder"]] = layers_of(row["layers"])
        return (known[folder] for folder in folders)

    def texts(self, folders: Collection[str]) -> Iterator[tuple[str, str]]:
        """Give log and record of these runs, in the order of the file, as their files say it."""
        return ((log_text(record), record.to_json()) for record in self.records(folders))

    def _runs(self) -> "Iterator[StoredRun]":
        from lossprune.report.records_table import from_table

        for table in self._tables(None):
            with _told(self.path):
                runs = list(from_table(table))
            yield from runs

    def _tables(self, columns: list[str] | None) -> "Iterator[pa.Table]":
        with self._opened() as file:
            for group in range(file.num_row_groups):
                with _told(self.path):
                    table = file.read_row_group(group, columns)
                yield table

    def _opened(self) -> "pq.ParquetFile":
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path, page_checksum_verification=True)


def _check(path: Path, schema: "pa.Schema") -> None:
    import pyarrow as pa

    from lossprune.report.records_table import LATER, SCHEMA

    metadata = schema.metadata or {}
    written = metadata.get(_FORMAT, b"").decode()
    if written != FORMAT:
        raise ValueError(
            f"{path} is a Parquet file of "
            + (f"{written!r}, this reads {FORMAT!r}" if written else "something else than records")
            + ": lossprune report RESULTS --records FILE writes one"
        )
    for column in SCHEMA:
        if column.name not in schema.names:
            if column.name in LATER:
                continue
            raise ValueError(f"{path} lacks the column {column.name!r} of {FORMAT!r}")
        kind = schema.field(column.name).type
        # Of settings, environment and start, other versions know others.
        alike = pa.types.is_struct(kind) if column.name in _OPEN else kind == column.type
        if not alike:
            raise ValueError(f"{path}: column {column.name!r} is {kind}, not {column.type}")


_OPEN = ("config", "environment", "start")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or not a Parquet file: {told}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds a row that is not of a run: {error}") from None
