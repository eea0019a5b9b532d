"""Networks whose tensors are elsewhere are refused by every call, in one sentence, unchanged."""

import pytest
import torch
from torch import nn

import lossprune
from lossprune import training
from lossprune.channels.compaction import count_live
from lossprune.channels.costs import multiply_adds
from lossprune.channels.narrowing import narrow
from lossprune.data import load
from lossprune.pruning import (
    Mask,
    PruningError,
    prunable_weights,
    prune_by_stage,
    read_mask,
    remove_masks_,
    write_parametrizations_,
    write_torch_pruning_,
)

WRITERS = [write_torch_pruning_, write_parametrizations_]
X = torch.linspace(-1, 1, 96).view(12, 8)
DATA = [(X, torch.arange(12) % 3)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))


def half_of(model: nn.Module) -> Mask:
    return lossprune.prune(model, "MP", sparsity=0.5).mask


def lazy(model, folder):
    return nn.Sequential(nn.LazyLinear(9), *model[1:])


def meta(model, folder):
    return model.to("meta")


def on_cpu(model, folder):
    pytest.importorskip("accelerate").cpu_offload(model)
    return model


def on_disk(model, folder):
    pytest.importorskip("accelerate").disk_offload(model, folder / "offloaded")
    return model


ELSEWHERE = {
    lazy: r"'0\.weight'.* not initialised yet: run the network once on a batch first",
    meta: r"'0\.weight'.* on the meta device, without values: load the network's values first",
    on_cpu: r"'0\.weight'.* offloaded: load the network whole, or call accelerate\.hooks",
    on_disk: r"'0\.weight'.* offloaded: load the network whole, or call accelerate\.hooks",
}
CALLS = {
    "prune": lambda model, mask, path: lossprune.prune(model, "MP", sparsity=0.5),
    "prune with data": lambda model, mask, path: lossprune.prune(
        model, "QM", sparsity=0.5, data=DATA
    ),
    "prune by stage": lambda model, mask, path: list(prune_by_stage(model, "MP", sparsity=0.5)),
    "measure": lambda model, mask, path: lossprune.measure(model, DATA),
    "prunable_weights": lambda model, mask, path: prunable_weights(model),
    "a function chooses": lambda model, mask, path: prunable_weights(
        model, lambda name, weight, module: bool(weight.abs().max() > 0)
    ),
    "dense": lambda model, mask, path: Mask.dense(model),
    "apply_": lambda model, mask, path: mask.apply_(model),
    "enforce": lambda model, mask, path: mask.enforce(
        model, torch.optim.SGD(network().parameters())
    ),
    "write_torch_pruning_": lambda model, mask, path: write_torch_pruning_(model, mask),
    "write_parametrizations_": lambda model, mask, path: write_parametrizations_(model, mask),
    "compact": lambda model, mask, path: lossprune.compact(model, mask),
    "count_live": lambda model, mask, path: count_live(model, mask),
    "narrow": lambda model, mask, path: narrow(model, mask),
    "deploy": lambda model, mask, path: lossprune.deploy(model, mask, X),
    "save_sparse": lambda model, mask, path: lossprune.save_sparse(model, mask, path / "new"),
    "load_sparse": lambda model, mask, path: lossprune.load_sparse(path / "saved", model),
    "export_onnx": lambda model, mask, path: lossprune.export_onnx(model, path / "onnx", X),
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE, ids=lambda it: it.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_refused_and_left_as_it_was(elsewhere, call, tmp_path):
    if call == "export_onnx":
        pytest.importorskip("onnxruntime")
    model = network()
    mask = half_of(model)
    lossprune.save_sparse(model, mask, tmp_path / "saved")
    model = elsewhere(model, tmp_path)
    before = [(name, id(it), it.device) for name, it in model.named_parameters()]
    with pytest.raises(PruningError, match=ELSEWHERE[elsewhere]) as raised:
        CALLS[call](model, mask, tmp_path)
    assert "\n" not in str(raised.value)
    assert [(name, id(it), it.device) for name, it in model.named_parameters()] == before


@pytest.mark.parametrize("elsewhere", [meta, on_cpu])
@pytest.mark.parametrize("write_", WRITERS)
def test_masks_are_not_made_permanent_elsewhere(write_, elsewhere, tmp_path):
    model = elsewhere(write_(network(), half_of(network())), tmp_path)
    with pytest.raises(PruningError, match=r"'0\.[\w.]*(original|orig|mask)'.* (offloaded|meta)"):
        remove_masks_(model)


def test_a_state_dict_on_the_meta_device_holds_no_mask_that_could_be_read():
    state = write_torch_pruning_(network(), half_of(network())).to("meta").state_dict()
    with pytest.raises(PruningError, match=r"the state dict has '0\.weight_mask'.* meta device"):
        read_mask(state)


@pytest.mark.parametrize("offload", [on_cpu, on_disk])
def test_a_network_that_was_offloaded_is_an_ordinary_one_again(offload, tmp_path):
    model = offload(network(), tmp_path)
    expected = half_of(network())
    hooks = pytest.importorskip("accelerate.hooks")
    with pytest.raises(PruningError):
        half_of(model)
    hooks.remove_hook_from_submodules(model)
    assert half_of(model) == expected


def test_only_what_is_needed_must_be_here(tmp_path):
    model = network()
    model[2].to("meta")
    assert list(prunable_weights(model, exclude="2")) == ["0.weight"]
    mask = Mask({"0.weight": torch.zeros(9, 8, dtype=torch.bool)})
    assert not mask.apply_(model)[0].weight.any()
    with pytest.raises(PruningError, match=r"Sequential has '2\.weight', '2\.bias' on the meta"):
        lossprune.measure(model, DATA, exclude="2")


def test_multiply_adds_need_shapes_and_a_run():
    assert multiply_adds(meta(network(), None), X.to("meta")) == 12 * (8 * 9 + 9 * 3)
    assert multiply_adds(on_cpu(network(), None), X) == 12 * (8 * 9 + 9 * 3)
    for elsewhere in (meta, lazy):
        with pytest.raises(PruningError, match=r"Sequential has '0\.weight'"):
            multiply_adds(elsewhere(network(), None), X)


@pytest.mark.parametrize("elsewhere", [meta, lazy])
def test_training_and_evaluation(elsewhere):
    digits = load("digits", seed=1)
    model = elsewhere(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), None)
    model = nn.Sequential(nn.Flatten(), *model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: training.train_epoch(model, digits, optimizer, generator=torch.Generator()),
        lambda: training.evaluate(model, digits, digits.test),
        lambda: training.StackedTraining([model], [None], [digits]),
    ):
        with pytest.raises(PruningError, match=r"Sequential has '[12]\.weight'"):
            call()
