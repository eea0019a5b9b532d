"""Deployed networks in files: they come back as they were, or the file is refused by name."""

import copy
import dataclasses
import json
import resource
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune import PruningError
from lossprune.deployment.choices import LayerChoice
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.saved.format import FORMAT, packed, unpacked
from lossprune.deployment.saved.parts import _READS
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.sparse.steps import MapActivation, MapSplit, SparseOperation
from lossprune.deployment.whole import all_sparse
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning.mask_file import UNSIGNED, signed

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


class Residual(nn.Module):
    """Every operation, of two inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.skip = nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.Conv2d(8, 8, 1, 2)
        self.pool, self.head, self.kind = nn.MaxPool2d(3, 1), nn.Linear(16, 5), "a"
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)

    def forward(self, x, extra):
        x = torch.tanh(self.norm(torch.relu(self.stem(x))))
        x = self.pool(torch.relu(self.down(x) + self.skip(x))) + extra
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([F.leaky_relu(x, 0.1), F.avg_pool2d(x, 3, 1, 1).clamp(max=2.0)], 1)
        x = F.adaptive_avg_pool2d(F.interpolate(x, scale_factor=2), 1)
        return self.head(torch.flatten(x, 1))


class OfTokens(nn.Module):
    """Norms, places, attention, a mean and a token."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.places, self.last = nn.Parameter(torch.randn(1, 6, 8)), nn.Linear(8, 3)
        self.patches = nn.Conv2d(3, 8, 2, 2)

    def forward(self, x):
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2) + self.places)
        x = self.attention(x, x, x)[0]
        return self.last(x[:, -1]), self.last(x.mean(1))


class Perceptron(nn.Module):
    """Returns two values by name."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x, scaled=True):
        hidden = torch.tanh(self.first(x))
        return {"logits": self.last(hidden), "all": (x, [hidden], None, 0.5)}


def deployed(model, *example):
    """The pruned network, all of whose steps are the kernels'; with an account of it."""
    generator = torch.Generator().manual_seed(0)
    mask = lossprune.Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < 0.4
            for name, weight in lossprune.Mask.dense(model.eval()).items()
        }
    )
    network, _ = all_sparse(model, mask, example)
    for part in sparse_networks(network):
        part.retune_(Tuning({step.target: (1, 2) for step in part.steps}, 3, 77))
    layers = [LayerChoice("first", "sparse", 3, 9, 27, None, 0.5)]
    return Deployed(network, layers, {"sparse": 0.25, "masked": 1.0}, ["one note"])


def convolutional():
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
    pooled = nn.Conv2d(6, 8, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *pooled, nn.Linear(8, 4))


def images(n=4):
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A deployed network, and its file."""
    torch.manual_seed(0)
    network = deployed(convolutional(), images())
    path = tmp_path_factory.mktemp("saved") / "network.deployed"
    network.save(path)
    return network, path


def test_it_comes_back_as_it_was(saved, tmp_path):
    network, path = saved
    loaded = lossprune.load_deployed(path)
    for count in (1, 2, 5, 40):
        assert torch.equal(loaded(images(count)), network(images(count)))
    for name in ("layers", "seconds", "notes"):
        assert getattr(loaded, name) == getattr(network, name)
    (part,), (before,) = sparse_networks(loaded), sparse_networks(network)
    assert (part.steps, part.tuning) == (before.steps, before.tuning)
    assert not loaded.training
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_arguments_attributes_and_containers_are_those_of_the_network(tmp_path):
    network = deployed(Perceptron(), torch.randn(2, 12))
    network.save(tmp_path / "file")
    loaded = lossprune.load_deployed(tmp_path / "file")
    x = torch.randn(7, 12)
    found, expected = loaded(x=x), network(x)
    assert torch.equal(found["logits"], expected["logits"])
    assert isinstance(found["all"], tuple)
    assert isinstance(found["all"][1], list)
    assert found["all"][2:] == (None, 0.5)
    with pytest.raises(PruningError, match="deployed for scaled = True"):
        loaded(x, scaled=False)
    with pytest.raises(AttributeError, match="'first' of Perceptron is not in the deployed"):
        loaded.first  # noqa: B018


def test_every_operation_and_several_inputs(tmp_path):
    torch.manual_seed(0)
    network = deployed(Residual(), images(), extra := torch.randn(4, 8, 3, 3))
    network.save(tmp_path / "file")
    loaded = lossprune.load_deployed(tmp_path / "file")
    assert torch.equal(loaded(images(), extra), network(images(), extra))
    assert loaded.kind == "a"
    tokens = deployed(OfTokens(), torch.randn(2, 3, 4, 6))
    tokens.save(tmp_path / "tokens")
    loaded_tokens = lossprune.load_deployed(tmp_path / "tokens")
    for n in (2, 30):
        x = torch.randn(n, 3, 4, 6)
        assert same(loaded_tokens(x), tokens(x))
    parts = [part for one in (loaded, loaded_tokens) for part in sparse_networks(one)]
    assert {type(step.operation) for part in parts for step in part.steps} == {*_READS}


def test_rows_of_tokens(tmp_path):
    torch.manual_seed(0)
    network = deployed(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(2, 3, 6)
    )
    network.save(tmp_path / "file")
    loaded = lossprune.load_deployed(tmp_path / "file")
    for shape in ((2, 3, 6), (6,), (4, 1, 5, 6)):
        assert torch.equal(loaded(torch.ones(shape)), network(torch.ones(shape)))


def test_another_process_loads_it_without_the_network_and_without_a_compiler(saved):
    network, path = saved
    code = (
        "import subprocess, sys, torch, lossprune\n"
        "subprocess.run = None\n"
        "loaded = lossprune.load_deployed(sys.argv[1])\n"
        "print(loaded(torch.linspace(-1, 1, 486).view(2, 3, 9, 9)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = network(torch.linspace(-1, 1, 486).view(2, 3, 9, 9))
    assert json.loads(done.stdout) == expected.tolist()


def refusal(path) -> str:
    with pytest.raises(PruningError) as told:
        lossprune.load_deployed(path)
    assert str(told.value).startswith(str(path))
    return str(told.value).removeprefix(f"{path} ")


def test_a_changed_or_missing_byte_is_noticed(saved, tmp_path):
    contents = saved[1].read_bytes()
    path = tmp_path / "file"
    for where in np.linspace(0, len(contents) - 1, 200).astype(int):
        path.write_bytes(contents[:where])
        refusal(path)
        path.write_bytes(contents[:where] + bytes([contents[where] ^ 4]) + contents[where + 1 :])
        refusal(path)
    path.write_bytes(contents + b"\0")
    refusal(path)


def test_foreign_files_and_those_of_a_newer_version_are_refused(saved, tmp_path):
    path, model = tmp_path / "file", nn.Linear(4, 2)
    with pytest.raises(FileNotFoundError, match=f"no deployed network at {path}"):
        lossprune.load_deployed(path)
    lossprune.save_sparse(model, lossprune.Mask.dense(model), path)
    assert refusal(path).startswith("is a sparse network, not a deployed one: lossprune.load_sp")
    lossprune.Mask.dense(model).save(path)
    assert refusal(path).startswith("is safetensors, but no deployed network of lossprune (its f")
    torch.save(model, path)
    assert refusal(path).startswith("is truncated, or no deployed network")
    newer = saved[1].read_bytes().replace(FORMAT.encode(), FORMAT.replace("1", "2").encode())
    path.write_bytes(newer)
    assert refusal(path).startswith("is of another version of lossprune (its format is 'lossprune")


def change(network, arrays, **steps):
    """The same with other fields of its first operation."""
    (part,) = network.parts
    first = part.steps[0]
    changed = dataclasses.replace(first, operation=dataclasses.replace(first.operation, **steps))
    part = dataclasses.replace(part, steps=(changed, *part.steps[1:]))
    return dataclasses.replace(network, parts=(part,)), arrays


def with_part(network, arrays, **fields):
    return dataclasses.replace(
        network, parts=(dataclasses.replace(network.parts[0], **fields),)
    ), arrays


def with_array(network, arrays, name, array):
    return network, {**arrays, name: array}


FORGED = {
    "a weight beyond its layer": lambda n, a: with_array(n, a, "0.0.gaps", a["0.0.gaps"] + 9),
    "more weights than values": lambda n, a: with_array(n, a, "0.0.values", a["0.0.values"][1:]),
    "too few biases": lambda n, a: with_array(n, a, "0.0.shift", a["0.0.shift"][1:]),
    "other numbers": lambda n, a: with_array(n, a, "0.0.shift", a["0.0.shift"].astype("f8")),
    "no stride": lambda n, a: change(n, a, stride=(0, 1)),
    "a huge padding": lambda n, a: change(n, a, padding=(2**40, 0)),
    "groups that do not divide": lambda n, a: change(n, a, groups=4),
    "a pool that there is not": lambda n, a: change(n, a, pool=3),
    "a larger kernel": lambda n, a: change(n, a, weight_shape=(6, 3, 3, 2)),
    "an output that is not made": lambda n, a: with_part(n, a, outputs=(("nothing", True),)),
    "steps in another order": lambda n, a: with_part(n, a, steps=n.parts[0].steps[::-1]),
    "no inputs": lambda n, a: with_part(n, a, inputs=()),
    "negative sizes": lambda n, a: change(n, a, dilation=(-1, 1)),
    "another number of arguments": lambda n, a: (dataclasses.replace(n, inputs=("a", "b")), a),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_file_that_contradicts_itself_never_reaches_the_kernels(saved, tmp_path, forge):
    path = tmp_path / "file"
    path.write_bytes(packed(*forge(*unpacked(saved[1]))))
    assert refusal(path).startswith(("contradicts itself", "is a deployed network, but damaged"))


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "file"
    deployed(OfTokens(), torch.randn(2, 3, 4, 6)).save(path)
    return path


@pytest.mark.parametrize(
    ("operation", "numbers"),
    [
        ("TokenAttention", {"heads": 3}),
        ("TokenAttention", {"key": 2}),
        ("TokenAttention", {"value_size": 2**40}),
        ("TokenAttention", {"key_heads": 0}),
        ("TokenAttention", {"scale": 0.0}),
        ("TokenAttention", {"first": True}),
        ("RowNorm", {"features": 9}),
        ("RowNorm", {"epsilon": 0.0}),
        ("TokenShift", {"tokens": 7}),
        ("TokenPatches", {"size": (0, 2)}),
        ("TokenPatches", {"channels": 4}),
        ("TokenPatches", {"leading": 2**40}),
    ],
)
def test_steps_on_tokens_never_reach_beyond_their_maps(of_tokens, tmp_path, operation, numbers):
    network, arrays = unpacked(of_tokens)
    (part,) = network.parts
    steps = [
        dataclasses.replace(step, operation=dataclasses.replace(step.operation, **numbers))
        if type(step.operation).__name__ == operation
        else step
        for step in part.steps
    ]
    path = tmp_path / "file"
    path.write_bytes(packed(*with_part(network, arrays, steps=tuple(steps))))
    with pytest.raises(PruningError):
        lossprune.load_deployed(path)(torch.randn(2, 3, 4, 6))


def test_words_that_are_not_known_are_refused(saved, tmp_path):
    path = tmp_path / "file"
    header, contents = unpacked_header(saved[1])
    for old, new in {"SparseConvolution": "Attention", "RELU": "SWISH", '"few"': '"fewer"'}.items():
        path.write_bytes(repacked(header, contents, old, new))
        assert "is a deployed network, but damaged: the network, parts, 0" in refusal(path)


def unpacked_header(path):
    contents = path.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    return json.loads(contents[8:end]), contents[end:]


def repacked(header, contents, old, new):
    said = {**header["__metadata__"], "sha256": UNSIGNED}
    said["network"] = said["network"].replace(old, new)
    text = json.dumps({**header, "__metadata__": said}).encode()
    return signed(len(text).to_bytes(8, "little") + text + contents)


class Encoder(nn.Module):
    """Attention between linear layers, as torch computes it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, x):
        y = self.norm(x + self.shift)
        x = x + self.attention(y, y, y, need_weights=False)[0][:, :, ...]
        return self.last(nn.functional.gelu(self.first(x).clamp(max=3.0))).flatten(1).float()


class Mixed(nn.Module):
    """A layer that is left to torch, and a file's own operations between others."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        gate = self.gate(x).softmax(-1)
        size = x.size(1)
        return self.last((x * gate)[:, : size - 1 + 1]), gate.sum(dim=-1, keepdim=True)


def same(found, expected):
    if isinstance(expected, tuple):
        return isinstance(found, tuple) and all(map(torch.equal, found, expected))
    return torch.equal(found, expected)


@pytest.mark.parametrize(("model", "shape"), [(Encoder, (2, 5, 8)), (Mixed, (4, 8))])
def test_what_torch_computes_between_comes_back_too(model, shape, tmp_path):
    torch.manual_seed(0)
    network = deployed(model(), torch.randn(shape))
    assert any(type(part).__name__ == "GraphModule" for part in network.modules())
    network.save(tmp_path / "file")
    loaded = lossprune.load_deployed(tmp_path / "file")
    x = torch.randn(3, *shape[1:])
    for _ in range(2):
        assert same(loaded(x), network(x))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    assert same(copy.deepcopy(loaded)(x), network(x))


def with_torch(network, arrays, **fields):
    """The same with other fields of its first operation of torch's."""
    k, part = next((k, part) for k, part in enumerate(network.parts) if hasattr(part, "modules"))
    steps = (dataclasses.replace(part.steps[0], **fields), *part.steps[1:])
    parts = list(network.parts)
    parts[k] = dataclasses.replace(part, steps=steps)
    return dataclasses.replace(network, parts=tuple(parts)), arrays


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "function", "operation": "torch.load"},
        {"kind": "method", "operation": "__class__"},
        {"kind": "module", "operation": "7"},
        {"inputs": {"tuple": [{"name": "nothing"}]}},
        {"named": {"list": []}},
    ],
)
def test_only_operations_that_compute_are_read(fields, tmp_path):
    path = tmp_path / "file"
    deployed(Mixed(), torch.randn(4, 8)).save(path)
    path.write_bytes(packed(*with_torch(*unpacked(path), **fields)))
    assert refusal(path).startswith("contradicts itself")


def test_what_a_file_does_not_hold_is_refused_by_name(saved, tmp_path):
    path = tmp_path / "file"
    network = deployed(
        nn.Sequential(nn.Linear(4, 6), nn.Softmin(1), nn.Linear(6, 3)), torch.ones(2, 4)
    )
    with pytest.raises(
        PruningError, match=r"as torch computes '1' \(Softmin\) in it, which a file"
    ):
        network.save(path)
    with pytest.raises(PruningError, match="as torch computes all of it, which was fastest: save"):
        Deployed(nn.Linear(3, 3), [], {}).save(path)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        saved[0].save(tmp_path / "nowhere" / "file")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(saved, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            saved[0].save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_network_tuned_elsewhere_says_so(saved, tmp_path):
    network, arrays = unpacked(saved[1])
    path = tmp_path / "file"
    path.write_bytes(packed(dataclasses.replace(network, lanes=3), arrays))
    loaded = lossprune.load_deployed(path)
    assert loaded.notes[-1].startswith("tuned on another kind of machine")
    assert torch.equal(loaded(images()), saved[0](images()))


def test_every_operation_that_a_step_can_be_is_known_to_files():
    assert {*get_args(SparseOperation)} - {MapActivation, MapSplit} == {*_READS}
