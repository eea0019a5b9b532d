"""What ``benchmarks.sparse_convolution layers`` prints of its rows."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.cells import print_markdown
from benchmarks.convolution_layers import DENSE, OURS, PEER, TURNED, Row
from benchmarks.stacked import spread
from benchmarks.timed_layer import DIRECTIONS


def fastest(row: Row, engine: str, direction: str, layout: str = "") -> list[float] | None:
    """Seconds of the fastest layout of an engine, in this direction; None: it was not measured."""
    found = [
        times[direction]
        for name, times in row["seconds"].items()
        if name.split()[0] == engine and layout in name
    ]
    return min(found, key=statistics.median, default=None)


def ratios(row: Row, engine: str, direction: str) -> dict[str, float] | None:
    """How often as long an engine takes as ours, round by round."""
    theirs, own = fastest(row, engine, direction), fastest(row, OURS, direction)
    if theirs is None or own is None:
        return None
    return spread([slow / fast for slow, fast in zip(theirs, own, strict=True)])


def operations(row: Row, direction: str) -> int:
    """On kept weights: of the backward pass, for the gradients of weights and of inputs."""
    gradients = 1 if direction == "forward" or row["first"] else 2
    return 2 * gradients * row["multiply_adds"]


def print_rows(rows: Sequence[Row], peak: float) -> None:
    """A table of one batch size and one number of threads; ``peak`` of one core."""
    lines = []
    for row in rows:
        for direction in DIRECTIONS:
            own = statistics.median(fastest(row, OURS, direction) or [math.nan])
            rate = operations(row, direction) / own
            lines.append([
                row["layer"], direction, f"{row['kept'] / row['of']:.1%}", row["chosen"],
                *(_milliseconds(fastest(row, *which)) for which in (
                    (OURS, direction), (DENSE, direction), (PEER, direction, "called"),
                    (PEER, direction, "chain"), (PEER, direction, "rows"),
                )),
                f"{rate / 1e9:.0f}", f"{rate / peak / row['threads']:.0%}",
                *(_ratio(ratios(row, engine, direction)) for engine in (PEER, DENSE, TURNED)),
            ])  # fmt: skip
    header = (
        "layer", "pass", "kept", "chosen", "ms", "torch ms", "SparseProp over batch", "in a chain",
        "over rows", "GFLOP/s", "of peak", "× SparseProp", "× torch", "× torch, turned",
    )  # fmt: skip
    print_markdown(header, lines)


def _milliseconds(seconds: list[float] | None) -> str:
    return "" if seconds is None else f"{1e3 * statistics.median(seconds):.2f}"


def _ratio(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def means(rows: Sequence[Row], engine: str) -> dict[str, dict[str, float]]:
    """Geometric mean and least of the ratios to an engine, by direction and by which layers."""
    choices = {
        "convolutions": [row for row in rows if not row["linear"]],
        "all layers": rows,
        "all that are sparse in a network": [row for row in rows if row["chosen"] == "sparse"],
    }
    found: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        for which, some in choices.items():
            each = [ratio["median"] for row in some if (ratio := ratios(row, engine, direction))]
            if each:
                mean = statistics.geometric_mean(each)
                found[f"{direction}, {which}"] = {"geometric mean": mean, "least": min(each)}
    return found
