"""Exponents of kept weights: bit for bit, near their entropy, and never silently wrong."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lossprune import Mask, PruningError, load_sparse, save_sparse
from lossprune.deployment.exponents import EXPONENTS, Split, joined, rest_bytes, split
from tests.deployment.test_sparse_file import bits, forged

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
N = 3000


def numbers(kind: str) -> torch.Tensor:
    """Weights as pruning by magnitudes leaves them, with some of every other sort."""
    values = torch.randn(10 * N, generator=torch.Generator().manual_seed(0))
    values = 0.02 * values[values.abs() > 1.6][:N]
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 6e-8, -3e38])
    values[100:108] = odd
    return values.to(getattr(torch, kind))


def words(values: torch.Tensor) -> np.ndarray:
    size = values.element_size()
    return np.frombuffer(bits(values), f"u{size}")


@pytest.mark.parametrize("kind", EXPONENTS)
@given(data=st.data())
def test_any_words_come_back(kind, data):
    limit = 2 ** (8 * SIZES[kind])
    some = data.draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=5))
    drawn = data.draw(st.lists(st.sampled_from(some), max_size=200))
    given_words = np.array(drawn, f"u{SIZES[kind]}")
    found = split(given_words, kind)
    assert len(found.rest) == rest_bytes(len(drawn), kind)
    assert np.array_equal(joined(found, len(drawn), kind), given_words)


@pytest.mark.parametrize("kind", EXPONENTS)
def test_heads_take_little_more_than_their_entropy(kind):
    given_words = words(numbers(kind))
    found = split(given_words, kind)
    below = 8 * SIZES[kind] - 2 - EXPONENTS[kind]
    heads = (given_words >> below) % 2 ** (EXPONENTS[kind] + 1)
    share = np.unique(heads, return_counts=True)[1] / N
    entropy = -N * (share * np.log2(share)).sum()
    assert entropy / 8 < len(found.code) < 1.05 * entropy / 8 + 11 * len(share)


class One(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def format_of(path) -> str:
    contents = path.read_bytes()
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    return header["__metadata__"]["format"]


@pytest.mark.parametrize("kind", EXPONENTS)
def test_weights_in_files_come_back_bit_for_bit_and_smaller(kind, tmp_path):
    kept = torch.arange(4 * N) % 4 == 1
    weight = torch.zeros(4 * N, dtype=getattr(torch, kind))
    weight[kept] = numbers(kind)
    network, other = One(weight), One(torch.ones_like(weight))
    save_sparse(network, Mask({"weight": kept}), tmp_path / "small")
    assert load_sparse(tmp_path / "small", other) == Mask({"weight": kept})
    assert bits(other.weight) == bits(network.weight)
    assert format_of(tmp_path / "small") == "lossprune sparse network 2"
    positions = len(kept) / 8
    assert (tmp_path / "small").stat().st_size < 0.9 * N * SIZES[kind] + positions + 700


def test_a_file_in_which_it_gains_nothing_is_of_the_first_format(tmp_path):
    network = nn.Linear(12, 9)
    save_sparse(network, Mask.dense(network), tmp_path / "small")
    assert format_of(tmp_path / "small") == "lossprune sparse network 1"


def test_changed_codes_are_refused_or_of_as_many_numbers():
    found = split(words(numbers("float32")), "float32")
    generator, refused = random.Random(0), 0
    for _ in range(300):
        code = found.code.copy()
        code[generator.randrange(min(len(code), 200))] ^= generator.randrange(1, 256)
        code = code[: generator.choice((len(code), generator.randrange(len(code))))]
        try:
            assert len(joined(Split(code, found.rest), N, "float32")) == N
        except ValueError:
            refused += 1
    assert refused > 200


FORGED = {
    "another type": lambda said, header: said["weight"].update(stored="float16"),
    "no exponents": lambda said, header: said["weight"].update(stored="int32", dtype="int32"),
    "more": lambda said, header: said["weight"].update(marked=said["weight"]["marked"] + 1),
    "values, too": lambda said, header: said["weight"].update(values="00000000"),
    "no rest": lambda said, header: said["weight"].pop("rest"),
    "bytes": lambda said, header: header["exponents:weight"].update(dtype="I8"),
    "exchanged": lambda said, header: header.update(
        {"exponents:weight": header["kept:weight"], "kept:weight": header["exponents:weight"]}
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_are_refused_in_one_sentence(kind, tmp_path):
    network = One(numbers("float32"))
    save_sparse(network, Mask({"weight": torch.arange(N) % 8 > 0}), tmp_path / "good")
    contents = (tmp_path / "good").read_bytes()
    (tmp_path / "good").write_bytes(forged(contents, lambda said, header: None))
    load_sparse(tmp_path / "good", One(torch.ones(N)))
    (tmp_path / "forged").write_bytes(forged(contents, FORGED[kind]))
    with pytest.raises(PruningError, match="forged") as caught:
        load_sparse(tmp_path / "forged", network)
    assert "\n" not in str(caught.value)
