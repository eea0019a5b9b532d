"""Whole image classifiers as one plan of the kernels, also saved, and as the API chooses."""

import copy

import pytest
import torch

import lossprune
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.whole import all_sparse
from lossprune.kernels.compiler import compiler_available
from tests.deployment.convolutional import NETWORKS

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

RELATIVE = 1e-5


def pruned(name, density=0.6):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    weights = lossprune.Mask.dense(model)
    mask = lossprune.Mask({name: torch.rand(w.shape) < density for name, w in weights.items()})
    return model, mask


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_all_of_a_network_is_one_plan(name, tmp_path):
    model, mask = pruned(name)
    network, _ = all_sparse(model, mask, torch.randn(2, 3, 23, 25))
    assert isinstance(network.network, SparseNetwork)
    Deployed(network, [], {}, []).save(tmp_path / "file")
    loaded = lossprune.load_deployed(tmp_path / "file")
    exact = mask.apply_(copy.deepcopy(model)).double()
    for batch, few in ((1, 0), (3, 5), (16, 0), (19, 5)):
        images = torch.randn(batch, 3, 23, 25)
        expected = exact(images.double())
        for one in (network, loaded):
            (part,) = sparse_networks(one)
            part.retune_(Tuning(few=few))
            assert (one(images) - expected).abs().max() <= RELATIVE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["EfficientNet", "DenseNet", "ConvNeXt"])
def test_threads_share_every_operation(name):
    model, mask = pruned(name)
    network, _ = all_sparse(model, mask, torch.randn(2, 3, 23, 25))
    (part,) = sparse_networks(network)
    part.retune_(Tuning(few=4, shared=0))
    inputs = [torch.randn(batch, 3, 23, 25) for batch in (1, 2, 5, 19)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([network(x) for x in inputs])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@torch.no_grad()
def test_no_layer_is_left_for_lack_of_an_operation():
    model, mask = pruned("EfficientNet", 0.2)
    images = torch.randn(16, 3, 23, 25)
    fast = lossprune.deploy(model, mask, images, seconds=0.2)
    assert not [note for note in fast.notes if "left out" in note or "followed" in note]
    expected = mask.apply_(copy.deepcopy(model))(images)
    assert torch.allclose(fast(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
