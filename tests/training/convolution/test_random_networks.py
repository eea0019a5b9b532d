"""Networks drawn at random: residual branches, norms, pools and activations between the layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lossprune
from lossprune.kernels.compiler import compiler_available
from lossprune.training.convolution.model import SparseModel
from tests.channels.random_networks import masks, networks, randomised
from tests.training.convolution.oracle import drawn, masked

pytestmark = [
    pytest.mark.skipif(not compiler_available(), reason="no C compiler here"),
    pytest.mark.full("sparse training of networks drawn at random"),
]


def computed(network: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Outputs and all gradients."""
    network.zero_grad()
    own = x.clone().requires_grad_()
    out = network(own)
    out.backward(drawn(*out.shape, seed=1).to(out))
    gradients = {name: p.grad for name, p in network.named_parameters()}
    if isinstance(network, SparseModel):
        gradients = {name: p.grad for name, p, _ in network.mirrored()}
    return {"outputs": out.detach(), "inputs": own.grad, **gradients}


@given(st.data(), networks(), st.integers(0, 99), st.sampled_from([2, 5, 17, 33]), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_random_networks(data, network, seed, images, training):
    """No further from double precision than 1e-5, or than ten times what torch's own single is.

    Where much cancels in a gradient, as behind a norm of few values, nobody's float32 is closer.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = data.draw(masks(randomised(network, generator).float(), generator))
    x = drawn(images, 2, 7, 6, seed=seed)
    model = lossprune.sparse(network, mask, x)
    dense = masked(network, mask)
    single = masked(network, mask).float()
    places = {name: kept for name, _, kept in model.mirrored()}
    found, exact, theirs = (
        computed(one.train(training), batch)
        for one, batch in ((model, x), (dense, x.double()), (single, x))
    )
    overall = max(float(right.abs().max()) for right in exact.values() if right is not None)
    for name, right in exact.items():
        if right is None:
            assert found[name] is None, name
            continue
        error = (theirs[name] - right).abs().max()
        kept = places.get(name)
        at = right if kept is None else right.flatten()[kept.long()]
        ours = (found[name] - at).abs().max() if at.numel() else 0.0
        assert ours <= max(1e-5 * float(right.abs().max()), 10 * error, 1e-6 * overall), name
