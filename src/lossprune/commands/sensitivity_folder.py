"""The folder that ``lossprune sensitivity`` leaves: its files and what each is for, its tables."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from lossprune.commands.output import TABLE, json_bytes, open_out
from lossprune.experiment.folder import RECORD
from lossprune.text_table import markdown_table

if TYPE_CHECKING:
    from lossprune.pruning import Sensitivity

FORMAT = "lossprune sensitivity 1"
CSV, SVG, PNG = (f"sensitivity.{ending}" for ending in ("csv", "svg", "png"))
SPARE = ("weights",)  # where there is no room for it
_MOST_NAMED = 3

# What each file is.
FILES = {
    SVG: "the figure: a panel a layer",
    PNG: "the same",
    CSV: "every layer at every sparsity, at full precision",
    TABLE: "these tables",
    RECORD: "settings, versions, every layer",
}


class NamedTable(NamedTuple):
    """A table of texts with its title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(found: "Sensitivity", max_loss_increase: float | None) -> list[NamedTable]:
    """Return the table of realised changes, and that of predicted ones where there are any."""
    steps = [f"{sparsity:g}" for sparsity in found.sparsities]
    realised = NamedTable(
        f"change of the loss with one layer pruned by {found.criterion} to a sparsity",
        ["weight", "weights", *steps],
        _rows(found, "realised_change"),
    )
    if max_loss_increase is not None:
        reached = found.within(max_loss_increase).values()  # 0: less than the least
        realised = NamedTable(
            realised.title,
            [*realised.columns, f"at most {max_loss_increase:+g}"],
            [
                [*row, f"{most:g}" if most else f"< {steps[0]}"]
                for row, most in zip(realised.rows, reached, strict=True)
            ],
        )
    if found.no_prediction:
        return [realised]
    title = "what the quadratic model with a diagonal Hessian predicts for the same weights"
    return [realised, NamedTable(title, ["weight", *steps], _rows(found, "predicted_change", 0))]


def _rows(found: "Sensitivity", change: str, counts: int = 1) -> list[list[str]]:
    """Return a row a layer: its name, how many weights it has if asked, and the changes."""
    largest = max(abs(point[change]) for point in found.rows())
    form = "{:+z.3f}" if 0.05 <= largest < 1000 else "{:+.2g}"
    return [
        [layer.name, *[f"{layer.total:,}"] * counts]
        + [form.format(getattr(point, change)) for point in layer.points]
        for layer in found.layers
    ]


def notes_of(found: "Sensitivity", guesses: Sequence[str]) -> list[str]:
    """Return what is to be said below the tables."""
    examples = f"{found.examples:,} example{'' if found.examples == 1 else 's'}"
    notes = [f"loss of the dense network {found.loss:.4g} over {examples}"]
    rising = [name for name in found.ranked() if found[name].points[-1].realised_change > 0]
    if rising:
        first, *others = rising[:_MOST_NAMED]
        then = f", then {', '.join(others)}" if others else ""
        notes.append(f"at {found.sparsities[-1]:g} the loss rises most with {first} pruned{then}")
    if found.no_prediction:
        notes.append(f"no prediction: {found.no_prediction}")
    if found.unused:
        names = ", ".join(found.unused)
        notes.append(f"note: the outputs do not depend on {names}: removing these changes nothing")
    if found.left_out:
        names = ",".join(["*", *found.left_out])
        notes.append(f"note: {found.told_left_out()}; --parameters '{names}' takes them in")
    return [*notes, *(f"note: {guess} (--weights FILE)" for guess in guesses)]


def write_folder(
    out: Path,
    found: "Sensitivity",
    record: Mapping[str, Any],
    tables: Sequence[NamedTable],
    notes: Sequence[str],
    network: str,
    max_loss_increase: float | None,
) -> None:
    """Write all files, the record last: a folder with one is whole."""
    from lossprune.report.sensitivity_figure import draw_sensitivity

    folder = open_out(out)
    folder.remove(RECORD)
    with TemporaryDirectory() as drawn:
        files = [Path(drawn, name) for name in (SVG, PNG)]
        for file in draw_sensitivity(
            found, *files, network=network, max_loss_increase=max_loss_increase
        ):
            folder.write(file.name, file.read_bytes())
    folder.write(CSV, _csv(found).encode())
    folder.write(TABLE, _markdown(tables, notes).encode())
    folder.write(RECORD, json_bytes(record))


def _csv(found: "Sensitivity") -> str:
    rows, text = found.rows(), io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _markdown(tables: Sequence[NamedTable], notes: Sequence[str]) -> str:
    parts = [f"{title}\n\n{markdown_table(columns, rows)}" for title, columns, rows in tables]
    return "\n".join([*parts, *(f"{note}\n" for note in notes)])
