"""A pruning that ends where the network's file is small enough, against the files themselves."""

import copy

import pytest
import torch
from torch import nn

import lossprune
from lossprune import FileSize, Mask
from lossprune.pruning import PruningError, prune_by_stage

TARGETS = torch.arange(200) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 3))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(200, 20, generator=torch.Generator().manual_seed(1)), TARGETS)]


def size(net: nn.Module, mask: Mask, folder, values: str = "exact") -> int:
    file = folder / "network.safetensors"
    lossprune.save_sparse(net, mask, file, values=values)
    return file.stat().st_size


@pytest.mark.parametrize("values", ["exact", "float16"])
def test_magnitudes_end_with_the_last_weight_that_makes_it_fit(tmp_path, values):
    net, most = network(), 5000
    fits = FileSize(net, most, values=values)
    mask = lossprune.prune(net, "MP", until=fits).mask
    assert size(net, mask, tmp_path, values) <= most
    gone = {name: net.get_parameter(name).abs().masked_fill(mask[name], 0) for name in mask}
    last = max(gone, key=lambda name: gone[name].max())
    before = {name: kept.clone() for name, kept in mask.items()}
    before[last].view(-1)[gone[last].argmax()] = True
    assert size(net, Mask(before, criterion="MP"), tmp_path, values) > most


@pytest.mark.parametrize(
    "asked",
    [
        {"stages": 6},
        {"stages": "auto", "reg": "auto"},
        {"stages": 4, "scope": "erdos-renyi"},
        {"stages": 3, "compensate": True, "recalibrate": "stages"},
    ],
)
def test_the_file_of_what_is_returned_fits_and_is_near(tmp_path, asked):
    net, most = network(), 5000
    result = lossprune.prune(net, "QM", data=data(), until=FileSize(net, most), **asked)
    reached = size(result.apply_(net), result.mask, tmp_path)
    assert most - 20 < reached <= most


def test_stopped_after_any_stage_it_goes_on_to_the_same_masks():
    net = network()
    asked = {"data": data(), "until": FileSize(net, 5000), "stages": 9, "average": 0}
    stages = list(prune_by_stage(net, "QM", **asked))
    for completed in range(1, len(stages) + 1):
        done = [record for _, record in stages[:completed]]
        start = stages[completed - 1][0]
        rest = prune_by_stage(net, "QM", start=start, completed=completed, done=done, **asked)
        assert [mask for mask, _ in rest] == [mask for mask, _ in stages[completed:]]
    assert len(stages) > 2


def test_a_network_that_fits_as_it_is_loses_nothing():
    net = network()
    result = lossprune.prune(net, "MP", until=FileSize(net, 10**6))
    assert (result.mask.removed, result.mask.total) == (0, 20 * 64 + 64 * 3)
    assert result.stages == ()


def test_the_size_is_of_moved_weights(tmp_path):
    net, moved = network(), copy.deepcopy(network())
    mask = lossprune.prune(net, "MP", sparsity=0.5).mask
    with torch.no_grad():
        moved[0].weight.mul_(torch.logspace(-30, 30, 64)[:, None])
    weights = {"0.weight": moved[0].weight}
    got = FileSize(net, 1).bytes(mask, weights)
    assert got == size(moved, mask, tmp_path) != size(net, mask, tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"until": 5}, r"until must be a function of \(mask, moved\), got 5"),
        ({"sparsity": 0.5}, "until says how far to prune, and so does sparsity=0.5"),
        ({"max_loss_increase": 1.0, "data": data()}, "a budget asks for as many weights removed"),
        ({"pattern": "2:4"}, "until ends a pruning in the midst of a stage, but pattern '2:4'"),
    ],
)
def test_what_does_not_go_together(asked, said):
    net = network()
    with pytest.raises(ValueError, match=said):
        lossprune.prune(net, "MP", **{"until": FileSize(net, 3000), **asked})


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "1k"])
def test_bytes_are_a_whole_number(most):
    with pytest.raises(ValueError, match="most must be a whole number of bytes above 0"):
        FileSize(network(), most)


def test_less_than_the_network_takes_without_any_weight():
    net = network()
    said = r"FileSize\(at most 500 bytes, .* does not hold even where all 1,472 prunable weights"
    with pytest.raises(PruningError, match=said):
        lossprune.prune(net, "MP", until=FileSize(net, 500))


def test_what_holds_of_no_weights_alone_is_reached_by_no_stage():
    net = network()

    class Nothing:
        def __call__(self, mask, moved):
            return mask.removed == mask.total

        def __repr__(self):
            return "nothing is left"

    with pytest.raises(PruningError, match=r"nothing is left does not hold where 1,471 of 1,472"):
        lossprune.prune(net, "MP", until=Nothing())
