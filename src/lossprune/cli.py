"""The command line: ``lossprune run | sweep | …``, or ``python -m lossprune``.

A command is a frozen dataclass whose fields are its flags, and a function that takes it.  tyro
parses and writes the help; what it cannot parse is answered here, in one sentence.
"""

import contextlib
import hashlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from lossprune.commands.config import DeployConfig, PruneConfig
from lossprune.commands.sweep import StatusConfig, SweepConfig, run_sweep, show_status
from lossprune.data import DATASETS, MOST_IMAGE_SIZE
from lossprune.experiment.config import RunConfig
from lossprune.experiment.log import legible, summarise
from lossprune.experiment.ranks import ElsewhereError, alike, joined, launched, leave_word
from lossprune.experiment.record import RunRecord, RunStatus
from lossprune.experiment.shared_folder import SharedFolder
from lossprune.flags import check_seed, check_threads, check_whole, did_you_mean, flag
from lossprune.report.config import CompareConfig, ReportConfig

_LONGEST = 500  # of an error's sentence, which may quote what a user wrote

EXIT_OK, EXIT_ERROR, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 2, 3, 130


@dataclass(frozen=True)
class DataConfig:
    """Fetch, verify and describe a data set, or list those there are.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    data_path: Path = flag(Path("data"), "data_path", "folder of the data sets")  # noqa: RUF009
    mirror: str | None = flag(None, "mirror", "base URL to download missing files from")
    image_size: int = flag(0, "image_size", "height and width of inputs, for imagenet; 0: 224")
    seed: int = flag(1111, "seed", "seed of the split")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_whole("image_size", self.image_size, 0, MOST_IMAGE_SIZE)
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class DemoConfig:
    """Train a small network on the bundled digits, prune it by every criterion, fine-tune it.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    threads: int = flag(1, "threads", "CPU threads; for so small a network one is as fast")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_threads(self.threads)


def main(argv: Sequence[str] | None = None, prog: str = "lossprune") -> int:
    """Run the command that ``argv`` names and return the exit status.

    0: done; 2: an error, told in one sentence on standard error; 3: training diverged;
    130: interrupted.  ``prog`` is what help texts call the program.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments, prog)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        resumes = arguments[0] == "run"
        hint = ": the same command goes on from there" if resumes else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ElsewhereError:
        leave_word()
        return EXIT_ERROR
    except BrokenPipeError:  # who reads what is printed has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except BaseException as error:  # a user's code may raise anything: the exit status is ours
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return EXIT_ERROR


def run_main() -> int:
    """Be the published ``experiments.py``: the command ``run``, under its own name."""
    return main(["run", *sys.argv[1:]], prog="experiments.py")


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, and what it does with them.

    Attributes:
        config: the dataclass of its flags; its docstring is the help text.
        do: does it and returns the exit status.
        argument: the names of leading arguments without a flag, if it takes any.
        several: whether several processes may do it together.
    """

    config: type
    do: Callable[..., int]
    argument: str | None = None
    several: bool = False


def _dispatch(arguments: list[str], prog: str) -> int:
    with alike():
        do = _choose(arguments, prog)
    return EXIT_OK if do is None else do()


def _choose(arguments: list[str], prog: str) -> Callable[[], int] | None:
    """Return what is to be done, ready to be called; None where help was asked for and given."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(prog))
        return None
    if arguments[0] == "--version":
        import lossprune

        print(f"lossprune {lossprune.__version__}")
        return None
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name!r}: it must be one of {', '.join(COMMANDS)}"
            + did_you_mean(name, COMMANDS)
        )
    command = COMMANDS[name]
    if launched() and not command.several:
        raise ValueError(
            f"lossprune {name} is for one process: start it without torchrun or its like "
            f"(WORLD_SIZE is {os.environ['WORLD_SIZE']})"
        )
    leading = []
    for _ in (command.argument or "").split():
        if rest and not rest[0].startswith("-"):
            leading, rest = [*leading, rest[0]], rest[1:]
    title = prog if prog != "lossprune" else f"lossprune {name}"
    config = parse(command, rest, title)
    return None if config is None else partial(command.do, config, *leading)


def _overview(prog: str) -> str:
    lines = [
        "Prune neural networks by modelling the loss.",
        "",
        f"usage: {prog} COMMAND [FLAGS]",
        "",
    ]
    usages = {
        name: f"{name} [{command.argument}]" if command.argument else name
        for name, command in COMMANDS.items()
    }
    width = max(map(len, usages.values()))
    for name, command in COMMANDS.items():
        lines.append(f"  {usages[name]:<{width}} {_help_of(command.config)}")
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists a command's flags."])


def _help_of(config: type) -> str:
    return (config.__doc__ or "").split("\n", 1)[0]


def parse(command: Command, arguments: list[str], title: str = "lossprune") -> Any:
    """Return the command's configuration, or None where its help was asked for and given.

    Raises:
        ValueError: a flag is unknown, lacks its value or has one that it does not accept.
    """
    import tyro

    asked = "-h" in arguments or "--help" in arguments
    # Only spelling and types are parsed here: the configuration checks its values itself.
    hints = get_type_hints(command.config)
    plain = make_dataclass(
        command.config.__name__,
        [
            (
                item.name,
                Annotated[
                    hints[item.name],
                    tyro.conf.arg(name=item.metadata["flag"], help=item.metadata["help"]),
                ],
                field(default=item.default),
            )
            for item in fields(command.config)
        ],
    )
    # What tyro says of a mistake is a box of several lines; ours is one sentence.
    unheard = contextlib.nullcontext() if asked else contextlib.redirect_stderr(io.StringIO())
    try:
        with unheard:
            values = tyro.cli(
                plain,
                args=["--help"] if asked else arguments,
                prog=f"{title} [{command.argument}]" if command.argument else title,
                description=_help_of(command.config),
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit:
        if asked:
            return None
        raise ValueError(_explain(arguments, command.config, hints)) from None
    return command.config(**vars(values))


def _explain(arguments: list[str], config: type, hints: dict[str, Any]) -> str:
    """Say in one sentence what is wrong with the flags."""
    kinds = {item.metadata["flag"]: hints[item.name] for item in fields(config)}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            return f"unexpected argument {word!r}: flags begin with --"
        spelled, has_value, value = word[2:].partition("=")
        name = spelled.replace("-", "_")
        if name not in kinds:
            return f"unknown flag --{spelled}{did_you_mean(name, kinds, '--') or '; see --help'}"
        if kinds[name] is bool:
            if has_value:
                return f"--{name} takes no value, got {value!r}"
            continue
        if not has_value:
            value = next(words, None)
        if value is None or (value.startswith("--") and not has_value):
            return f"--{name} needs a value"
        problem = _misfit(kinds[name], value)
        if problem:
            return f"--{name} must be {problem}, got {value!r}"
    return "the flags could not be read; see --help"


def _misfit(kind: Any, value: str) -> str | None:
    """Return what a value should have been, or None where it is that."""
    kinds = get_args(kind) or (kind,)
    for parse, accepted in ((int, "a whole number"), (float, "a number")):
        if parse in kinds:
            try:
                parse(value)
            except ValueError:
                return accepted
    return None


def _sentence(error: BaseException) -> str:
    """Return what an error says, in one line of readable length; of a surprising one its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text if len(text) < _LONGEST else f"{text[:300]} … {text[-150:]}"


def _run(config: RunConfig) -> int:
    with joined() as ranks:
        record = SharedFolder(config.folder, ranks).settled()
        if record is None:
            from lossprune.experiment import run
            from lossprune.experiment.progress import shown_progress

            with shown_progress(ranks.first) as progress:
                progress.note(f"folder: {config.folder}")
                record = run(config, progress)
                progress.note(summarise(record))
        elif ranks.first:
            print("Experiment already exists!")
            _warn_of_another_start(config, record)
        if record.status == RunStatus.DIVERGED and ranks.first:
            print(f"diverged: {record.message}", file=sys.stderr)
    return EXIT_DIVERGED if record.status == RunStatus.DIVERGED else EXIT_OK


def _warn_of_another_start(config: RunConfig, record: RunRecord) -> None:
    """The folder's name tells only that there was a start network, not which."""
    if config.start is None or not config.start.is_file():
        return
    if hashlib.sha256(config.start.read_bytes()).hexdigest() != record.start.sha256:
        print(f"note: it began from another network than {config.start}", file=sys.stderr)


def _data(config: DataConfig, name: str | None = None) -> int:
    if name is None:
        for known, entry in DATASETS.items():
            print(f"{known:<10} {entry.summary}")
        return EXIT_OK
    from lossprune.data import load
    from lossprune.pruning.names import listed

    dataset = load(
        name,
        config.data_path,
        seed=config.seed,
        mirror=config.mirror,
        image_size=config.image_size or None,
    )
    print(f"name       {dataset.name}")
    print(f"images     {' × '.join(map(str, dataset.shape))} (channels × height × width)")
    for split, examples in dataset.splits.items():
        print(f"{split:<10} {len(examples):,} examples")
    print(f"classes    {len(dataset.classes)}: {listed(dataset.classes, 20)}")
    print(f"mean       {', '.join(format(value, '.4f') for value in dataset.mean)}")
    print(f"std        {', '.join(format(value, '.4f') for value in dataset.std)}")
    print(f"training   {'random crop and flip' if dataset.augmented else 'no augmentation'}")
    return EXIT_OK


def _demo(config: DemoConfig) -> int:
    from lossprune.commands.demo import demo

    return demo(threads=config.threads)


def _report(config: ReportConfig, results: str = "results") -> int:
    from lossprune.report.build import summarise_report, write_report

    said = summarise_report(write_report(Path(results), config))
    print("\n".join(map(legible, said.splitlines())))
    return EXIT_OK


def _compare(_: CompareConfig, *paths: str) -> int:
    if len(paths) != 2:
        raise ValueError(
            f"compare takes two runs or two folders of results, got {len(paths)}: "
            "lossprune compare A B"
        )
    from lossprune.report.comparison import compare

    print(compare(Path(paths[0]), Path(paths[1])))
    return EXIT_OK


def _prune(config: PruneConfig, build: str | None = None) -> int:
    if build is None:
        raise ValueError("prune takes MODULE:BUILD, such as mine.networks:build")
    from lossprune.commands.prune import prune_network

    prune_network(config, build)
    return EXIT_OK


def _deploy(config: DeployConfig, run: str | None = None) -> int:
    if run is None:
        raise ValueError(
            "deploy takes RUN_FOLDER, the folder of a finished run or of lossprune prune"
        )
    from lossprune.commands.deploy import deploy_run

    deploy_run(config, Path(run))
    return EXIT_OK


COMMANDS: dict[str, Command] = {
    "run": Command(RunConfig, _run, several=True),
    "sweep": Command(SweepConfig, run_sweep, argument="PLAN"),
    "status": Command(StatusConfig, show_status, argument="RESULTS"),
    "report": Command(ReportConfig, _report, argument="RESULTS"),
    "compare": Command(CompareConfig, _compare, argument="A B"),
    "prune": Command(PruneConfig, _prune, argument="MODULE:BUILD"),
    "deploy": Command(DeployConfig, _deploy, argument="RUN_FOLDER"),
    "data": Command(DataConfig, _data, argument="NAME"),
    "demo": Command(DemoConfig, _demo),
}

if __name__ == "__main__":
    sys.exit(main())
