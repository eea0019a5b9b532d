"""Masks of a network fit what is wrapped around it, and the other way round."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lossprune
from lossprune.pruning import PruningError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def adapted(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def compiled_inside(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize("wrap", [adapted, AveragedModel, nn.DataParallel, compiled_inside])
def test_a_mask_of_the_plain_network_and_of_the_wrapped_one(wrap):
    plain = network()
    mask = lossprune.prune(plain, "MP", sparsity=0.5).mask
    wrapped = wrap(network())
    assert mask.mismatches(wrapped) == ()
    mask.apply_(wrapped)
    kept = {id(p): n for n, p in wrapped.named_parameters() if not p.all() and p.ndim == 2}
    assert len(kept) == 2

    tensors = dict(wrapped.named_parameters())
    of_wrapped = lossprune.Mask({name: tensors[name] != 0 for name in kept.values()})
    assert of_wrapped.removed == mask.removed
    of_wrapped.apply_(plain)
    for name, where in mask.items():
        assert torch.equal(plain.get_parameter(name) != 0, where)


def test_merged_adapters_fill_removed_weights_until_the_mask_is_applied_again():
    model = network()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    merged = mask.apply_(adapted(model)).merge_and_unload()
    assert merged[0].weight[~mask["0.weight"]].count_nonzero()
    mask.apply_(merged)
    assert not merged[0].weight[~mask["0.weight"]].count_nonzero()
    assert not merged[2].weight[~mask["2.weight"]].count_nonzero()


def test_a_mask_under_adapters_tells_of_the_merge():
    model = network()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    tuned = adapted(mask.apply_(model))
    with pytest.warns(UserWarning, match=r"1 masked layer has adapters, .* call mask.apply_"):
        mask.enforce(tuned, torch.optim.AdamW(tuned.parameters()))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with pytest.raises(PruningError, match=r"none of the 2 masked ones, which are frozen: call"):
        mask.enforce(tuned, torch.optim.AdamW(trained))


def test_an_exponential_average_of_masked_weights_keeps_to_the_mask():
    model = network()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    mask.enforce(model, optimizer)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    weight = averaged.module[0].weight
    assert not weight[~mask["0.weight"]].any()
    assert not torch.equal(weight, model[0].weight)


def test_an_average_that_began_before_pruning():
    model = network()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    mask.apply_(model)
    averaged.update_parameters(model)
    assert averaged.module[0].weight[~mask["0.weight"]].count_nonzero()
    mask.apply_(averaged)
    assert not averaged.module[0].weight[~mask["0.weight"]].count_nonzero()


def test_what_could_be_meant_twice_is_refused_with_the_names_side_by_side():
    mask = lossprune.prune(network(), "MP", sparsity=0.5).mask
    two = nn.ModuleDict({"teacher": network(), "student": network()})
    with pytest.raises(PruningError, match=r"'0\.weight'.*'teacher\.0\.weight', 'student\.0\."):
        mask.apply_(two)
    saved = adapted(network(), modules_to_save=["2"])
    with pytest.raises(PruningError, match=r"it names '2\.weight', which PeftModel lacks"):
        mask.apply_(saved)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_parameters_in_a_sparse_layout_are_refused():
    layer = nn.Linear(8, 6)
    mask = lossprune.prune(layer, "MP", sparsity=0.5).mask
    layer.weight = nn.Parameter(mask.apply_(layer).weight.detach().to_sparse_csr())
    for call in (mask.apply_, lambda it: mask.enforce(it, torch.optim.SGD(it.parameters()))):
        with pytest.raises(
            PruningError, match=r"'weight' is not dense there \(torch\.sparse_csr\)"
        ):
            call(layer)
