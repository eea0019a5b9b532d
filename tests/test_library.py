"""What a person sees who explores the package: its names, and its values as they print."""

from importlib import import_module

import pytest
import torch
from torch import nn

import lossprune
from lossprune.channels.compaction import count_live
from lossprune.experiment.record import RunRecord, Start


@pytest.mark.parametrize(
    "package",
    ["lossprune"]
    + [f"lossprune.{room}" for room in ("data", "deployment", "experiment", "pruning", "report")],
)
def test_names_that_are_imported_on_first_use_are_listed(package):
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, name) for name in module.__all__)


def values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    data = [(torch.randn(32, 8), torch.arange(32) % 4)]
    result = lossprune.prune(model, "QM", sparsity=0.75, data=data)
    stage = lossprune.StageRecord(3, 0.25, 48, 1.234567, 1.3, 0.0123456, 0.06, 0.51)
    return [
        (
            lossprune.PruningResult(result.mask, (stage,), ("average.weight",)),
            "PruningResult(QM, 1 stage, sparsity 0.75, 144 of 192 weights removed, loss 1.2346 "
            "before, 1.3 after, unused: average.weight)",
        ),
        (
            lossprune.prune(model, "MP", sparsity=0.5),
            "PruningResult(MP, 1 stage, sparsity 0.5, 96 of 192 weights removed)",
        ),
        (
            stage,
            "StageRecord(stage 3, sparsity 0.25, 48 removed, loss 1.2346 before, 1.3 after, "
            "change 0.0123 predicted, 0.51 s)",
        ),
        (
            lossprune.prune_by_stage(model, "QM", sparsity=0.5, data=data),
            "<QM in 14 stages, one at each step>",
        ),
        (
            lossprune.measure(model, data, ggn_diagonal=False),
            f"Statistics(loss {result.stages[0].loss_before:.5g}, 32 examples, "
            "gradient of 2 parameters)",
        ),
        (
            lossprune.compact(model, lossprune.Mask.dense(model)),
            "Compaction(Sequential, 212 of 212 parameters left, effective sparsity 0)",
        ),
        (
            count_live(model, lossprune.Mask.dense(model)),
            "Connectivity(2 layers, 0 of 20 units dead, sparsity 0, effective 0)",
        ),
        (
            lossprune.data.load("digits", seed=1111),
            "Dataset(digits, 1,297 training, 250 validation and 250 test images of 1×8×8, "
            "10 classes)",
        ),
        (lossprune.data.load("digits", seed=1111).valid, "Split(250 images of 1×8×8)"),
        (
            RunRecord({}, {}, Start(None, None, ""), removed=3, prunable=6),
            "RunRecord(running, 3 of 6 weights removed, 0 epochs)",
        ),
    ]


def test_values_print_as_one_line():
    for value, text in values():
        assert repr(value) == text
