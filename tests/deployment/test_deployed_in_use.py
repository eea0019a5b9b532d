"""A deployed network in the hands of torch's transformations: right, or one sentence."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from lossprune import Mask, PruningError
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.sparse.parts import in_parts
from lossprune.kernels.compiler import compiler_available

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


class Mixed(nn.Module):
    """Sparse steps around what torch computes."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.last(torch.softmax(self.gate(torch.relu(self.first(x))), 1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


@pytest.fixture(params=[plain, Mixed])
def networks(request):
    """The masked network and the deployed one, all of whose layers are sparse."""
    torch.manual_seed(0)
    masked = request.param().eval()
    Mask({name: torch.rand(it.shape) < 0.3 for name, it in Mask.dense(masked).items()}).apply_(
        masked
    )
    graph = torch.fx.symbolic_trace(masked)
    ShapeProp(graph).propagate(torch.randn(5, 12))
    return masked, Deployed(in_parts(graph), [], {})


def same(deployed, masked, x) -> bool:
    with torch.no_grad():
        return torch.allclose(deployed(x), masked(x), rtol=0, atol=1e-6)


RECORDERS = {
    "jit.trace": torch.jit.trace,
    "jit.trace without its check": lambda it, x: torch.jit.trace(it, x, check_trace=False),
    "jit.script": lambda it, x: torch.jit.script(it),
    "export": lambda it, x: torch.export.export(it, (x,)),
    "make_fx": lambda it, x: make_fx(it)(x),
    "make_fx of fake tensors": lambda it, x: make_fx(it, tracing_mode="fake")(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_what_cannot_be_recorded_is_refused(networks, record):
    _, deployed = networks
    with torch.no_grad(), pytest.raises(PruningError, match=r"which torch\.jit, torch\.export and"):
        record(deployed, torch.randn(5, 12))


def test_a_compiled_deployed_network_gives_the_same(networks):
    masked, deployed = networks
    compiled = torch.compile(deployed, backend="eager")
    for examples in (5, 2, 5, 0):
        assert same(compiled, masked, torch.randn(examples, 12))


def saved(deployed):
    buffer = io.BytesIO()
    torch.save(deployed, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


KEPT = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "torch.save": saved,
    "train": lambda it: it.train(),
    "float": lambda it: it.float(),
    "to": lambda it: it.to("cpu", torch.float32),
    "share_memory": lambda it: it.share_memory(),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_it_may_be_copied_and_moved_where_it_can_run(networks, change):
    masked, deployed = networks
    assert same(change(deployed), masked, torch.randn(3, 12))


CONVERTED = {
    "double": (lambda it: it.double(), "cannot be made torch.float64 on cpu"),
    "half": (lambda it: it.half(), "cannot be made torch.float16 on cpu"),
    "meta": (lambda it: it.to("meta"), "cannot be made torch.float32 on meta"),
    "emptied": (lambda it: it.to_empty(device="cpu"), "cannot be emptied"),
}


@pytest.mark.parametrize(("change", "message"), CONVERTED.values(), ids=CONVERTED)
def test_a_type_or_device_that_the_kernels_lack_is_refused_and_nothing_changed(
    networks, change, message
):
    masked, deployed = networks
    with pytest.raises(PruningError, match=message):
        change(deployed)
    assert {it.dtype for it in deployed.buffers()} <= {torch.float32, torch.int64, torch.int32}
    assert same(deployed, masked, torch.randn(3, 12))


def test_other_weights_by_functional_call_are_the_ones_that_count(networks):
    masked, deployed = networks
    x = torch.randn(3, 12)
    assert same(deployed, masked, x)
    zeros = {
        name: torch.zeros_like(it)
        for name, it in deployed.state_dict().items()
        if it.is_floating_point()
    }
    copied = copy.deepcopy(deployed)
    assert same(copied, masked, x)
    with torch.no_grad():
        assert not torch.func.functional_call(deployed, zeros, (x,)).any()
        assert not torch.func.functional_call(copied, zeros, (x,)).any()
    assert same(deployed, masked, x)


def test_under_autocast_it_computes_in_single_precision(networks):
    masked, deployed = networks
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deployed(x).dtype == torch.float32
        assert torch.equal(deployed(x), deployed(x.clone()))
        rounded = deployed(x.bfloat16())
    with torch.no_grad():
        assert torch.allclose(rounded, masked(x.bfloat16().float()), rtol=0, atol=0.02)
    assert same(deployed, masked, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(12, 3).t(), lambda: torch.randn(1, 12).expand(4, 12),
        lambda: torch._neg_view(torch.randn(3, 12)), lambda: torch.randn(6, 24)[::2, ::2],
        lambda: torch.randn(0, 12),
    ],
    ids=["transposed", "expanded", "negated", "strided", "empty"],
)  # fmt: skip
def test_an_input_however_it_lies_in_memory(networks, make):
    masked, deployed = networks
    assert same(deployed, masked, make())


def dual(deployed, x):
    with forward_ad.dual_level():
        deployed(forward_ad.make_dual(x, x))


REFUSED = {
    "vmap": (lambda it, x: torch.vmap(it)(x[None]), "those of torch.func"),
    "jvp": (lambda it, x: torch.func.jvp(it, (x,), (x,)), "those of torch.func"),
    "grad": (lambda it, x: torch.func.grad(lambda y: it(y).sum())(x), "computes no gradients"),
    "forward mode": (dual, "no dual tensors"),
    "parameter": (lambda it, x: it(nn.Parameter(x)), "computes no gradients"),
    "sparse": (lambda it, x: it(x.to_sparse()), "layout torch.sparse_coo"),
    "mkldnn": (lambda it, x: it(x.to_mkldnn()), "layout torch._mkldnn"),
    "meta": (lambda it, x: it(x.to("meta")), "float32 on meta"),
    "half": (lambda it, x: it(x.half()), "got torch.float16"),
    "array": (lambda it, x: it(x.numpy()), "takes tensors, got ndarray"),
    "nothing": (lambda it, x: it(None), "takes tensors, got NoneType"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_cannot_read_or_give_is_refused(networks, call, message):
    _, deployed = networks
    with pytest.raises(PruningError, match=message) as refusal:
        call(deployed, torch.randn(3, 12))
    assert "\n" not in str(refusal.value)


def test_a_batch_norm_of_other_channels_reads_nothing_beyond_its_own():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).eval()
    graph = torch.fx.symbolic_trace(model)
    ShapeProp(graph).propagate(torch.randn(2, 3, 5, 5))
    deployed = Deployed(in_parts(graph), [], {})
    with pytest.raises(PruningError, match="takes 3 channels, its input has shape"):
        deployed(torch.randn(2, 7, 5, 5))
