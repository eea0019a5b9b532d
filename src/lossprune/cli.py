"""The command line: ``lossprune run | sweep | …``, or ``python -m lossprune``.

A table of the commands, and what the exit status says of them.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lossprune.commands import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    compare,
    data,
    demo,
    deploy,
    prune,
    report,
    run,
    sensitivity,
    status,
    sweep,
)
from lossprune.experiment.config import RunConfig
from lossprune.experiment.ranks import ElsewhereError, alike, launched, leave_word, tell_launcher
from lossprune.flags import did_you_mean, entries, first_line, help_text, parse
from lossprune.sweep.plan_file import PLANS, describe_plans

_LONGEST = 500  # of an error's sentence, which may quote what a user wrote


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, and what it does with them.

    Attributes:
        config: the dataclass of its flags; the first line of its docstring is the help text.
        do: does it and returns the exit status.
        argument: leading arguments without a flag, if it takes any, as usage shows them: in
            brackets where it does without.
        needs: what is said where such an argument is not given.
        details: what help says beyond the flags.
        several: whether several processes may do it together.
    """

    config: type
    do: Callable[..., int]
    argument: str | None = None
    needs: str = ""
    details: Callable[[], str] | None = None
    several: bool = False

    def usage(self, called: str) -> str:
        """Return how it is called, but for its flags."""
        return f"{called} {self.argument}" if self.argument else called


COMMANDS = {
    "run": Command(RunConfig, run.do, several=True),
    "sweep": Command(
        sweep.SweepConfig,
        sweep.do,
        argument="PLAN",
        needs=f"a PLAN: one of {', '.join(PLANS)}, or a TOML file of your own",
        details=describe_plans,
    ),
    "status": Command(status.StatusConfig, status.do, argument="[RESULTS]"),
    "report": Command(report.ReportConfig, report.do, argument="[RESULTS]"),
    "compare": Command(compare.CompareConfig, compare.do, argument="A B"),
    "prune": Command(
        prune.PruneConfig,
        prune.do,
        argument="MODULE:BUILD",
        needs="MODULE:BUILD, such as mine.networks:build, or a FOLDER of save_pretrained",
    ),
    "sensitivity": Command(
        sensitivity.SensitivityConfig,
        sensitivity.do,
        argument="MODULE:BUILD",
        needs="MODULE:BUILD, such as mine.networks:build",
    ),
    "deploy": Command(
        deploy.DeployConfig,
        deploy.do,
        argument="RUN_FOLDER",
        needs="RUN_FOLDER, the folder of a finished run or of lossprune prune",
    ),
    "data": Command(data.DataConfig, data.do, argument="[NAME]"),
    "demo": Command(demo.DemoConfig, demo.do),
}


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
        tell_launcher(_sentence(error))
        return EXIT_ERROR


def run_main() -> int:
    """Be the published ``experiments.py``: the command ``run``, under its own name."""
    return main(["run", *sys.argv[1:]], prog="experiments.py")


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
    if "-h" in rest or "--help" in rest:
        title = prog if prog != "lossprune" else f"lossprune {name}"
        print(help_text(command.config, command.usage(title)))
        if command.details is not None:
            print(f"\n{command.details()}")
        return None
    if command.needs and not leading:
        raise ValueError(f"{name} takes {command.needs}")
    return partial(command.do, parse(command.config, rest), *leading)


def _overview(prog: str) -> str:
    usage = f"usage: {prog} COMMAND [FLAGS]"
    lines = ["Prune neural networks by modelling the loss.", "", usage, ""]
    usages = {command.usage(name): command.config for name, command in COMMANDS.items()}
    lines += entries({usage: first_line(config) for usage, config in usages.items()})
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists a command's flags."])


def _sentence(error: BaseException) -> str:
    """Return what an error says, in one line of readable length; of a surprising one its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text if len(text) < _LONGEST else f"{text[:300]} … {text[-150:]}"


if __name__ == "__main__":
    sys.exit(main())
