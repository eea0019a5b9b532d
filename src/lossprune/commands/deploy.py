"""``lossprune deploy``: the small and fast forms of a pruned network, side by side."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.commands import EXIT_OK
from lossprune.commands.output import (
    NETWORK,
    ONNX,
    TABLE,
    check_out,
    json_bytes,
    open_out,
    told_files,
)
from lossprune.data import DATA_PATH, DATA_PATH_HELP
from lossprune.experiment.folder import MASK, RECORD
from lossprune.flags import check, check_one_of, check_positive, check_threads, flag
from lossprune.progress import shown_progress
from lossprune.pruning.names import counted
from lossprune.text_table import markdown_table, print_lines, print_table

if TYPE_CHECKING:
    from lossprune.commands.deployable import Deployable
    from lossprune.commands.forms import Form, MadeForms
    from lossprune.deployment.timing import Timing

FORMAT = "lossprune deployment 1"
_FILES = {
    NETWORK: "pruned weights: lossprune.load_sparse(path, network)",
    ONNX: "the compacted network, as ONNX",
    MASK: "what is kept: lossprune.Mask.load(path)",
    RECORD: "settings, versions, every form",
    TABLE: "this table",
}
_C_FILES = {
    "CMakeLists.txt": "cmake -B build && cmake --build build",
    "example.c": "how it is called",
    "expected.txt": "what the example prints",
}
_MOST_SECONDS = 3600.0
_MOST_TIMED = 65_536  # images in a batch


@dataclass(frozen=True)
class DeployConfig:
    """Make the small and fast forms of a pruned network, and compare them in a table.

    RUN_FOLDER is that of a finished run, or what ``lossprune prune`` wrote.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    out: Path = flag(Path("deployed"), "out", "folder to write into")
    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    data: str | None = flag(
        None, "data", "MODULE:FUNCTION of batches to time on, for a folder of lossprune prune; if "
        "not given, the one it was pruned with"
    )  # fmt: skip
    mirror: str | None = flag(None, "mirror", "base URL to download a missing data set from")
    values: str = flag("exact", "values", "of kept weights in the file: exact or float16")
    batch: str = flag("1,100", "batch", "batch sizes to time, such as 1,100")
    seconds: float = flag(2.0, "seconds", "how long to time at each batch size")
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    remeasure: bool = flag(
        False, "remeasure", "find anew what is fastest here, though an earlier deploy did"
    )
    c: Path | None = flag(
        None, "c", "also write a C library into this folder, laid out for the largest of --batch"
    )
    lanes: int | None = flag(
        None, "lanes", "numbers of a vector in the C library: 4 (ARM), 8 (AVX) or 16 (AVX-512); if "
        "not given, as many as here"
    )  # fmt: skip
    overwrite: bool = flag(False, "overwrite", "replace what an earlier deploy wrote there")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_one_of("values", self.values, ("exact", "float16"))
        check_positive("seconds", self.seconds, _MOST_SECONDS)
        check_threads(self.threads)
        if self.lanes is not None:
            check_one_of("lanes", str(self.lanes), ("4", "8", "16"))
        _ = self.batch_sizes

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to time."""
        try:
            sizes = tuple(int(size) for size in self.batch.split(","))
        except ValueError:
            sizes = (0,)
        good = min(sizes) >= 1 and max(sizes) <= _MOST_TIMED
        check("batch", self.batch, good, f"whole numbers from 1 to {_MOST_TIMED:,}, such as 1,100")
        return sizes


def do(config: DeployConfig, run: str) -> int:
    """Write the forms of the run's network, measure them and print the table.

    Raises:
        ValueError, FileNotFoundError: the folder is neither of a finished pruning nor written by
            ``lossprune prune``, its files do not fit each other, or the output folder will not do.
    """
    from lossprune.commands.deployable import deployable
    from lossprune.commands.forms import make_forms, time_forms
    from lossprune.deployment.c_library.writing import write_c
    from lossprune.torch_state import using_threads
    from lossprune.user_code import blaming_users_code

    check_out(config.out, FORMAT, config.overwrite)
    batches = config.batch_sizes
    with (
        using_threads(config.threads),
        blaming_users_code(),
        deployable(Path(run), config.data_path, config.mirror, config.data) as source,
        shown_progress() as progress,
    ):
        if config.c is not None:
            _check_c(config.c, config.overwrite, source)
        folder = open_out(config.out)
        for name in (RECORD, ONNX):  # which may not be made this time
            folder.remove(name)
        made = make_forms(
            source, folder, config.values, batches, progress, remeasure=config.remeasure
        )
        if config.c is not None:
            progress.note("C library")
            example = source.inputs(max(batches)).example
            write_c(
                source.masked, source.mask, example, config.c,
                lanes=config.lanes, overwrite=config.overwrite,
            )  # fmt: skip
        timings = time_forms(made.forms, source, batches, config.seconds, progress)
        folder.save(MASK, source.mask.save)
        tested = source.accuracy is not None
        columns, rows = _columns(config, source), _rows(made.forms, timings, tested, _quartiles)
        notes = _notes(config, source, timings, made)
        table = markdown_table(columns, rows) + "".join(f"\n{note}\n" for note in notes)
        folder.write(TABLE, table.encode())
        values = {
            "format": FORMAT,
            "run": dict(source.made_from),
            "environment": dict(source.environment),
            "values": config.values,
            "forms": [_described(form, timings[form.name]) for form in made.forms],
            "left_out": made.left_out,
            "rounding": made.rounding,
        }
        folder.write(RECORD, json_bytes(values))
    rows = _rows(made.forms, timings, tested, _median)
    print_table(source.title, columns, rows, spare=("parameters", "multiply-adds"))
    files = {name: what for name, what in _FILES.items() if (config.out / name).is_file()}
    print_lines([*notes, *told_files(config.out, files)])
    if config.c is not None:
        print_lines(told_files(config.c, _C_FILES))
    return EXIT_OK


def _check_c(folder: Path, overwrite: bool, source: "Deployable") -> None:
    """Raise what writing the C library would, before anything else is written."""
    from lossprune.deployment.c_library.writing import library_name, whole_network

    try:
        library_name(folder, overwrite)
    except ValueError as error:
        raise ValueError(f"--c: {error}") from None
    whole_network(source.masked, source.mask, source.inputs(1).example)


def _columns(config: DeployConfig, source: "Deployable") -> list[str]:
    latencies = [f"ms at {batch}" for batch in config.batch_sizes]
    accuracy = [] if source.accuracy is None else ["accuracy"]
    return ["form", "parameters", "non-zeros", "bytes", "multiply-adds", *latencies, *accuracy]


def _rows(
    forms: "Sequence[Form]",
    timings: "Mapping[str, Mapping[int, Timing]]",
    tested: bool,
    told: "Callable[[Timing], str]",
) -> list[list[str]]:
    return [
        [
            form.name,
            f"{form.parameters:,}",
            f"{form.nonzeros:,}",
            f"{form.size:,}",
            f"{form.multiply_adds:,}",
            *(told(timing) for timing in timings[form.name].values()),
            *(["–" if form.accuracy is None else f"{form.accuracy:.2%}"] if tested else []),
        ]
        for form in forms
    ]


def _median(timing: "Timing") -> str:
    return f"{1e3 * timing.median:.3g}"


def _quartiles(timing: "Timing") -> str:
    low, median, high = (f"{1e3 * value:.3g}" for value in (timing.low, timing.median, timing.high))
    return f"{median} ({low} to {high})"


def _notes(
    config: DeployConfig,
    source: "Deployable",
    timings: "Mapping[str, Mapping[int, Timing]]",
    made: "MadeForms",
) -> list[str]:
    import torch

    rounds = statistics.median(
        timing.count for measured in timings.values() for timing in measured.values()
    )
    threads = torch.get_num_threads()
    return [
        f"milliseconds a batch: median of {rounds:.0f} interleaved rounds, with quartiles in "
        f"{TABLE}; {counted(threads, 'thread')}",
        f"bytes: dense, the state dict; masked, compacted and deployed, {NETWORK}, "
        f"with {config.values} values",
        _note_of_dense(source),
        *(f"left out: {name}: {reason}" for name, reason in made.left_out.items()),
        *made.rounding,
    ]


def _note_of_dense(source: "Deployable") -> str:
    if source.accuracy is None:
        return "dense: a new network, for its size and times"
    if source.before is None:
        return "accuracy: on the test data; the record does not tell that before pruning"
    return "accuracy: on the test data; dense, before pruning, from the record"


def _described(form: "Form", timings: "Mapping[int, Timing]") -> dict[str, Any]:
    names = ("name", "parameters", "nonzeros", "multiply_adds", "file", "size", "accuracy")
    latency = {str(batch): asdict(timing) for batch, timing in timings.items()}
    return {**{name: getattr(form, name) for name in names}, "latency": latency}
