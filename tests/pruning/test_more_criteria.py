"""SNIP, GraSP, SynFlow, the empirical Fisher and random numbers, against their definitions."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import lossprune
from lossprune.pruning import PruningError

N, CLASSES = 12, 3
SHARE = 0.4


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 6), nn.Tanh(),
        nn.Linear(6, CLASSES),
    ).double()  # fmt: skip


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, 5, dtype=torch.float64, generator=generator)
    return x, torch.arange(N) % CLASSES


def weights(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def kept_by(saliencies, share=SHARE, before=None):
    """What is left where the smallest are removed over all layers together."""
    names = list(saliencies)
    flat = torch.cat([saliencies[name].flatten() for name in names])
    if before is not None:
        flat = flat.where(torch.cat([before[name].flatten() for name in names]), -torch.inf)
    count = round(share * len(flat))
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.argsort()[:count]] = False
    parts = kept.split([saliencies[name].numel() for name in names])
    return {name: part.view_as(saliencies[name]) for name, part in zip(names, parts, strict=True)}


def assert_mask(mask, expected):
    assert dict(mask.items()).keys() == expected.keys()
    for name, kept in expected.items():
        assert torch.equal(mask[name], kept), name


def flow(model, x, y):
    """∂(½ ‖∂L/∂θ‖²)/∂θ = H g of the prunable weights, by differentiating the norm itself."""
    values = {name: p.detach().clone().requires_grad_() for name, p in weights(model).items()}
    loss = F.cross_entropy(functional_call(model, values, (x,)), y)
    slopes = torch.autograd.grad(loss, list(values.values()), create_graph=True)
    half = sum((slope**2).sum() for slope in slopes) / 2
    return dict(zip(values, torch.autograd.grad(half, list(values.values())), strict=True))


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("cut", [5, N])
def test_grasp_removes_what_raises_the_gradient_norm(memory, cut):
    model, (x, y) = network(), batch()
    data = list(zip(x.split(cut), y.split(cut), strict=True))
    mask = lossprune.prune(model, "GraSP", sparsity=SHARE, data=data, memory=memory).mask
    product = flow(model, x, y)
    assert_mask(mask, kept_by({n: p.detach() * product[n] for n, p in weights(model).items()}))


def test_grasp_changes_the_gradient_norm_as_it_says():
    """To first order, θ H g is what half the squared norm loses as θ goes."""
    model, (x, y) = network(), batch()

    def half_norm(model):
        loss = F.cross_entropy(model(x), y)
        slopes = torch.autograd.grad(loss, list(weights(model).values()))
        return float(sum((slope**2).sum() for slope in slopes)) / 2

    product = flow(model, x, y)
    step = 1e-6
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved[3].weight[2, 4] *= 1 - step
    change = (half_norm(moved) - half_norm(model)) / step
    expected = -float(model[3].weight[2, 4].detach() * product["3.weight"][2, 4])
    assert change == pytest.approx(expected, rel=1e-4)


def test_grasp_at_later_stages_takes_the_gradient_of_what_is_left():
    model, (x, y) = network(), batch()
    settings = {"data": [(x, y)], "schedule": [0.3, 0.5]}
    mask = lossprune.prune(model, "GraSP", sparsity=0.5, **settings).mask
    first = lossprune.prune(model, "GraSP", sparsity=0.3, data=[(x, y)]).mask
    pruned = copy.deepcopy(model)
    first.apply_(pruned)
    values = {name: p.detach().clone().requires_grad_() for name, p in weights(pruned).items()}
    loss = F.cross_entropy(functional_call(pruned, values, (x,)), y)
    slopes = torch.autograd.grad(loss, list(values.values()), create_graph=True)
    half = sum(((slope * first[name]) ** 2).sum() for name, slope in zip(values, slopes)) / 2  # noqa: B905
    product = dict(zip(values, torch.autograd.grad(half, list(values.values())), strict=True))
    scores = {name: p.detach() * product[name] for name, p in weights(model).items()}
    assert_mask(mask, kept_by(scores, 0.5, first))


def test_grasp_through_attention():
    """torch's fused attention has no second derivative; the plain one has."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            h = self.a(x.mT)[:, None]
            return self.b(F.scaled_dot_product_attention(h, h, h)[:, 0].mean(1))

    torch.manual_seed(0)
    model, (x, y) = Attends().double(), batch()
    mask = lossprune.prune(model, "GraSP", sparsity=0.5, data=[(x, y)]).mask
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        product = flow(model, x, y)
    assert_mask(mask, kept_by({n: p.detach() * product[n] for n, p in weights(model).items()}, 0.5))


@pytest.mark.parametrize("criterion", ["SNIP", "LM"])
def test_snip_ranks_as_the_linear_model(criterion):
    """SNIP's own definition: the derivative of the loss in a mask's entries, at ones."""
    model, (x, y) = network(), batch()
    masks = {name: torch.ones_like(p, requires_grad=True) for name, p in weights(model).items()}
    values = {name: p.detach() * masks[name] for name, p in weights(model).items()}
    loss = F.cross_entropy(functional_call(model, values, (x,)), y)
    slopes = torch.autograd.grad(loss, list(masks.values()))
    total = sum(slope.abs().sum() for slope in slopes)
    scores = {name: s.abs() / total for name, s in zip(masks, slopes, strict=True)}
    settings = {"sparsity": SHARE, "data": [(x, y)], "stages": 1, "reg": 0.0}
    assert_mask(lossprune.prune(model, criterion, **settings).mask, kept_by(scores))


def test_empirical_fisher_obd():
    model, (x, y) = network(), batch()
    squares = {name: torch.zeros_like(p) for name, p in weights(model).items()}
    for n in range(N):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, slope in zip(
            squares, torch.autograd.grad(loss, list(weights(model).values())), strict=True
        ):
            squares[name] += slope**2 / N
    result = lossprune.prune(model, "EF-OBD", sparsity=SHARE, data=[(x, y)], stages=1)
    scores = {n: 0.5 * squares[n] * p.detach() ** 2 for n, p in weights(model).items()}
    assert_mask(result.mask, kept_by(scores))
    removed = sum(float(scores[name][~kept].sum()) for name, kept in result.mask.items())
    assert result.stages[0].predicted_change == pytest.approx(removed, rel=1e-9)


def chain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(),
        nn.Linear(6, 3, bias=False),
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_synflow_sums_the_paths_through_a_weight(dtype):
    """Of a chain of layers, R is the sum over all paths of the product of their |θ|."""
    model = chain(dtype)
    a, b, c = (model[i].weight.detach().double().abs() for i in (0, 2, 4))
    into_b, into_c = a.sum(1), b @ a.sum(1)
    out_of_b, out_of_a = c.sum(0), b.T @ c.sum(0)
    scores = {
        "0.weight": a * out_of_a[:, None],
        "2.weight": b * out_of_b[:, None] * into_b[None],
        "4.weight": c * into_c[None],
    }
    data = [(torch.randn(2, 4).to(dtype), torch.tensor([0, 1]))]
    mask = lossprune.prune(model, "SynFlow", sparsity=SHARE, data=data, stages=1).mask
    assert_mask(mask, kept_by(scores))
    totals = [float(score.sum()) for score in scores.values()]
    assert totals == pytest.approx([totals[0]] * 3)  # the flow is conserved from layer to layer


def test_synflow_is_data_free():
    model = network()
    masks = [
        lossprune.prune(model, "SynFlow", sparsity=0.8, data=[batch(seed)]).mask for seed in (0, 1)
    ]
    assert masks[0] == masks[1]
    x, y = batch()
    values_only = lossprune.prune(model, "SynFlow", sparsity=0.8, data=[(x[:1] * 100, y[:1])]).mask
    assert values_only == masks[0]


def test_synflow_takes_100_stages_and_keeps_every_layer():
    torch.manual_seed(0)
    layers = [nn.Linear(20, 20, bias=False)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(20, 20, bias=False)]
    layers += [nn.ReLU(), nn.Linear(20, 3, bias=False)]
    model = nn.Sequential(*layers)
    data = [(torch.randn(2, 20), torch.tensor([0, 1]))]
    result = lossprune.prune(model, "SynFlow", sparsity=0.985, data=data)
    assert len(result.stages) == 100
    assert [stage.sparsity for stage in result.stages[:2]] == pytest.approx(
        [1 - 0.015**0.01, 1 - 0.015**0.02], abs=5e-4
    )
    assert all(kept.any() for kept in result.mask.values())
    assert lossprune.prune(model, "SynFlow", sparsity=0.5, data=data, stages=3).stages[2:]
    steps = lossprune.prune(model, "SynFlow", sparsity=0.5, data=data, schedule=[0.2, 0.5]).stages
    assert len(steps) == 2


def test_synflow_with_batch_norm_and_tokens():
    """Absolute values of buffers too; whole numbers, such as tokens, stay as they are."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.BatchNorm1d(4)
            self.out = nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.out(self.norm(self.embed(x).mean(1)))

    torch.manual_seed(0)
    model = Words()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    x = torch.tensor([[1, 2, 5], [3, 0, 6]])
    before = copy.deepcopy(model.state_dict())
    mask = lossprune.prune(
        model, "SynFlow", sparsity=0.5, data=[(x, torch.tensor([0, 1]))], stages=1
    ).mask
    h = model.embed.weight.detach().double().abs()[x[0]].mean(0)
    h = (h - model.norm.running_mean.abs()) / (model.norm.running_var.double() + 1e-5).sqrt()
    assert_mask(
        mask, kept_by({"out.weight": model.out.weight.detach().double().abs() * h[None]}, 0.5)
    )
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_random_is_uniform_and_seeded():
    model = network()
    kept = torch.zeros(0)
    for seed in range(200):
        mask = lossprune.prune(model, "random", sparsity=0.75, seed=seed).mask
        flat = torch.cat([part.flatten() for part in mask.values()]).double()
        kept = flat if not len(kept) else kept + flat
    share = kept / 200
    assert float(share.mean()) == pytest.approx(0.25, abs=0.005)
    assert float((share - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 200) ** 0.5
    again = lossprune.prune(model, "random", sparsity=0.75, seed=199).mask
    assert again == mask
    assert lossprune.prune(model, "random", sparsity=0.75, seed=198).mask != mask


def test_random_without_a_seed_leaves_the_generator_alone():
    model = network()
    state = torch.get_rng_state()
    first = lossprune.prune(model, "random", sparsity=0.5, stages=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert lossprune.prune(model, "random", sparsity=0.5, stages=3).mask == first.mask
    assert first.stages[0].predicted_change is None
    torch.manual_seed(1)
    assert lossprune.prune(model, "random", sparsity=0.5, stages=3).mask != first.mask


@pytest.mark.parametrize("criterion", ["SNIP", "GraSP", "SynFlow", "EF-OBD"])
def test_those_that_need_data_say_so(criterion):
    with pytest.raises(ValueError, match=f"'{criterion}' needs data"):
        lossprune.prune(network(), criterion, sparsity=0.5)


@pytest.mark.parametrize("criterion", [*lossprune.CRITERIA])
def test_every_criterion_keeps_to_the_bargain(criterion):
    """The sparsity exact at every stage, the network and the random state left alone."""
    model, data = network(), [batch()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    result = lossprune.prune(model, criterion, sparsity=0.9, data=data, stages=4, reg=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    total = result.mask.total
    assert [s.removed for s in result.stages] == [
        round(x * total) for x in lossprune.sparsities("exponential", 0.9, 4)
    ]
    assert result.mask.criterion == criterion
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(p.grad is None for p in model.parameters())


def test_any_loss_for_those_that_need_its_gradient_alone():
    model, (x, y) = network(), batch()

    def cubed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none") ** 3

    for criterion in ("LM", "SNIP", "GraSP", "EF-OBD", "SynFlow", "random", "MP"):
        result = lossprune.prune(
            model, criterion, sparsity=0.5, data=[(x, y)], loss=cubed, stages=1
        )
        assert result.stages[0].loss_before == pytest.approx(
            float(cubed(model(x), y).mean().detach()), rel=1e-12
        )
    for criterion in ("QM", "OBD"):
        with pytest.raises(PruningError, match=r"cubed.*empirical-fisher"):
            lossprune.prune(model, criterion, sparsity=0.5, data=[(x, y)], loss=cubed)


def test_an_unknown_statistic_names_those_there_are():
    criterion = lossprune.Criterion("own", lambda theta, g, h: h, statistic="entropy")
    with pytest.raises(ValueError, match=r"statistic 'entropy'.*hessian-gradient.*uniform"):
        lossprune.prune(network(), criterion, sparsity=0.5)
