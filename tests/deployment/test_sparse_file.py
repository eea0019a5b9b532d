"""Sparse files: bit-exact, small, and never silently wrong."""

import copy
import json
import math
import pickle
import random
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune import Mask, PruningError, load_sparse, save_sparse
from lossprune.deployment.positions import Positions, decode, encode
from lossprune.networks import NETWORKS


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(bits(mine[k]) == bits(theirs[k]) for k in mine)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)
    )


@pytest.fixture
def pruned() -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    network = convolutional()
    network(torch.randn(8, 2, 6, 6))  # running statistics that are not those of a new network
    return network, lossprune.prune(network, "MP", sparsity=0.8).mask


@given(st.lists(st.booleans(), max_size=400), st.integers(0, 40))
def test_positions_come_back_whatever_they_are(flags, gap):
    kept = np.array([x for flag in flags for x in [False] * gap + [flag]], dtype=bool)
    assert (decode(encode(kept), kept.size) == kept).all()
    assert (decode(encode(~kept), kept.size) == ~kept).all()


@pytest.mark.parametrize("density", [0.001, 0.0115, 0.044, 0.2, 0.5, 0.9, 0.999])
def test_positions_take_little_more_than_their_entropy(density):
    kept = np.random.default_rng(0).random(400_000) < density
    p = kept.mean()
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert len(encode(kept).code) * 8 < 1.05 * entropy * kept.size + 64


def test_a_network_comes_back_bit_for_bit(pruned, tmp_path):
    network, mask = pruned
    weight = network[0].weight.data
    mask["0.weight"][0, 0] = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    mask = Mask(dict(mask), criterion="MP")
    weight[0, 0] = torch.tensor([[-0.0, 0.0, 1e-45], [math.inf, -math.nan, -1e30], [3, 4, 5]])
    before = copy.deepcopy(network)
    save_sparse(network, mask, tmp_path / "small")
    assert same_bits(network, before)
    other = convolutional()
    loaded = load_sparse(tmp_path / "small", other)
    assert loaded == mask
    assert loaded.criterion == "MP"
    assert same_bits(other, mask.apply_(network))
    assert math.copysign(1, other[0].weight[0, 0, 0, 0].item()) == -1
    assert math.copysign(1, other[0].weight[0, 0, 2, 0].item()) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "small"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_come_back_too(pruned, tmp_path, dtype):
    network, mask = pruned
    network.to(dtype)
    save_sparse(network, mask, tmp_path / "small")
    other = convolutional().to(dtype)
    load_sparse(tmp_path / "small", other)
    assert same_bits(other, mask.apply_(network))


def test_the_same_network_is_the_same_file(pruned, tmp_path):
    for name in ("one", "two"):
        save_sparse(*pruned, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_masks_that_keep_all_or_nothing(tmp_path):
    network = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    kept = {"0.weight": torch.ones(20, 30).bool(), "1.weight": torch.zeros(10, 20).bool()}
    save_sparse(network, Mask(kept), tmp_path / "small")
    other = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    assert load_sparse(tmp_path / "small", other) == Mask(kept)
    assert same_bits(other, Mask(kept).apply_(network))


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(200, 200), nn.Linear(200, 200)
        if tied:
            self.decoder.weight = self.encoder.weight


def test_a_shared_weight_is_stored_once(tmp_path):
    network = Tied()
    save_sparse(network, Mask.dense(network), tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < 4 * 200 * 200 * 1.1
    for other in (Tied(), Tied(tied=False)):
        load_sparse(tmp_path / "small", other)
        assert same_bits(other, network)


def test_two_weights_do_not_load_into_a_shared_one(tmp_path):
    apart = Tied(tied=False)
    save_sparse(apart, Mask.dense(apart), tmp_path / "small")
    with pytest.raises(PruningError, match=r"differ, the network has one tensor for both"):
        load_sparse(tmp_path / "small", Tied())


def test_half_precision_rounds_kept_weights_alone(pruned, tmp_path):
    network, mask = pruned
    save_sparse(network, mask, tmp_path / "half", values="float16")
    save_sparse(network, mask, tmp_path / "small")
    saved = (tmp_path / "small").stat().st_size - (tmp_path / "half").stat().st_size
    assert saved >= 2 * (mask.total - mask.removed) - 64
    other = convolutional()
    assert load_sparse(tmp_path / "half", other) == mask
    mask.apply_(network)
    for name, tensor in network.state_dict().items():
        expected = tensor.half().float() if name in mask else tensor
        assert torch.equal(other.state_dict()[name], expected)


def test_what_half_precision_cannot_hold_is_refused_by_name(pruned, tmp_path):
    network, mask = pruned
    network[4].weight.data[2, 3] = 70_000.0
    with pytest.raises(PruningError, match=r"'4.weight' holds 70000, beyond the 65504 of float16"):
        save_sparse(network, Mask.dense(network), tmp_path / "half", values="float16")
    with pytest.raises(ValueError, match=r"values must be one of exact, float16, got 'int8'"):
        save_sparse(network, mask, tmp_path / "half", values="int8")
    assert list(tmp_path.iterdir()) == []


def test_masks_and_folders_that_do_not_fit(pruned, tmp_path):
    network, mask = pruned
    with pytest.raises(PruningError, match=r"the mask names '9.weight', which Sequential lacks"):
        save_sparse(network, Mask({"9.weight": torch.ones(2).bool()}), tmp_path / "x")
    with pytest.raises(PruningError, match=r"has shape \(2,\), the parameter \(5, 96\)"):
        save_sparse(network, Mask({"4.weight": torch.ones(2).bool()}), tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        save_sparse(network, mask, tmp_path / "none" / "x")
    with pytest.raises(FileNotFoundError, match="no sparse network at"):
        load_sparse(tmp_path / "x", network)


def test_another_network_is_told_every_mismatch_and_left_alone(pruned, tmp_path):
    save_sparse(*pruned, tmp_path / "small")
    other = nn.Sequential(
        nn.Conv2d(2, 6, 3).double(),
        nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(90, 5),
        nn.PReLU(),
    )
    before = copy.deepcopy(other)
    with pytest.raises(PruningError) as caught:
        load_sparse(tmp_path / "small", other)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'small'} does not hold this Sequential: ")
    for part in (
        "'0.weight' is float32, the network float64",
        "'4.weight' has shape (5, 96), the network (5, 90)",
        "it lacks '5.weight'",
        "it has '1.running_mean', which the network lacks",
    ):
        assert part in said
    assert same_bits(other, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    mask = lossprune.prune(network, "MP", sparsity=0.7).mask
    folder = tmp_path_factory.mktemp("small")
    save_sparse(network, mask, folder / "small")
    return folder, (folder / "small").read_bytes(), network


def test_flipped_bytes_are_refused(small):
    folder, contents, network = small
    path = folder / "flipped"
    before = copy.deepcopy(network)
    generator = np.random.default_rng(0)
    for position in range(0, len(contents), 3):
        flipped = bytearray(contents)
        flipped[position] ^= int(generator.integers(1, 256))
        path.write_bytes(flipped)
        with pytest.raises(PruningError, match="flipped"):
            load_sparse(path, network)
    assert same_bits(network, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_files_cut_joined_and_overwritten_are_refused(small, data):
    folder, contents, network = small
    begin = data.draw(st.integers(0, len(contents)))
    end = data.draw(st.integers(begin, len(contents)))
    changed = contents[:begin] + data.draw(st.binary(max_size=40)) + contents[end:]
    (folder / "changed").write_bytes(changed)
    if changed == contents:
        load_sparse(folder / "changed", network)
    else:
        with pytest.raises(PruningError, match="changed"):
            load_sparse(folder / "changed", network)


def test_damage_is_told_by_file_and_tensor(small):
    folder, contents, network = small
    values = network[2].weight.detach()[torch.nonzero(network[2].weight, as_tuple=True)]
    assert len(values)
    bias = bits(network[2].bias)
    at = contents.index(bias)
    (folder / "bad").write_bytes(contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1 :])
    with pytest.raises(PruningError, match=r"bad is damaged: the values of '2.bias' changed"):
        load_sparse(folder / "bad", network)


def test_other_files_are_told_apart(small, tmp_path):
    _, _, network = small
    path = tmp_path / "file"
    Mask.dense(network).save(path)
    with pytest.raises(PruningError, match="not a sparse network of lossprune"):
        load_sparse(path, network)
    for contents in (b"", b"once upon a time", pickle.dumps({"a": 1})):
        path.write_bytes(contents)
        with pytest.raises(PruningError, match="truncated or not safetensors"):
            load_sparse(path, network)


def test_the_published_networks_reach_their_sizes(tmp_path):
    for arch, sparsity, factor, halved in (("MLP", 0.98847, 40, 80), ("VGG11", 0.956, 14, 28)):
        network = NETWORKS[arch](generator=torch.Generator().manual_seed(1))
        mask = lossprune.prune(network, "MP", sparsity=sparsity).mask
        torch.save(network.state_dict(), tmp_path / "dense")
        dense = (tmp_path / "dense").stat().st_size
        save_sparse(network, mask, tmp_path / "small")
        assert factor * (tmp_path / "small").stat().st_size <= dense
        save_sparse(network, mask, tmp_path / "small", values="float16")
        assert halved * (tmp_path / "small").stat().st_size <= dense


class One(nn.Module):
    """A weight, and a buffer if there is one."""

    def __init__(self, weight, buffer=None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        if buffer is not None:
            self.register_buffer("extra", buffer)


KEPT = torch.arange(24).reshape(4, 6) % 3 == 0
STORED = {
    **{
        str(t): lambda t=t: One(torch.arange(24).reshape(4, 6).to(t))
        for t in (
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.bfloat16,
            torch.int8,
            torch.int64,
            torch.uint16,
            torch.bool,
        )
    },
    "complex64": lambda: One(torch.randn(4, 6, dtype=torch.complex64)),
    "complex64 buffer": lambda: One(torch.ones(4, 6), torch.randn(3, dtype=torch.complex64).conj()),
    "transposed": lambda: One(torch.randn(6, 4).t()),
    "no numbers": lambda: One(torch.ones(4, 6), torch.zeros(0, 3)),
    "one number": lambda: One(torch.ones(4, 6), torch.tensor(3)),
}


@pytest.mark.parametrize("build", STORED.values(), ids=STORED.keys())
def test_every_type_that_a_file_can_hold_comes_back(tmp_path, build):
    network, other = build(), build()
    save_sparse(network, Mask({"weight": KEPT}), tmp_path / "small")
    assert load_sparse(tmp_path / "small", other) == Mask({"weight": KEPT})
    flat = other.weight.detach().contiguous().view(torch.uint8).reshape(24, -1)
    expected = network.weight.detach().contiguous().view(torch.uint8).reshape(24, -1)
    assert torch.equal(flat[KEPT.flatten()], expected[KEPT.flatten()])
    assert not flat[~KEPT.flatten()].any()
    if "extra" in dict(network.named_buffers()):
        assert torch.equal(other.extra, network.extra)


class Labelled(torch.Tensor):
    """A kind of tensor of somebody's own."""


REFUSED = {
    "complex128": (lambda: One(torch.ones(4, 6, dtype=torch.complex128)), "weight", "complex128"),
    "qint8": (
        lambda: One(torch.ones(4, 6), torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)),
        "extra",
        "qint8",
    ),
    "coo": (lambda: One(torch.ones(4, 6), torch.eye(3).to_sparse()), "extra", "sparse_coo"),
    "csr": (lambda: One(torch.ones(4, 6), torch.eye(3).to_sparse_csr()), "extra", "sparse_csr"),
    "own": (
        lambda: One(torch.ones(4, 6), torch.ones(3).as_subclass(Labelled)),
        "extra",
        "Labelled",
    ),
    "fnuz": (lambda: One(torch.ones(4, 6).to(torch.float8_e4m3fnuz)), "weight", "float8_e4m3fnuz"),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates some of them
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_file_can_hold_is_refused_by_name(tmp_path, kind):
    build, name, told = REFUSED[kind]
    with pytest.raises(PruningError, match=rf"'{name}' of One cannot be stored: .* {told}$"):
        save_sparse(build(), Mask({"weight": KEPT}), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_leaves_what_it_cannot_round(tmp_path):
    mask = Mask({"weight": KEPT})
    with pytest.raises(PruningError, match="'weight' is complex, which float16 is not"):
        save_sparse(STORED["complex64"](), mask, tmp_path / "small", values="float16")
    for dtype, value in ((torch.int64, 2**40 + 1), (torch.bfloat16, 1e30)):
        network = One(torch.full((4, 6), value, dtype=dtype))
        save_sparse(network, mask, tmp_path / "small", values="float16")
        other = One(torch.zeros(4, 6, dtype=dtype))
        load_sparse(tmp_path / "small", other)
        assert torch.equal(other.weight, network.weight * KEPT)


def test_half_precision_says_how_many_kept_weights_became_zero(tmp_path):
    network = nn.Linear(4, 2)
    network.weight.data = torch.tensor([[1e-8, -2.9e-8, 3.1e-8, 0.0], [1.0, 1e-9, 2.0, 1e-30]])
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[1, 3] = False
    told = r"^3 of 7 kept weights are 0 in float16, as they are below 3e-8: 3 of 'weight'$"
    with pytest.warns(UserWarning, match=told):
        save_sparse(network, Mask({"weight": kept}), tmp_path / "small", values="float16")
    with warnings.catch_warnings(action="error"):
        save_sparse(network, Mask({"weight": kept}), tmp_path / "small")
        save_sparse(nn.Linear(4, 2), Mask({"weight": kept}), tmp_path / "small", values="float16")


def test_a_tensor_that_cannot_be_loaded_into_is_named(tmp_path):
    network = One(torch.ones(4, 6), torch.ones(1).expand(5))
    save_sparse(network, Mask({"weight": KEPT}), tmp_path / "small")
    with pytest.raises(PruningError, match="'extra' of the network is expanded"):
        load_sparse(tmp_path / "small", network)
    other = One(torch.zeros(4, 6), torch.zeros(5))
    load_sparse(tmp_path / "small", other)
    assert other.extra.tolist() == [1.0] * 5


def forged(contents: bytes, change) -> bytes:
    """The file with what it says of its tensors changed, and the checksum of that header."""
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:end])
    said = json.loads(header["__metadata__"]["tensors"])
    changed = change(said, header)
    text = changed if isinstance(changed, str) else json.dumps(said)
    header["__metadata__"] |= {"tensors": text, "header_crc32": "00000000"}
    head = json.dumps(header, separators=(",", ":")).encode()
    head = len(head).to_bytes(8, "little") + head
    signature = f'"header_crc32":"{zlib.crc32(head):08x}"'.encode()
    return head.replace(b'"header_crc32":"00000000"', signature) + contents[end:]


FORGED = {
    "nothing": lambda said, header: said.clear(),
    "a list": lambda said, header: "[1]",
    "too deep": lambda said, header: "[" * 10**5 + "]" * 10**5,
    "not JSON": lambda said, header: "{",
    "a name twice": lambda said, header: '{"a": {}, "a": {}}',
    "no object": lambda said, header: said.update({"0.weight": 3}),
    "unknown": lambda said, header: said["0.weight"].update(more=1),
    "missing": lambda said, header: said["0.weight"].pop("k"),
    "same as none": lambda said, header: said.update(extra={"same": "nowhere"}),
    "same as itself": lambda said, header: said.update(extra={"same": "extra"}),
    "same as a list": lambda said, header: said.update(extra={"same": ["0.weight"]}),
    "huge": lambda said, header: said["0.weight"].update(shape=[10**6, 10**5]),
    "beyond numbers": lambda said, header: said["0.weight"].update(shape=[0, 10**30]),
    "negative": lambda said, header: said["0.weight"].update(shape=[-9, -12]),
    "a shape of words": lambda said, header: said["0.weight"].update(shape=["9", 12]),
    "no type": lambda said, header: said["0.weight"].update(dtype="nn"),
    "a type of lists": lambda said, header: said["0.weight"].update(dtype=["float32"]),
    "another type": lambda said, header: said["0.weight"].update(dtype="float64"),
    "one fewer": lambda said, header: said["0.weight"].update(
        marked=said["0.weight"]["marked"] - 1
    ),
    "one more": lambda said, header: said["0.weight"].update(marked=said["0.weight"]["marked"] + 1),
    "minus": lambda said, header: said["0.weight"].update(marked=-1),
    "a half": lambda said, header: said["0.weight"].update(marked=0.5),
    "k": lambda said, header: said["0.weight"].update(k=31),
    "k of words": lambda said, header: said["0.weight"].update(k="1"),
    "removed": lambda said, header: said["0.weight"].update(removed=1),
    "the other": lambda said, header: said["0.weight"].update(removed=True),
    "mask": lambda said, header: said["0.weight"].update(mask=None),
    "a mask twice": lambda said, header: said["0.weight"].update(mask="2.weight"),
    "a tensor more": lambda said, header: said.pop("1.bias"),
    "tensors exchanged": lambda said, header: header.update(
        {"dense:1.bias": header["dense:2.bias"], "dense:2.bias": header["dense:1.bias"]}
    ),
    "positions": lambda said, header: header["kept:0.weight"].update(dtype="I8"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_are_refused_in_one_sentence(small, tmp_path, kind):
    _, contents, network = small
    before = copy.deepcopy(network)
    assert forged(contents, lambda said, header: None) != contents  # in another order, else good
    (tmp_path / "good").write_bytes(forged(contents, lambda said, header: None))
    load_sparse(tmp_path / "good", copy.deepcopy(network))
    (tmp_path / "forged").write_bytes(forged(contents, FORGED[kind]))
    with pytest.raises(PruningError, match="forged") as caught:
        load_sparse(tmp_path / "forged", network)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert same_bits(network, before)


def test_what_anything_is_changed_into_is_the_network_or_refused(small, tmp_path):
    """Random changes of what the header says, with a checksum that fits."""
    _, contents, network = small
    values = (-1, 0, 1, 3, 2**31, 2**70, 0.5, True, None, "", "float64", "0.weight", [], [3], {})
    expected = copy.deepcopy(network)
    mask = load_sparse_bytes(contents, expected, tmp_path)
    generator, refused = random.Random(0), 0

    def change(said, header):
        for _ in range(generator.choice((1, 1, 3))):
            places = [*said.values(), *header.values(), said]
            place = generator.choice([it for it in places if isinstance(it, dict)])
            key = generator.choice([*place, "same", "shape"])
            place[key] = copy.deepcopy(generator.choice((*values, *place.values())))

    for _ in range(300):
        other = copy.deepcopy(network)
        with suppress(PruningError):
            refused += 1
            found = load_sparse_bytes(forged(contents, change), other, tmp_path)
            refused -= 1
            assert same_bits(other, expected)
            assert len(found) == len(mask)
    assert refused > 200


def load_sparse_bytes(contents: bytes, network: nn.Module, folder) -> Mask:
    (folder / "changed").write_bytes(contents)
    return load_sparse(folder / "changed", network)


def test_positions_are_counted_to_the_last_bit():
    kept = np.arange(200) % 17 == 3
    told = encode(kept)
    for code in (
        np.append(told.code, np.uint8(0)),
        np.concatenate([np.zeros(1, np.uint8), told.code]),
        told.code[:-1],
        np.append(told.code[:-1], told.code[-1] | np.uint8(1)),
    ):
        with pytest.raises(ValueError, match="positions"):
            decode(Positions(code, told.marked, told.k, told.removed), 200)
    with pytest.raises(ValueError, match="it tells position 190 of 190 weights"):
        decode(Positions(told.code, told.marked, told.k, told.removed), 190)
