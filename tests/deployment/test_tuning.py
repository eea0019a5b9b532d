"""What is fastest is found in few calls, by the processor's clock, and kept for the next time."""

import copy
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import lossprune
from lossprune.channels.calls import Call
from lossprune.deployment.candidates import Candidates
from lossprune.deployment.plans import keep, plan_key, recalled
from lossprune.deployment.race import TELLING, Budget, fastest, race
from lossprune.deployment.sparse.costs import block_cost, image_cost, likely_tiles
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.sparse.plan import library
from lossprune.deployment.sparse.steps import SparseConvolution, tiles
from lossprune.json_text import with_digest
from lossprune.kernels.compiler import compiler_available

needs_compiler = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


class Busy:
    """Keeps the processor for so many seconds, and counts its calls."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self):
        self.calls += 1
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass


def test_what_is_much_slower_is_called_no_more():
    quick, slow, known = Busy(0.001), Busy(0.03), Busy(0.2)
    best = race([known, quick, slow], Budget(5.0), known=[0.2, 0.0, 0.0])
    assert fastest(best) == 1
    assert (known.calls, slow.calls) == (0, 2)  # what is not known is called once for the caches
    assert 6 <= quick.calls <= 20
    assert best[0] == 0.2
    assert 0.001 <= best[1] < 0.0015


class Waking(nn.Module):
    """The first calls take longer than all others."""

    def __init__(self, first, count=1, seconds=0.0):
        super().__init__()
        self.first, self.count, self.seconds = first, count, seconds

    def forward(self, x=None):
        self.count -= 1
        Busy(self.first if self.count >= 0 else self.seconds)()
        return x


def test_one_slow_call_does_not_put_a_short_one_out():
    best = race([Busy(0.0002), Waking(0.0008, count=3, seconds=0.0001)], Budget(1.0))
    assert fastest(best) == 1


def test_a_first_call_that_makes_things_ready_does_not_count():
    candidates = Candidates(Waking(1.5 * TELLING), X, 1.0)
    assert candidates.add("sparse", Waking(1.2 * TELLING))
    assert max(candidates.seconds().values()) < TELLING / 2
    candidates = Candidates(Waking(1.5 * TELLING), X, 1.0)
    assert candidates.add("compacted", Waking(0.0), ready=True)
    assert max(candidates.seconds().values()) < TELLING / 2


def test_a_budget_that_is_used_up_ends_a_race():
    budget = Budget(0.0)
    calls = [Busy(0.002), Busy(0.0021)]
    assert all(taken >= 0.002 for taken in race(calls, budget))
    assert [call.calls for call in calls] == [2, 2]
    assert budget.left <= -0.008


def test_waiting_for_the_processor_is_not_counted():
    """As is what other programs take of it."""

    def waiting():
        time.sleep(0.004)

    assert torch.get_num_threads() == 1
    waited, worked = race([waiting, Busy(0.001)], Budget(1.0))
    assert waited < worked


def counted_cycles(convolution, source, kept, tile, lanes):
    """The formula of ``costs.py``, tile by tile and weight by weight."""
    channels, rows, columns = source
    _, height, width = convolution.convolved(source)
    (kh, kw), (sy, sx) = convolution.weight_shape[2:], convolution.stride
    total = 0.0
    for _ in range(0, height, tile[0]):
        for _ in range(0, width, tile[1]):
            read = {
                (y * sy + i, x * sx + j)
                for y in range(tile[0]) for x in range(tile[1])
                for i in range(kh) for j in range(kw)
            }  # fmt: skip
            high, wide = (1 + max(position[axis] for position in read) for axis in (0, 1))
            size = channels * min(high, rows) * min(wide, columns) * lanes * 4
            load = 0.5 if size <= 32768 else 1.0 if size <= 524288 else 2.0
            total += kept * (1 + tile[0] * tile[1] * load)
            total += convolution.weight_shape[0] * tile[0] * tile[1] * 3
    return total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("source", [(3, 32, 32), (64, 9, 7), (512, 4, 4)])
def test_the_cost_model_is_its_formula(source, stride):
    convolution = SparseConvolution((8, source[0], 3, 3), (stride, stride), (1, 1))
    costs = {
        tile: counted_cycles(convolution, source, 50, tile, 16)
        for tile in tiles(convolution, source)
    }
    assert costs == {tile: block_cost(convolution, source, 50, tile, 16) for tile in costs}
    likely = likely_tiles(convolution, source, 50, 16)
    assert 1 <= len(likely) <= 5
    assert costs[likely[0]] == min(costs.values())
    assert max(costs[tile] for tile in likely) <= 1.5 * min(costs.values())
    one, two = (image_cost(convolution, source, kept, 16) for kept in (50, 100))
    assert one < two <= 2 * one


class Slow(nn.Module):
    """A network that takes long in torch, and counts the calls."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.eval()

    def forward(self, x):
        if isinstance(x, torch.fx.Proxy):
            return self.layers(x)
        type(self).calls += 1
        Busy(1.2 * TELLING)()
        return self.layers(x)


def small(density=0.1, seed=0, hidden=48):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 8)).eval()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(hidden, 64, generator=generator).argsort(1)
    return network, lossprune.Mask({"0.weight": order < round(64 * density)})


X = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))


def assert_right(deployed, network, mask, x=X):
    with torch.no_grad():
        expected = mask.apply_(copy.deepcopy(network))(x)
    assert torch.allclose(deployed(x), expected, rtol=0, atol=1e-5)


@pytest.fixture
def plans(tmp_path):
    """The folder of plans, empty."""
    return tmp_path / "cache" / "plans"


@needs_compiler
def test_a_slow_network_is_called_a_few_times():
    network = Slow()
    mask = lossprune.Mask({"layers.0.weight": torch.rand(64, 64) < 0.1})
    deployed = lossprune.deploy(network, mask, X, seconds=60)
    assert Slow.calls <= 3  # to compare outputs, as masked and compacted
    assert_right(deployed, network, mask)
    assert [layer.kind for layer in deployed.layers] == ["sparse", "sparse"]
    assert deployed.seconds["masked"] >= TELLING > deployed.seconds["sparse"]


@needs_compiler
@pytest.mark.parametrize("count", [1, 20])
def test_without_a_budget_the_cost_model_decides(count, plans):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).eval()
    mask = lossprune.Mask({"0.weight": torch.rand(8, 3, 3, 3) < 0.2})
    x = torch.randn(count, 3, 8, 8)
    deployed = lossprune.deploy(network, mask, x, seconds=0)
    assert_right(deployed, network, mask, x)
    assert {"masked", "compacted", "sparse"} <= deployed.seconds.keys()
    assert all(0 < taken < 1 for taken in deployed.seconds.values())
    # What was found so is not taken where there is time for more.
    (file,) = plans.iterdir()
    before = file.read_bytes()
    lossprune.deploy(network, mask, x, seconds=0.1)
    assert file.read_bytes() != before


@needs_compiler
def test_the_second_deploy_takes_what_the_first_found(plans):
    network, mask = small()
    first = lossprune.deploy(network, mask, X)
    (file,) = plans.iterdir()
    assert file.stat().st_size < 10_000
    again = lossprune.deploy(network, small(seed=1)[1], X, seconds=1)
    assert again.seconds == first.seconds
    assert [layer.sparse_seconds for layer in again.layers] == [
        layer.sparse_seconds for layer in first.layers
    ]
    assert [(layer.name, layer.kind) for layer in again.layers] == [
        (layer.name, layer.kind) for layer in first.layers
    ]
    said = again.notes[-1].replace(" was ", " is ").replace(" were ", " are ")
    assert said.replace(" before", "") == first.notes[-1] != again.notes[-1]
    assert [part.tuning for part in sparse_networks(again)] == [
        part.tuning for part in sparse_networks(first)
    ]
    assert_right(again, network, small(seed=1)[1])
    anew = lossprune.deploy(network, mask, X, remeasure=True)
    assert anew.seconds != first.seconds


@needs_compiler
def test_another_shape_density_or_number_of_threads_is_another_plan(plans):
    network, mask = small()
    keys = {plan_key(network, Call.of(x)) for x in (X, X[:3], X.double())}
    for other, own in (small(density=0.3), small(hidden=40)):
        keys.add(plan_key(own.apply_(other), Call.of(X)))
    keys.add(plan_key(nn.Sequential(network[0], nn.Tanh(), network[2]), Call.of(X)))
    try:
        torch.set_num_threads(2)
        keys.add(plan_key(network, Call.of(X)))
    finally:
        torch.set_num_threads(1)
    assert len(keys) == 7
    assert plan_key(mask.apply_(network), Call.of(X)) not in keys, "its density is another"


DAMAGES = {
    "cut off": lambda text: text[:-20],
    "empty": lambda text: b"",
    "a digit": lambda text: text.replace(b"e-05", b"e-09").replace(b"e-06", b"e-09"),
    "no JSON": lambda text: b"\x80\x04plan",
    "another format": lambda text: json.dumps(
        with_digest({**json.loads(text), "format": "another"})
    ).encode(),
    "another object": lambda text: json.dumps(with_digest({"format": "lossprune plan 2"})).encode(),
    "a list": lambda text: b"[1]",
    "no digest": lambda text: json.dumps(
        {key: value for key, value in json.loads(text).items() if key != "sha256"}
    ).encode(),
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_plan_is_made_anew(damage, plans):
    network, mask = small()
    lossprune.deploy(network, mask, X, seconds=0.01)
    (file,) = plans.iterdir()
    damaged = DAMAGES[damage](file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    deployed = lossprune.deploy(network, mask, X, seconds=0.01)
    assert "before" not in deployed.notes[-1]
    assert_right(deployed, network, mask)
    assert recalled(file.stem, 0.01) is not None


@needs_compiler
@pytest.mark.parametrize(
    ("chosen", "dense", "works"),
    [("compacted", [], True), ("masked", [], True), ("mixed", ["2"], True), ("mixed", [], False)],
)
def test_a_plan_is_followed_if_it_fits(chosen, dense, works, plans):
    network, mask = small()
    lossprune.deploy(network, mask, X, seconds=0.01)
    (file,) = plans.iterdir()
    plan = recalled(file.stem, 0.01)
    tunings = [Tuning({}, few=9)] if dense else []
    sparse = {"0": 1.0} if dense else {}
    keep(file.stem, dataclasses.replace(
        plan, chosen=chosen, dense=dense, tunings=tunings, sparse_seconds=sparse
    ))  # fmt: skip
    deployed = lossprune.deploy(network, mask, X, seconds=0.01)
    assert_right(deployed, network, mask)
    assert ("before" in deployed.notes[-1]) == works
    if works:
        kinds = ["sparse", "dense"] if dense else ["dense", "dense"]
        assert [layer.kind for layer in deployed.layers] == kinds
        assert [part.tuning for part in sparse_networks(deployed)] == tunings


@needs_compiler
def test_layers_replaced_one_by_one_are_kept_too(plans):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 1024), nn.Linear(1024, 64)

        def forward(self, x):
            return self.last(self.first(x if x.sum() > 0 else -x))

    network = Branching().eval()
    mask = lossprune.Mask({f"{n}.weight": torch.rand_like(m.weight) < 0.02
                           for n, m in network.named_children()})  # fmt: skip
    first, again = (lossprune.deploy(network, mask, X, seconds=0.1) for _ in range(2))
    assert "layer by layer" in first.seconds
    assert first.seconds == again.seconds
    assert [layer.kind for layer in again.layers] == [layer.kind for layer in first.layers]
    assert "before" in again.notes[-1]
    assert_right(again, network, mask)


@needs_compiler
def test_plans_are_bounded_and_written_by_several_at_once(plans):
    network, mask = small()
    lossprune.deploy(network, mask, X, seconds=0.01)
    (file,) = plans.iterdir()
    plan = recalled(file.stem, 0.01)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: keep("same", plan), range(40)))
    assert recalled("same", 0.01) == plan
    for k in range(300):
        (plans / f"{k}.json").write_text("{}")
    keep("last", plan)
    files = list(plans.iterdir())
    assert len(files) <= 256
    assert recalled("last", 0.01) == plan


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    Path(tmp_path, "file").touch()
    monkeypatch.setattr(lossprune.deployment.plans, "cache_folder", lambda: tmp_path / "file")
    network, mask = small()
    for _ in range(2):
        deployed = lossprune.deploy(network, mask, X, seconds=0.01)
        assert "before" not in deployed.notes[-1]
        assert_right(deployed, network, mask)


@needs_compiler
def test_a_compiler_that_cannot_build_the_kernels_is_done_without(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    network, mask = small()
    library.cache_clear()
    try:
        deployed = lossprune.deploy(network, mask, X, seconds=0.01)
    finally:
        library.cache_clear()
    assert_right(deployed, network, mask)
    assert any("sparse was left out" in note for note in deployed.notes)
