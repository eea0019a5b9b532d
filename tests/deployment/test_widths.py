"""The kernels as other machines have them: vectors of 8 and of 4 numbers."""

import platform

import pytest
import torch
from torch import nn

from lossprune import Mask
from lossprune.deployment.sparse import network, plan
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.whole import all_sparse
from lossprune.kernels.compiler import compiler_available, load
from lossprune.kernels.threads import ThreadsStruct
from tests.deployment.convolutional import NETWORKS

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

# What machines of such vectors do not have; -O0 builds in a quarter of the time.
FLAGS = {8: ("-O0", "-mno-avx512f"), 4: ("-O0", "-mno-avx512f", "-mno-avx")}
TOKENS = nn.Sequential(nn.Linear(9, 21), nn.GELU(), nn.Linear(21, 17), nn.Tanh(), nn.Linear(17, 5))
CASES = {
    **{name: (NETWORKS[name], (3, 23, 25)) for name in ("MobileNetV3", "Inception", "ConvNeXt")},
    "tokens": (lambda: TOKENS, (7, 9)),
    "perceptron": (lambda: TOKENS, (9,)),
}


@pytest.fixture(scope="module", params=FLAGS)
def lanes(request):
    """The kernels are built for vectors of so many numbers."""
    wide, narrow = plan.library(), platform.machine() in ("x86_64", "AMD64")
    flags = [one for one in FLAGS[request.param] if narrow or not one.startswith("-mno")]
    structures = {
        "Map": plan.MapStruct, "Operation": plan.OperationStruct, "Threads": ThreadsStruct
    }  # fmt: skip
    built = load(
        plan.SOURCE,
        flags=(*flags, f"-DLANES={request.param}"),
        constants=plan.CONSTANTS,
        structures=structures,
    )
    built.run.argtypes, built.run.restype = wide.run.argtypes, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "library", lambda: built)
        patch.setattr(network, "lanes", lambda: request.param)
        yield request.param


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_narrow_vectors_give_the_same(lanes, name):
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().eval()
    mask = Mask({key: torch.rand(w.shape) < 0.5 for key, w in Mask.dense(model).items()})
    sparse, _ = all_sparse(model, mask, torch.randn(2, *shape))
    (part,), masked = sparse_networks(sparse), mask.apply_(model)
    assert lanes == plan.library().lanes()
    for batch, few in ((1, 0), (3, 5), (19, 2)):
        inputs = torch.randn(batch, *shape)
        part.retune_(Tuning(few=few))
        expected = masked(inputs)
        assert torch.allclose(sparse(inputs), expected, rtol=0, atol=2e-5 * expected.abs().max())
