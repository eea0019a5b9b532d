"""Saliencies and changes of the four criteria, and criteria of one's own."""

import pytest
import torch
from torch import nn

import lossprune

THETA = torch.tensor([2.0, -2.0, 0.0, 1.0], dtype=torch.float64)
G = torch.tensor([3.0, 3.0, 5.0, 0.25], dtype=torch.float64)
H = torch.tensor([1.0, 4.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "saliency", "change"),
    [
        ("MP", [2.0, 2.0, 0.0, 0.5], None),
        ("LM", [6.0, 6.0, 0.0, 0.25], [-6.0, 6.0, 0.0, -0.25]),
        ("QM", [4.0, 14.0, 0.0, 0.0], [-4.0, 14.0, 0.0, 0.0]),
        ("OBD", [2.0, 8.0, 0.0, 0.25], [2.0, 8.0, 0.0, 0.25]),
    ],
)
def test_formulas(name, saliency, change):
    criterion = lossprune.CRITERIA[name]
    assert criterion.name == name
    assert criterion.description
    assert criterion.saliency(THETA, G, H).tolist() == saliency
    if change is None:
        assert criterion.change is None
    else:
        assert criterion.change(THETA, G, H).tolist() == change


@pytest.mark.parametrize("name", lossprune.CRITERIA)
def test_each_asks_for_what_its_formulas_use(name):
    criterion = lossprune.CRITERIA[name]
    g = G if criterion.gradient else None
    h = H if criterion.curvature or criterion.statistic else None
    criterion.saliency(THETA, g, h)
    if criterion.change is not None:
        criterion.change(THETA, g, h)
    for asked, given in ((criterion.gradient, (None, H)), (criterion.curvature, (G, None))):
        if asked:  # and for nothing that they do without
            with pytest.raises(TypeError):
                criterion.saliency(THETA, *given)


@pytest.mark.parametrize("name", ["qm", "L1", ""])
def test_unknown_criterion(name):
    with pytest.raises(ValueError, match=rf"criterion '{name}'.*MP, LM, QM, OBD"):
        lossprune.prune(nn.Linear(3, 2), name, sparsity=0.5)


@pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
def test_criteria_that_need_data_say_so(criterion):
    with pytest.raises(ValueError, match=f"'{criterion}' needs data"):
        lossprune.prune(nn.Linear(3, 2), criterion, sparsity=0.5)


def test_only_what_a_criterion_asks_for_is_measured():
    seen = {}
    batch = (torch.randn(4, 3), torch.arange(4) % 2)
    for gradient in (False, True):
        for curvature in (False, True):

            def saliency(theta, g, h, key=(gradient, curvature)):
                seen[key] = (g is not None, h is not None)
                return theta.abs()

            criterion = lossprune.Criterion(
                "own", saliency, gradient=gradient, curvature=curvature
            )  # fmt: skip
            lossprune.prune(nn.Linear(3, 2), criterion, sparsity=0.5, data=[batch])
    assert seen == {key: key for key in seen}
    assert len(seen) == 4


def test_a_criterion_of_ones_own():
    """Keeps what is nearest to one; a signed saliency orders below zero too."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.9, -1.0, 3.0], [0.5, 1.2, 0.0]]))
    criterion = lossprune.Criterion("near one", lambda theta, g, h: -((theta - 1) ** 2))

    result = lossprune.prune(model, criterion, sparsity=0.5)

    assert result.mask["weight"].tolist() == [[True, False, False], [True, True, False]]
    assert result.mask.criterion == "near one"
    assert result.stages[0].predicted_change is None


@pytest.mark.parametrize(
    "saliency",
    [
        lambda theta, g, h: theta.flatten(),
        lambda theta, g, h: theta.sum(),
        lambda theta, g, h: theta.sum(1, keepdim=True),
        lambda theta, g, h: None,
    ],
    ids=["flat", "a number", "a column", "nothing"],
)
def test_saliency_of_another_shape_is_refused(saliency):
    criterion = lossprune.Criterion("own", saliency)
    with pytest.raises(ValueError, match=r"criterion 'own'.*'weight'.*\(2, 3\)"):
        lossprune.prune(nn.Linear(3, 2), criterion, sparsity=0.5)


def test_change_of_another_shape_is_refused():
    criterion = lossprune.Criterion("own", lambda t, g, h: t.abs(), change=lambda t, g, h: t.sum())
    with pytest.raises(
        ValueError, match=r"change of criterion 'own'.*'weight', \(2, 3\), got \(\)"
    ):
        lossprune.prune(nn.Linear(3, 2), criterion, sparsity=0.5)


def test_the_step_size_penalty_is_half_lambda_theta_squared():
    """With λ so large that nothing else counts, every criterion orders by magnitude."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randn(9, 5).double(), torch.arange(9) % 3)
    magnitude = lossprune.prune(model, "MP", sparsity=0.6).mask
    for criterion in ("LM", "QM", "OBD"):
        held = lossprune.prune(model, criterion, sparsity=0.6, data=[batch], reg=1e6).mask
        assert held == magnitude
        free = lossprune.prune(model, criterion, sparsity=0.6, data=[batch]).mask
        assert free != magnitude


def test_penalty_tips_the_balance_where_it_should():
    """θ = 1 and 2 with saliencies 1 and 0: λ/2 · (4 − 1) outweighs 1 from λ = 2/3 on."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    criterion = lossprune.Criterion("own", lambda theta, g, h: 2.0 - theta)
    for reg, kept in ((0.66, [True, False]), (0.67, [False, True])):
        mask = lossprune.prune(model, criterion, sparsity=0.5, reg=reg).mask
        assert mask["weight"].tolist() == [kept]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(5, 4, dtype=torch.complex64)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x + 0j).abs())


COMPLEX_DATA = [(torch.linspace(-1, 1, 30).view(6, 5), torch.arange(6) % 3)]


@pytest.mark.parametrize("data", [None, COMPLEX_DATA])
@pytest.mark.parametrize("reg", [0.0, 10.0])
def test_complex_weights_go_by_their_modulus(data, reg):
    model = Complex()
    mask = lossprune.prune(model, "MP", sparsity=0.5, data=data, reg=reg).mask
    sizes = [p.detach().abs().flatten() for p in (model.a.weight, model.b.weight)]
    kept = torch.cat(sizes) > torch.cat(sizes).sort().values[15]  # 16 of 32 go
    assert torch.equal(torch.cat([mask[name].flatten() for name in mask]), kept)
    assert not mask.apply_(model).a.weight[~mask["a.weight"]].any()


@pytest.mark.parametrize(
    "criterion", [c for c in lossprune.CRITERIA if c not in ("MP", "Wanda", "random")]
)
def test_complex_weights_have_no_other_saliency(criterion):
    with pytest.raises(
        lossprune.PruningError, match=r"'a\.weight' is complex, of torch\.complex64"
    ):
        lossprune.prune(Complex(), criterion, sparsity=0.5, data=COMPLEX_DATA)


def test_complex_weights_have_no_statistics_but_others_beside_them_do():
    with pytest.raises(lossprune.PruningError, match=r"MP, Wanda or random, or exclude="):
        lossprune.measure(Complex(), COMPLEX_DATA)
    model = Complex()
    found = lossprune.measure(model, COMPLEX_DATA, exclude="a")
    inputs, targets = COMPLEX_DATA[0]
    nn.functional.cross_entropy(model(inputs), targets).backward()
    torch.testing.assert_close(found.gradient["b.weight"], model.b.weight.grad)
    features = model.a(inputs + 0j).abs().detach()
    expected = lossprune.measure(model.b, [(features, targets)])
    torch.testing.assert_close(
        found.ggn_diagonal["b.weight"], expected.ggn_diagonal["weight"], rtol=1e-5, atol=1e-9
    )


def test_a_change_counts_only_where_weights_go():
    """Infinite for a weight that stays, as a formula of one's own may be."""
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    batches = [(torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))]
    mine = lossprune.Criterion(
        "mine",
        saliency=lambda theta, g, h: theta,
        change=lambda theta, g, h: torch.where(theta > 2, torch.inf, 10 * theta),
    )
    result = lossprune.prune(layer, mine, sparsity=0.5, data=batches, loss="mse")
    assert result.stages[0].predicted_change == 30


def test_saliencies_that_are_weights_themselves_are_not_changed():
    """Zeros are ranked below all others without being written."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, -2.0, 3.0, 0.0]])
    mine = lossprune.Criterion("mine", saliency=lambda theta, g, h: theta)
    mask = lossprune.prune(layer, mine, sparsity=0.5).mask
    assert mask["weight"].tolist() == [[False, True, True, False]]
    assert layer.weight.tolist() == [[0.0, -2.0, 3.0, 0.0]]
