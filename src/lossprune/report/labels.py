"""What figures are called and say of themselves: one text for the files and the page."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lossprune.report import series

_LONGEST_SLUG = 100


@dataclass(frozen=True)
class Labels:
    """What a figure says of itself.

    Attributes:
        title: what is drawn against what.
        marks: what a line, a band and a dot are, and at which λ.
        x: along the axis.
        y: the same upwards; empty where the panels differ in it.
    """

    title: str
    marks: str
    x: str
    y: str


_BEST = "at the λ of the lowest validation loss after pruning"
_SEEDS = "line: mean over seeds; dot: a seed"

LABELS = {
    "error-against-sparsity": Labels(
        "Loss and error against sparsity", f"each {_BEST}; {_SEEDS}", "weights kept, %", ""
    ),
    "loss-against-lambda": Labels(
        "Loss after pruning against λ",
        "line: mean over seeds; band: lowest to highest",
        "λ",
        "training loss after pruning",
    ),
    "error-against-stages": Labels(
        "Error after fine-tuning against stages",
        f"{_BEST}; {_SEEDS}",
        "stages π",
        "test error after fine-tuning, %",
    ),
    "loss-change-against-error-gap": Labels(
        "Loss change against error gap after fine-tuning",
        "dot: a run; ρ: Spearman’s, with its 95 % bootstrap interval",
        "ΔL by pruning",
        "error gap, points",
    ),
    "validation-against-sparsity": Labels(
        "Loss and error on validation data on the way to a budget",
        "line: a run; large dot: what it came to",
        "weights kept, %",
        "",
    ),
    "lambda-of-stages": Labels(
        "λ of the stages",
        "line: a run; dot: what a stage chose",
        "weights kept before the stage, %",
        "λ",
    ),
    "predicted-against-realised": Labels(
        "Predicted against realised loss change, stage by stage",
        f"{_BEST}; dot: a stage; dashed line: exact",
        "predicted ΔL of a stage",
        "realised ΔL of a stage",
    ),
    "layer-sparsity": Labels(
        "Weights kept, layer by layer", f"{_BEST}; mean over seeds", "layer", "weights kept, %"
    ),
    "training-curves": Labels(
        "Validation error while fine-tuning",
        f"{_BEST}; mean over seeds",
        "epoch",
        "validation error, %",
    ),
}
"""Of each figure by its name, with which the names of its files begin."""

MEASURES = {
    series.LOSS: "training loss after pruning",
    series.PRUNED_ERROR: "test error after pruning, %",
    series.ERROR: "test error, %, after ",
}
"""What the panels of error against sparsity draw upwards; the last one goes on with the tuning."""


def file_slugs(names: Iterable[str]) -> dict[str, str]:
    """Return each name as a part of a file name, no two alike.

    Of a long one that is its beginning and a digest; one that others would share has a digest too.

    >>> file_slugs(["MLP on mnist, 98.847 % removed", "mine:mlp on digits"])
    {'MLP on mnist, 98.847 % removed': 'mlp-on-mnist-98.847-removed',
     'mine:mlp on digits': 'mine-mlp-on-digits'}
    """
    slugged = {name: re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") for name in names}
    count = Counter(slugged.values())
    return {
        name: slug if count[slug] == 1 and 0 < len(slug) <= _LONGEST_SLUG else _digested(slug, name)
        for name, slug in slugged.items()
    }


def _digested(slug: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"{slug[:_LONGEST_SLUG]}-{digest}"
