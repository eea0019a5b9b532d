"""Every public call on networks of the kinds that people have: right, or refused in a sentence."""

import os

import pytest

from tests.models.architectures import ARCHITECTURES
from tests.models.calls import CALLS, outcome
from tests.models.expectations import REFUSED, page

FULL = "LOSSPRUNE_FULL" in os.environ
CELLS = [
    (name, call)
    for name, architecture in ARCHITECTURES.items()
    for call in CALLS
    if FULL
    or not (architecture.heavy or (call in ("export_onnx", "sparse") and not architecture.onnx))
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "call"), CELLS)
def test_right_or_refused_in_one_sentence(name, call, tmp_path):
    sentence, words = outcome(name, call, tmp_path), REFUSED.get((name, call))
    if words is None:
        assert sentence is None
    else:
        assert sentence is not None
        assert words in sentence


def test_the_documentation_shows_these_expectations(root):
    assert (root / "docs" / "models.md").read_text() == page(REFUSED)
