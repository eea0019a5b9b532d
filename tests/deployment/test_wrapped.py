"""Compiled and data-parallel networks: what is made of them is the plain network's."""

import copy

import pytest
import torch
from torch import nn

from lossprune import Mask, compact, deploy, load_sparse, save_sparse
from lossprune.deployment import count_live, multiply_adds


def network() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), inner, nn.Linear(8, 3))


def compiled_inside(model):
    model[2] = torch.compile(model[2], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    model[2].compile(backend="eager")
    return model


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda it: torch.compile(it, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda it: nn.DataParallel(torch.compile(it, backend="eager")),
    "a compiled part": compiled_inside,
    "compiled in place": compiled_in_place,
    "DistributedDataParallel": distributed,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_all_forms_of_a_wrapped_network_are_those_of_the_plain_one(wrap, tmp_path, request):
    if wrap is distributed:
        request.getfixturevalue("group")
    plain, x = network(), torch.randn(5, 6)
    kept = {name: torch.rand(it.shape) < 0.5 for name, it in Mask.dense(plain).items()}
    kept["0.weight"][:3] = False
    wrapped = wrap(network())
    names, classes = list(wrapped.state_dict()), [type(it) for it in wrapped.modules()]
    masks = (
        Mask(kept),
        Mask({**kept})
        if "_orig_mod" not in str(names)
        else Mask(dict(zip(Mask.dense(wrapped), kept.values(), strict=True))),
    )
    expected, masked = compact(plain, masks[0], x), masks[0].apply_(copy.deepcopy(plain))
    for mask in masks:
        found = compact(wrapped, mask, x)
        assert type(found.model) is nn.Sequential
        assert found.mask == expected.mask
        assert found.layers == expected.layers == count_live(wrapped, mask).layers
        for name, value in found.model.state_dict().items():
            assert torch.equal(value, expected.model.state_dict()[name])
        assert multiply_adds(wrapped, x) == multiply_adds(plain, x)
        fast = deploy(wrapped, mask, x, seconds=0.01)
        assert torch.allclose(fast(x), masked(x), atol=1e-5)
        save_sparse(wrapped, mask, tmp_path / "wrapped.safetensors")
        save_sparse(plain, masks[0], tmp_path / "plain.safetensors")
        contents = [(tmp_path / f"{it}.safetensors").read_bytes() for it in ("wrapped", "plain")]
        assert contents[0] == contents[1]
    other = wrap(network())
    before = list(other.parameters())
    assert load_sparse(tmp_path / "plain.safetensors", other) == masks[0]
    assert all(one is two for one, two in zip(before, other.parameters(), strict=True))
    for got, value in zip(other.parameters(), masked.parameters(), strict=True):
        assert torch.equal(got, value)
    assert list(wrapped.state_dict()) == names
    assert [type(it) for it in wrapped.modules()] == classes
