"""What cannot be measured exactly is refused, with the parameter or the reason named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossprune
from lossprune.pruning import PruningError


def batch(*shape: int, examples: int = 8, classes: int = 2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(examples, *shape, generator=generator), torch.arange(examples) % classes


class MixesExamples(nn.Module):
    """Two layers with ``mix`` between them."""

    def __init__(self, mix):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)
        self.mix = mix

    def forward(self, x):
        return self.b(self.mix(torch.tanh(self.a(x))))


@pytest.mark.parametrize(
    "mix",
    [
        pytest.param(lambda h: h + h.mean(0), id="mean over the batch"),
        pytest.param(lambda h: h.flip(0), id="order reversed"),
        pytest.param(lambda h: (h @ h.T).softmax(1) @ h, id="attention over the batch"),
        pytest.param(nn.BatchNorm1d(4, track_running_stats=False), id="batch statistics"),
        pytest.param(lambda h: h.cumsum(0), id="sum of the examples before"),
        pytest.param(lambda h: h + F.pad(h, (0, 0, 1, -1)), id="previous example"),
    ],
)
def test_examples_that_interact_are_refused(mix):
    with pytest.raises(PruningError, match=r"'a\.weight'"):
        lossprune.measure(MixesExamples(mix), [batch(3)])


def test_examples_that_interact_in_a_later_batch_are_refused():
    inputs, targets = batch(3)
    batches = [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
    with pytest.raises(PruningError, match=r"'a\.weight'"):
        lossprune.measure(MixesExamples(lambda h: h + h.mean(0)), batches)


def test_examples_that_interact_are_refused_where_outputs_add_up_to_a_constant():
    class Centred(MixesExamples):
        def forward(self, x):
            logits = super().forward(x)
            return logits - logits.mean(1, keepdim=True)

    with pytest.raises(PruningError, match=r"'a\.weight'"):
        lossprune.measure(Centred(lambda h: h + h.mean(0)), [batch(3)])


def test_network_that_changes_its_inputs_is_refused_or_measured_on_a_copy():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.mul_(2.0))

    inputs, targets = batch(3)
    before = inputs.clone()
    try:
        statistics = lossprune.measure(model := Doubles(), [(inputs, targets)])
    except PruningError:
        pass
    else:
        expected = F.cross_entropy(model.fc(2 * before), targets)
        assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.equal(inputs, before)


def test_layer_input_changed_afterwards_is_refused():
    """Training such a network fails too: torch says that a tensor it needs has changed."""

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x):
            x = 1.0 * x
            h = self.a(x)
            x.zero_()
            return self.b(torch.tanh(h))

    with pytest.raises(PruningError, match=r"'a\.weight'"):
        lossprune.measure(Overwrites(), [batch(3)], gradient=False)


def test_weight_reached_past_the_module_is_refused():
    class Captured(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.weights = [self.fc.weight]

        def forward(self, x):
            return F.linear(x, self.weights[0])

    with pytest.raises(PruningError, match=r"'fc\.weight'"):
        lossprune.measure(Captured(), [batch(3)])


def test_mixed_precision_inside_the_network():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x).float()

    torch.manual_seed(0)
    model = Autocast()
    exact = lossprune.measure(model.fc, [batch(3)])
    rounded = lossprune.measure(model, [batch(3)])
    torch.testing.assert_close(
        rounded.ggn_diagonal["fc.weight"], exact.ggn_diagonal["weight"], rtol=0.05, atol=1e-3
    )


def test_switched_off_gradients_are_named():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    with pytest.raises(PruningError, match=r"'backbone\.weight'.*gradients are switched off"):
        lossprune.measure(Frozen(), [batch(3)])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1))), r"\(8, 2, 1\)|\(4, 2, 1\)"),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), r"\(16,\)|\(8,\)"),
    ],
    ids=["too many dimensions", "too few"],
)
def test_outputs_that_the_loss_cannot_take(network, message):
    with pytest.raises(PruningError, match=message):
        lossprune.measure(network, [batch(3)])


def test_outputs_that_are_not_a_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(PruningError, match="must return a tensor of outputs, got tuple"):
        lossprune.measure(Pair(3, 2), [batch(3)])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 1]), r"\[0, 2\).*got 2"),
        (torch.tensor([0, 1, -1, 1]), r"\[0, 2\).*got -1"),
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), "float32"),
        (torch.eye(4, 2).long(), r"\(4, 2\)"),
    ],
    ids=["class too high", "class negative", "not whole numbers", "one-hot"],
)
def test_targets_that_the_loss_cannot_take(targets, message):
    with pytest.raises(PruningError, match=message):
        lossprune.measure(nn.Linear(3, 2), [(torch.randn(4, 3), targets)])


@pytest.mark.parametrize("name", ["other", "weight"])
def test_mask_of_another_network_is_refused(name):
    mask = lossprune.Mask({name: torch.ones(7, 3, dtype=torch.bool)})
    with pytest.raises(PruningError, match="'weight'"):
        lossprune.measure(nn.Linear(3, 2), [batch(3)], mask=mask)


@pytest.mark.parametrize(("classes", "tokens", "labels"), [(3, 1, 2), (4, 3, 9), (4, 3, 12)])
def test_labels_that_take_as_many_passes_as_the_exact_curvature(classes, tokens, labels):
    """A pruning refuses them; a measurement, which may be there to compare the two, does not."""
    model, x = nn.Linear(2, classes), torch.randn(5, tokens, 2)
    data, passes = [(x, torch.zeros(5, tokens).long())], tokens * (classes - 1)
    settings = {"loss": "token_cross_entropy", "estimator": f"monte-carlo:{labels}"}
    with pytest.raises(
        PruningError,
        match=rf"'monte-carlo:{labels}' takes {labels} backward passes for one example, where the "
        rf"exact curvature takes {passes}: give estimator='exact'$",
    ):
        lossprune.prune(model, "QM", sparsity=0.5, data=data, **settings)
    fewer = settings | {"estimator": f"monte-carlo:{passes - 1}"}
    assert lossprune.prune(model, "QM", sparsity=0.5, data=data, **fewer).mask.sparsity == 0.5
    lossprune.measure(model, data, **settings)
