"""The tables of ``lossprune deploy``: a pruned network's forms, and other engines beside them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lossprune.commands.deployable import Deployable
from lossprune.commands.engines import Beside
from lossprune.commands.forms import MadeForms
from lossprune.commands.output import NETWORK, TABLE
from lossprune.deployment.timing import Timing
from lossprune.pruning.names import counted
from lossprune.text_table import markdown_table, print_lines, print_table


@dataclass(frozen=True)
class Measured:
    """The forms of a network, their times, and the engines beside them.

    Attributes:
        made: the forms.
        timings: of a call, by the form's name and the batch size.
        values: of kept weights in the file, ``exact`` or ``float16``.
        rounding: what that rounds away.
        beside: other engines.
    """

    made: MadeForms
    timings: Mapping[str, Mapping[int, Timing]]
    values: str
    rounding: Sequence[str]
    beside: Beside


def markdown_of(source: Deployable, measured: Measured) -> str:
    """Return both tables with their notes, times with quartiles."""
    texts = [markdown_table(*_forms(source, measured, _quartiles)), *_notes(source, measured)]
    if measured.beside.engines:
        texts.append(markdown_table(*_engines(measured.beside, _quartiles)))
    texts += _notes_beside(measured.beside)
    return "\n".join(f"{text.rstrip()}\n" for text in texts)


def print_tables(source: Deployable, measured: Measured) -> None:
    """Print both tables with their notes, times as medians."""
    spare = ("parameters", "multiply-adds")
    print_table(source.title, *_forms(source, measured, _median), spare=spare)
    print_lines(_notes(source, measured))
    if measured.beside.engines:
        print_table("beside other engines", *_engines(measured.beside, _median))
    print_lines(_notes_beside(measured.beside))


def _forms(
    source: Deployable, measured: Measured, told: Callable[[Timing], str]
) -> tuple[list[str], list[list[str]]]:
    latencies = [f"ms at {batch}" for batch in measured.beside.asked.batches]
    tested = source.accuracy is not None
    accuracy = ["accuracy"] if tested else []
    return ["form", "parameters", "non-zeros", "bytes", "multiply-adds", *latencies, *accuracy], [
        [
            form.name,
            f"{form.parameters:,}",
            f"{form.nonzeros:,}",
            f"{form.size:,}",
            f"{form.multiply_adds:,}",
            *(told(timing) for timing in measured.timings[form.name].values()),
            *(["–" if form.accuracy is None else f"{form.accuracy:.2%}"] if tested else []),
        ]
        for form in measured.made.forms
    ]


def _notes(source: Deployable, measured: Measured) -> list[str]:
    rounds = statistics.median(
        timing.count for timings in measured.timings.values() for timing in timings.values()
    )
    threads = torch.get_num_threads()
    return [
        f"milliseconds a batch: median of {rounds:.0f} interleaved rounds, with quartiles in "
        f"{TABLE}; {counted(threads, 'thread')}",
        f"bytes: dense, the state dict; masked, compacted and deployed, {NETWORK}, "
        f"with {measured.values} values",
        _note_of_dense(source),
        *(f"left out: {name}: {reason}" for name, reason in measured.made.left_out.items()),
        *measured.rounding,
    ]


def _note_of_dense(source: Deployable) -> str:
    if source.accuracy is None:
        return "dense: a new network, for its size and times"
    if source.before is None:
        return "accuracy: on the test data; the record does not tell that before pruning"
    return "accuracy: on the test data; dense, before pruning, from the record"


def _engines(beside: Beside, told: Callable[[Timing], str]) -> tuple[list[str], list[list[str]]]:
    batches = beside.asked.batches
    largest = max(batches)
    latencies = [f"ms at {batch}" for batch in batches]
    return ["engine", *latencies, "images/s", "first ms", "ready s", "MiB", "file"], [
        [
            f"{engine.name} (wrong)" if engine.wrong else engine.name,
            *(told(engine.latency[batch]) for batch in batches),
            f"{largest / engine.latency[largest].median:,.0f}",
            f"{1e3 * engine.told[largest]['first_call_s']:.3g}",
            f"{sum(told['ready_processor_s'] for told in engine.told.values()):.2f}",
            f"{sum(told['memory_mib'] for told in engine.told.values()):,.0f}",
            f"{engine.size:,}",
        ]
        for engine in beside.engines
    ]


def _notes_beside(beside: Beside) -> list[str]:
    asked = beside.asked
    if not asked.others:
        return []
    clock = "processor time, one thread" if asked.threads == 1 else f"{asked.threads} threads"
    return [
        f"engines: other packages' in processes of their own, in turn; milliseconds a batch, "
        f"{clock}; images/s and first ms, the first call, at {max(asked.batches)}; ready s: "
        "processor seconds until all batch sizes can be called, with tuning where no earlier "
        "deploy left its plan; MiB: memory for that and the first calls; file: bytes of what is "
        "loaded",
        *(f"left out: {name}: {reason}" for name, reason in beside.left_out.items()),
        *(
            f"wrong: {engine.name}: its outputs are not torch's"
            for engine in beside.engines
            if engine.wrong
        ),
    ]


def _median(timing: Timing) -> str:
    return f"{1e3 * timing.median:.3g}"


def _quartiles(timing: Timing) -> str:
    low, median, high = (f"{1e3 * value:.3g}" for value in (timing.low, timing.median, timing.high))
    return f"{median} ({low} to {high})"
