"""A deployed network where the network itself was: the same calls, attributes and methods."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

import lossprune
from lossprune import Mask, PruningError
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.original import Original
from lossprune.deployment.sparse.parts import in_parts
from lossprune.deployment.traced import TracedNetwork, traced
from lossprune.kernels.compiler import compiler_available

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


@dataclass
class Config:
    """What a network was made with."""

    classes: int = 3


class Classifier(nn.Module):
    """Attributes and methods of all kinds, two of which have names of a deployed network's own."""

    labels = ("cat", "dog", "cow")

    def __init__(self):
        super().__init__()
        self.config, self.temperature, self.calls = Config(), 2.0, 0
        self.layers = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 3)])
        self.notes, self.helpers = "of its author", {"first": [self.layers[0]]}
        self.score = self.rate
        self.choose = lambda logits: logits.argmax(1)

    def forward(self, x, scale=None, *, shift=None):
        x = torch.relu(self.layers[0](x))
        return self.layers[1](x if scale is None else x * scale) / self.temperature

    @property
    def device(self):
        return next(self.parameters()).device

    def predict(self, x):
        return [self.labels[k] for k in self.choose(self(x))]

    def rate(self, x):
        return self.forward(x).softmax(1)

    def hidden(self, x):
        return self.layers[0](x)

    def count(self, x):
        self.calls += 1
        return self(x)


def masked_network(kind=Classifier) -> nn.Module:
    torch.manual_seed(0)
    network = kind().eval()
    kept = {name: torch.rand(it.shape) < 0.3 for name, it in Mask.dense(network).items()}
    return Mask(kept).apply_(network)


def deployed_from_graph(network: nn.Module) -> Deployed:
    x = torch.randn(5, 12)
    trace, arguments = traced(network, (x,))
    graph = trace.module(network)
    ShapeProp(graph).propagate(x)
    parts = TracedNetwork(in_parts(graph), arguments, Original.of(network))
    return Deployed(parts, [], {}, ["sparse"])


@pytest.fixture(params=[deployed_from_graph, lambda it: Deployed(it, [], {})], ids=["graph", "one"])
def networks(request):
    """The masked network and the deployed one, from its graph and layer by layer."""
    masked = masked_network()
    return masked, request.param(copy.deepcopy(masked))


def close(one, other) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-6)


def test_calls_by_name_are_those_of_the_network(networks):
    masked, fast = networks
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert close(fast(x=x), masked(x))
        assert close(fast(x, shift=None, scale=None), masked(x))
        for named in ({"y": x}, {"x": x, "y": x}, {}):
            told = []
            for network in networks:
                with pytest.raises(TypeError) as error:
                    network(**named)
                told.append(str(error.value))
            assert "Classifier.forward() " in told[1]
            if "x" in named:
                assert told[0] == told[1]


def test_attributes_and_methods_are_those_of_the_network(networks):
    masked, fast = networks
    x = torch.randn(4, 12)
    assert fast.config == Config()
    assert (fast.temperature, fast.labels, fast.device) == (2.0, masked.labels, masked.device)
    with torch.no_grad():
        assert fast.predict(x) == masked.predict(x)
        assert close(fast.rate(x), masked.rate(x))
    assert not hasattr(fast, "nothing")
    assert fast.layers == ()
    with pytest.raises(AttributeError, match=r"Classifier.* has no attribute 'nothing'"):
        _ = fast.nothing


def test_what_would_run_or_change_the_dense_network_is_one_sentence():
    masked = masked_network()
    fast = deployed_from_graph(masked)
    x = torch.randn(4, 12)
    for name in ("helpers", "score"):
        with pytest.raises(AttributeError, match=f"'{name}' of Classifier is not in the deployed"):
            getattr(fast, name)
    with pytest.raises(AttributeError, match="'layers' of Classifier is not in the deployed"):
        fast.hidden(x)
    with pytest.raises(AttributeError, match="'calls' of a deployed Classifier cannot be set"):
        fast.count(x)
    with pytest.raises(AttributeError, match="'temperature' of a deployed Classifier cannot be"):
        fast.temperature = 1.0
    assert fast.temperature == 2.0
    fast.of_the_caller = 3
    assert fast.of_the_caller == 3


def test_setting_an_attribute_of_a_network_that_runs_its_own_code_counts():
    masked = masked_network()
    fast = Deployed(copy.deepcopy(masked), [], {})
    x = torch.randn(4, 12)
    fast.temperature = 1.0
    with torch.no_grad():
        assert close(fast(x), 2 * masked(x))


def test_its_parameters_are_the_kept_weights():
    masked = masked_network()
    fast = deployed_from_graph(masked)
    kept = sum(int(layer.weight.count_nonzero()) for layer in masked.layers) + 20 + 3
    assert sum(parameter.numel() for parameter in fast.parameters()) == kept
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert next(fast.parameters()).dtype == torch.float32
    other = deployed_from_graph(masked)
    other.load_state_dict(fast.state_dict())
    with pytest.raises(PruningError, match="load other weights into the network itself"):
        fast.load_state_dict(masked.state_dict())


@pytest.mark.parametrize("change", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_them_too(change):
    masked = masked_network()
    masked.choose = torch.argmax  # what can be pickled
    fast = deployed_from_graph(masked)
    masked.choose = lambda logits: logits.argmax(1)
    copied = change(fast)
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert close(copied(x=x), masked(x))
        assert close(copied.rate(x), masked.rate(x))
    assert (copied.config, copied.notes) == (Config(), ("sparse",))


def test_a_pickled_one_runs_where_its_class_is_not():
    class Local(Classifier):
        pass

    masked = masked_network(Local)
    there = pickle.loads(pickle.dumps(deployed_from_graph(masked)))
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert close(there(x=x), masked(x))
    assert there.temperature == 2.0
    with pytest.raises(AttributeError, match=r"no attribute 'predict', whose class .*Local is not"):
        there.predict(x)


def test_onnx_is_made_of_the_compacted_network(networks, tmp_path):
    pytest.importorskip("onnxruntime")
    _, fast = networks
    with pytest.raises(PruningError, match=r"onnx\(lossprune.compact\(network, mask\).model"):
        lossprune.export_onnx(fast, tmp_path / "network.onnx", torch.randn(4, 12))
