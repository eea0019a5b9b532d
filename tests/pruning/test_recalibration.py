"""Batch norm's statistics are the weighted means of those of batches, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import lossprune
from lossprune.pruning import PruningError
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.recalibration import batch_norm_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 2),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.Flatten(),
        nn.BatchNorm1d(12, affine=False),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5, momentum=None, track_running_stats=False),
    ).double()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(count, 2, 5, 5, dtype=torch.float64, generator=generator)


def split(inputs, *sizes):
    return [(part, torch.zeros(len(part))) for part in inputs.split(sizes)]


def of(model):
    return {n: b.clone() for n, b in model.named_buffers() if "running_" in n}


def oracle(model, batches):
    """By hand, layer by layer: Σ n m / Σ n and Σ n v / Σ n, v unbiased."""
    sums, total = {}, sum(map(len, batches))
    for x in batches:
        for name, layer in model.named_children():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)):
                own = isinstance(layer, nn.InstanceNorm2d)
                parts = x.split(1) if own else (x,)
                values = [part.transpose(0, 1).flatten(1) for part in parts]
                if layer.running_mean is not None:
                    for what, statistic in (
                        ("mean", torch.stack([v.sum(1) / v.shape[1] for v in values])),
                        ("var", torch.stack([v.var(1, unbiased=True) for v in values])),
                    ):
                        key = f"{name}.running_{what}"
                        sums[key] = sums.get(key, 0) + len(x) * statistic.mean(0) / total
                shape = (1, -1) + (1,) * (x.ndim - 2)
                done = [
                    (part - v.mean(1).view(shape))
                    / (v.var(1, unbiased=False).view(shape) + layer.eps).sqrt()
                    for part, v in zip(parts, values, strict=True)
                ]
                x = torch.cat(done)
                if layer.affine:
                    x = x * layer.weight.view(shape) + layer.bias.view(shape)
            elif not isinstance(layer, nn.Dropout):
                x = layer(x.clone())
    return sums


def agree(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(7,), (4, 4), (4, 3, 2), (1, 6), (4, 1), (1, 1, 1), (3, 1, 1)])
def test_statistics_are_means_weighted_by_examples(sizes):
    """One example that some layer finds no variance in goes with the next, at the end the last."""
    model, inputs = network(), images(sum(sizes))
    joined = {(1, 6): (7,), (4, 1): (5,), (1, 1, 1): (3,), (3, 1, 1): (3, 2)}.get(sizes, sizes)
    expected = oracle(model, inputs.split(joined))
    assert lossprune.recalibrate(model, split(inputs, *sizes)) is model
    agree(of(model), expected)
    assert not torch.equal(of(model)["1.running_mean"], of(network())["1.running_mean"])


@torch.no_grad()
def test_batches_of_one_stay_where_every_layer_takes_them():
    model, inputs = network()[:4], images(3)
    model[1].running_var.fill_(torch.inf)  # of which nothing is left
    lossprune.recalibrate(model, split(inputs, 1, 1, 1))
    agree(of(model), oracle(model, inputs.split(1)))


@torch.no_grad()
@pytest.mark.parametrize("form", ["pairs", "dicts", "forward", "one tensor"])
def test_examples_and_forms_are_those_of_measure(form):
    inputs = images(12)
    data, forward = split(inputs, 4, 4, 4), None
    if form == "dicts":
        data = [{"input": x, "labels": y} for x, y in data]
    elif form == "forward":
        data = [{"images": x, "what": [y]} for x, y in data]
        forward = lambda model, batch: (model(batch["images"]), batch["what"])  # noqa: E731
    elif form == "one tensor":
        data, forward = [x for x, _ in data], lambda model, batch: model(batch)
    model = network()
    expected = oracle(model, inputs[:7].split((4, 3)))
    lossprune.recalibrate(model, data, examples=7, forward=forward)
    agree(of(model), expected)


def test_a_mask_gives_what_recalibrating_gives_once_it_is_applied():
    model, data = network(), split(images(9), 4, 4, 1)
    mask = lossprune.prune(model, "MP", sparsity=0.7).mask
    prunable, before = PrunableNetwork(model), state(model)
    masked = MaskedNetwork(prunable, mask)
    constants = {name: value.clone() for name, value in masked.constants.items()}
    found = batch_norm_statistics(masked, map(Batch.of, data))
    assert state(model) == before
    agree(masked.constants, constants, 0)
    agree(found, of(lossprune.recalibrate(mask.apply_(copy.deepcopy(model)), data)))
    assert found["1.running_mean"].dtype == torch.float64
    assert not any(value.requires_grad for value in found.values())


def state(model):
    """All that must stay, to the bit; statistics are apart."""
    return {
        "attributes": {
            name: {k: v for k, v in vars(module).items() if isinstance(v, (bool, float, int))}
            for name, module in model.named_modules()
        },
        "momentum": [getattr(module, "momentum", None) for module in model.modules()],
        "hooks": [
            [list(v) for k, v in vars(module).items() if "hooks" in k] for module in model.modules()
        ],
        "attribute names": [sorted(vars(module)) for module in model.modules()],
        "parameters": [
            (id(p), p._version, p.tolist(), p.requires_grad, None if p.grad is None else id(p.grad))
            for p in model.parameters()
        ],
        "buffers": [
            (n, id(b), None if "running_" in n else (b._version, b.tolist()))
            for n, b in model.named_buffers()
        ],
        "random": torch.get_rng_state().tolist(),
        "autograd": torch.is_grad_enabled(),
    }


class Watched(nn.Module):
    """Several modes, a counter that forward writes, one norm called twice, and one never."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)
        self.average = nn.BatchNorm1d(2)
        self.frozen = nn.BatchNorm2d(2).eval()
        self.frozen.track_running_stats = False
        self.unused = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.fails_at = -1

    def forward(self, x):
        torch.rand(())
        self.steps += 1
        assert not self.training
        assert not self.dropout.training
        if self.steps == self.fails_at:
            raise ArithmeticError("as the test wants it")
        first = self.norm(self.conv(x))
        second = self.norm(input=first * 3 + 1)
        return self.head(self.average(self.frozen(second).mean((2, 3))))


def watched():
    torch.manual_seed(3)
    model = Watched().double()
    model.norm.register_forward_hook(lambda *_: None)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    return model


def test_everything_else_stays_as_it_was():
    model = watched()
    before, statistics = state(model), of(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images(9), torch.zeros(9)), batch_size=4, shuffle=True
    )
    lossprune.recalibrate(model, loader)
    assert state(model) == before
    changed = {n for n, value in of(model).items() if not torch.equal(value, statistics[n])}
    of_three = {f"{n}.running_{s}" for n in ("norm", "average", "frozen") for s in ("mean", "var")}
    assert changed == of_three


@torch.no_grad()
def test_a_layer_called_twice_has_the_mean_of_both():
    model, inputs = watched(), images(8)
    parts = [model.conv(x) for x in inputs.split((5, 3))]
    seen = [(len(x), x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) for x in parts]
    lossprune.recalibrate(model, split(inputs, 5, 3))
    first = sum(n * mean for n, mean, _ in seen) / 8
    # What is normalised has the mean β = 0, so 3 x + 1 has the mean 1.
    torch.testing.assert_close(model.norm.running_mean, (first + 1) / 2)


def test_statistics_stay_on_an_error():
    model = watched()
    model.fails_at = 2
    before, statistics = state(model), of(model)
    with pytest.raises(ArithmeticError, match="as the test wants it"):
        lossprune.recalibrate(model, split(images(9), 4, 5))
    assert state(model) == before
    agree(of(model), statistics, 0)


@pytest.mark.parametrize(
    ("data", "examples", "words"),
    [
        (split(images(4), 4), 5, "5 examples were asked for, but the data has only 4"),
        (split(images(4), 4), 1, "'7' gets one value per channel of a batch, .*more examples"),
        ([], None, "the data has no examples"),
        ([torch.zeros(3)], None, "a batch must be a pair .*got Tensor"),
        ([(torch.zeros(3, 1, 5, 5).double(), torch.zeros(3))], None, "the network could not be"),
        (split(images(4) * torch.nan, 4), None, "'1.running_mean' is not finite in 4 of 4 entries"),
        (split(images(4), 4)[0], None, "data is one batch, it seems"),
    ],
)
def test_what_cannot_be_done_is_said(data, examples, words):
    model = network()
    statistics = of(model)
    with pytest.raises(PruningError, match=words):
        lossprune.recalibrate(model, data, examples=examples)
    agree(of(model), statistics, 0)


def test_a_number_of_examples_is_checked_first():
    with pytest.raises(ValueError, match="examples must be a whole number of at least 1"):
        lossprune.recalibrate(nn.Linear(2, 2), [], examples=0)


def test_a_network_without_is_returned_and_no_data_is_read():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert lossprune.recalibrate(model, iter([])) is model
    masked = MaskedNetwork(PrunableNetwork(model), None)
    assert batch_norm_statistics(masked, iter([])) == {}


WRAPPERS = ("DataParallel", "prune", "inside inference", "of inference", "bfloat16")


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks(wrapper):
    model, data = network(), split(images(8), 4, 4)
    expected = of(lossprune.recalibrate(copy.deepcopy(model), data))
    given, tolerance = model, 1e-12
    if wrapper == "DataParallel":
        given = nn.DataParallel(model)
    elif wrapper == "prune":  # weights that are computed in a hook
        mask = lossprune.Mask.dense(model)
        lossprune.pruning.write_torch_pruning_(model, mask)
    elif wrapper == "of inference":
        with torch.inference_mode():
            given = model = network()
    elif wrapper == "bfloat16":
        model.bfloat16()
        data, tolerance = [(x.bfloat16(), y) for x, y in data], 0.05
    with torch.inference_mode(wrapper == "inside inference"):
        lossprune.recalibrate(given, data)
    agree({name: b.double() for name, b in of(model).items()}, expected, tolerance)


def classified(count):
    """Batches of five, and of fewer at the end."""
    targets = torch.arange(count) % 3
    return list(zip(images(count).split(5), targets.split(5), strict=True))


def classifier():
    return nn.Sequential(*network()[:8], nn.Linear(12, 3, dtype=torch.float64))


SETTINGS = {"sparsity": 0.7, "stages": 3, "data": classified(15), "examples": 12}


def same(masks, others):
    assert masks.keys() == others.keys()
    assert all(torch.equal(kept, others[name]) for name, kept in masks.items())


def test_pruning_recalibrates_at_the_end():
    model = classifier()
    before, statistics = state(model), of(model)
    plain = lossprune.prune(model, "QM", **SETTINGS)
    result = lossprune.prune(model, "QM", **SETTINGS, recalibrate="end")
    assert plain.buffers == {}
    assert state(model) == before
    agree(of(model), statistics, 0)
    same(result.mask, plain.mask)
    expected = plain.mask.apply_(copy.deepcopy(model))
    lossprune.recalibrate(expected, SETTINGS["data"], examples=12)
    agree(dict(result.buffers), of(expected))
    applied = result.apply_(copy.deepcopy(model))
    agree(dict(applied.named_buffers()), dict(expected.named_buffers()))
    loss = lossprune.measure(applied, SETTINGS["data"], examples=12, ggn_diagonal=False).loss
    assert result.stages[-1].loss_after == pytest.approx(loss, rel=1e-12)
    assert [s.loss_after for s in result.stages[:2]] == [s.loss_after for s in plain.stages[:2]]


def test_each_stage_measures_with_the_statistics_of_the_one_before():
    by_hand, masks = classifier(), []
    for mask, _ in lossprune.prune_by_stage(by_hand, "QM", **SETTINGS):
        lossprune.recalibrate(mask.apply_(by_hand), SETTINGS["data"], examples=12)
        masks.append(mask)
    result = lossprune.prune(
        classifier(),
        "QM",
        **SETTINGS,
        recalibrate="stages",
        on_stage=lambda mask, record: same(mask, masks[record.stage - 1]),
    )
    agree(dict(result.buffers), of(by_hand))
    unlike = lossprune.prune(classifier(), "QM", **SETTINGS, recalibrate="end").mask
    assert any(not torch.equal(kept, unlike[name]) for name, kept in result.mask.items())
    in_place = classifier()
    stages = lossprune.prune_by_stage(in_place, "QM", **SETTINGS, recalibrate="stages")
    mask, _ = next(stages)
    rest = lossprune.prune_by_stage(
        in_place, "QM", **SETTINGS, recalibrate="stages", start=mask, completed=1
    )
    (*_, (mask, record)) = rest
    same(mask, result.mask)
    agree(of(in_place), of(by_hand))
    assert record.loss_after == pytest.approx(result.stages[-1].loss_after, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recalibrate": "start"}, "recalibrate must be None or one of .*, got 'start'"),
        ({"recalibrate": "end", "data": None, "examples": None}, "recalibrate needs data"),
    ],
)
def test_what_pruning_cannot_recalibrate_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        lossprune.prune(classifier(), "MP", **(SETTINGS | given))


class FrozenNorm(nn.Module):
    """As detectors have them: no subclass of torch's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x):
        return x - self.running_mean


@pytest.mark.parametrize("scripted", [False, True])
def test_layers_that_are_not_torchs_are_named(scripted):
    model = nn.Sequential(nn.Linear(2, 3), FrozenNorm())
    if scripted:
        model = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    with pytest.warns(
        UserWarning, match="the running statistics of '1' stay as they are"
    ) as caught:
        assert lossprune.recalibrate(model, iter([])) is model
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
