"""``lossprune deploy``: the small and fast forms of a pruned network, side by side."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import shutil
from dataclasses import dataclass
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
from lossprune.experiment.folder import MASK, RECORD, RunFolder
from lossprune.flags import check, check_one_of, check_positive, check_threads, flag
from lossprune.progress import Progress, shown_progress
from lossprune.text_table import print_lines

if TYPE_CHECKING:
    from lossprune.commands.deploy_tables import Measured
    from lossprune.commands.deployable import Deployable
    from lossprune.commands.engines import Asked

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
_ENGINES = ("onnxruntime", "openvino", "deepsparse")
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
    engines: str = flag(
        "all", "engines", "of other packages to time beside: all, none, or names of onnxruntime, "
        "openvino and deepsparse joined by commas"
    )  # fmt: skip
    peers: str | None = flag(
        None, "peers", "Python of another environment, for the engines that this one lacks"
    )
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
        if self.peers is not None and shutil.which(self.peers) is None:
            raise ValueError(
                f"--peers must be the Python of an environment, such as env/bin/python, got "
                f"{self.peers!r}"
            )
        _ = self.batch_sizes, self.other_engines

    @property
    def other_engines(self) -> tuple[str, ...]:
        """The engines of other packages to time."""
        if self.engines in ("all", "none"):
            return _ENGINES if self.engines == "all" else ()
        names = tuple(dict.fromkeys(self.engines.split(",")))
        known = not set(names).difference(_ENGINES)
        check("engines", self.engines, known, f"all, none, or names of {', '.join(_ENGINES)}")
        return names

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
    """Write the forms of the run's network, measure them and print the tables.

    Raises:
        ValueError, FileNotFoundError: the folder is neither of a finished pruning nor written by
            ``lossprune prune``, its files do not fit each other, or the output folder will not do.
    """
    from lossprune.commands.deploy_tables import markdown_of, print_tables
    from lossprune.commands.deployable import deployable
    from lossprune.torch_state import using_threads
    from lossprune.user_code import blaming_users_code

    check_out(config.out, FORMAT, config.overwrite)
    with (
        using_threads(config.threads),
        blaming_users_code(),
        deployable(Path(run), config.data_path, config.mirror, config.data) as source,
        shown_progress() as progress,
    ):
        if config.c is not None:
            _check_c(config.c, config.overwrite, source)
        folder = open_out(config.out)
        measured = _measured(config, Path(run), source, folder, progress)
        folder.write(TABLE, markdown_of(source, measured).encode())
        folder.write(RECORD, json_bytes(_record(source, measured)))
    print_tables(source, measured)
    files = {name: what for name, what in _FILES.items() if (config.out / name).is_file()}
    print_lines(told_files(config.out, files))
    if config.c is not None:
        print_lines(told_files(config.c, _C_FILES))
    return EXIT_OK


def _measured(
    config: DeployConfig, run: Path, source: "Deployable", folder: RunFolder, progress: Progress
) -> "Measured":
    """Write all files but the tables and the record, and measure what is in them."""
    from lossprune.commands.deploy_tables import Measured
    from lossprune.commands.engines import time_engines
    from lossprune.commands.forms import make_forms, time_forms, write_network
    from lossprune.deployment.c_library.writing import write_c

    batches = config.batch_sizes
    for name in (RECORD, ONNX):  # which may not be made this time
        folder.remove(name)
    rounding = write_network(source, folder, config.values)
    beside = time_engines(source, _asked(config, run), progress)
    tuned = any(engine.name == "lossprune" for engine in beside.engines)  # and left its plans
    remeasure = config.remeasure and not tuned
    made = make_forms(source, folder, batches, progress, remeasure=remeasure)
    if config.c is not None:
        progress.note("C library")
        example = source.inputs(max(batches)).example
        write_c(
            source.masked, source.mask, example, config.c,
            lanes=config.lanes, overwrite=config.overwrite,
        )  # fmt: skip
    timings = time_forms(made.forms, source, batches, config.seconds, progress)
    folder.save(MASK, source.mask.save)
    return Measured(made, timings, config.values, rounding, beside)


def _asked(config: DeployConfig, run: Path) -> "Asked":
    """How other engines are to be compared with the network of the run."""
    import torch

    from lossprune.commands.engines import Asked

    network = config.out / NETWORK
    return Asked(
        config.other_engines,
        config.peers,
        config.batch_sizes,
        torch.get_num_threads(),
        config.seconds,
        {
            "run": str(run),
            "data_path": str(config.data_path),
            "mirror": config.mirror,
            "data": config.data,
            "network": str(network),
            "remeasure": config.remeasure,
        },
        network.stat().st_size,
    )


def _record(source: "Deployable", measured: "Measured") -> dict[str, Any]:
    from lossprune.commands.forms import described

    made, beside = measured.made, measured.beside
    return {
        "format": FORMAT,
        "run": dict(source.made_from),
        "environment": dict(source.environment),
        "values": measured.values,
        "forms": [described(form, measured.timings[form.name]) for form in made.forms],
        "left_out": made.left_out,
        "rounding": measured.rounding,
        "engines": [engine.described() for engine in beside.engines],
        "engines_left_out": beside.left_out,
    }


def _check_c(folder: Path, overwrite: bool, source: "Deployable") -> None:
    """Raise what writing the C library would, before anything else is written."""
    from lossprune.deployment.c_library.writing import library_name, whole_network

    try:
        library_name(folder, overwrite)
    except ValueError as error:
        raise ValueError(f"--c: {error}") from None
    whole_network(source.masked, source.mask, source.inputs(1).example)
