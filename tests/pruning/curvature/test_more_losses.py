"""Each loss against torch's value and against automatic differentiation; functions as losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lossprune
from lossprune.pruning import (
    LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    Exact,
    MeanSquaredError,
    PruningError,
    Tolerance,
)

N, POSITIONS, CLASSES = 5, 3, 4
WEIGHT = [0.5, 2.0, 0.0, 1.5]


def tokens(seed: int = 0):
    """A network of (n, positions, 2) inputs that mixes positions: outputs (n, positions, c)."""

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 4)
            self.b = nn.Linear(4, CLASSES)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h + h.cumsum(1) + h.mean(1, keepdim=True))

    torch.manual_seed(seed)
    return Mixes().double(), torch.randn(N, POSITIONS, 2, dtype=torch.float64)


class ClassesSecond(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(-1, 1)


def flat(seed: int = 0, outputs: int = CLASSES):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    return model, torch.randn(N, 3, dtype=torch.float64)


def each(inputs, targets):
    return [((x[None],), {}, t) for x, t in zip(inputs, targets, strict=True)]


SETTINGS = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "smoothed": {"label_smoothing": 0.2},
    "weight, smoothed": {"weight": WEIGHT, "label_smoothing": 0.3},
    "ignored": {"ignore_index": 1},
    "everything": {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3},
}


def torch_settings(choice):
    settings = dict(SETTINGS[choice])
    if "weight" in settings:
        settings["weight"] = torch.tensor(settings["weight"], dtype=torch.float64)
    return settings


def counted(targets, choice):
    settings = SETTINGS[choice]
    weight = settings.get("weight", [1.0] * CLASSES)
    ignored = settings.get("ignore_index", -100)
    return sum(weight[t] for t in targets.flatten().tolist() if t not in (ignored, -100))


@pytest.mark.parametrize("choice", SETTINGS)
@pytest.mark.parametrize("memory", [1, None])
def test_cross_entropy_of_examples(choice, memory, matches):
    model, inputs = flat()
    targets = torch.tensor([0, 1, 3, 3, 1])
    statistics = lossprune.measure(
        model, [(inputs, targets)], loss=CrossEntropy(**SETTINGS[choice]), memory=memory
    )

    expected = F.cross_entropy(model(inputs), targets, **torch_settings(choice))
    assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    matches(
        statistics,
        model,
        each(inputs, targets),
        lambda z, t: F.cross_entropy(z, t, reduction="sum", **torch_settings(choice)),
        counted(targets, choice),
    )


@pytest.mark.parametrize("choice", SETTINGS)
@pytest.mark.parametrize("estimator", ["exact", "tolerance:0"])
@pytest.mark.parametrize("layout", ["classes second", "classes last"])
def test_cross_entropy_of_positions(choice, estimator, layout, matches):
    model, inputs = tokens()
    targets = torch.tensor([[0, 1, 3], [3, -100, 2], [1, 1, 1], [2, 0, 0], [-100, -100, 3]])
    if SETTINGS[choice].get("ignore_index"):
        targets = targets.clamp(min=0)
    second = ClassesSecond(model)
    last = layout == "classes last"
    loss = CrossEntropy(**SETTINGS[choice], class_dim=-1 if last else 1)

    statistics = lossprune.measure(
        model if last else second, [(inputs, targets)], loss=loss, estimator=estimator
    )

    expected = F.cross_entropy(second(inputs), targets, **torch_settings(choice))
    assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    matches(
        statistics,
        model if last else second,
        each(inputs, targets),
        lambda z, t: F.cross_entropy(
            z if last else z.movedim(0, 1), t, reduction="sum", **torch_settings(choice)
        ),
        counted(targets, choice),
        tolerance=1e-8,
    )


def probabilities(*shape: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, CLASSES, dtype=dtype, generator=generator).mul(2).softmax(-1)


@pytest.mark.parametrize("choice", [c for c in SETTINGS if "ignore_index" not in SETTINGS[c]])
@pytest.mark.parametrize("estimator", ["exact", "tolerance:0"])
@pytest.mark.parametrize("layout", ["examples", "classes second", "classes last"])
def test_cross_entropy_of_class_probabilities(choice, estimator, layout, matches):
    model, inputs = flat() if layout == "examples" else tokens()
    last = layout == "classes last"
    targets = probabilities(N) if layout == "examples" else probabilities(N, POSITIONS)
    if layout == "classes second":
        model, targets = ClassesSecond(model), targets.movedim(-1, 1)
    loss = CrossEntropy(**SETTINGS[choice], class_dim=-1 if last else 1)

    statistics = lossprune.measure(
        model, [(inputs, targets.float())], loss=loss, estimator=estimator, memory=1
    )

    targets = targets.float().double()
    second = (model(inputs), targets)
    second = [part.movedim(-1, 1) for part in second] if last else second
    expected = F.cross_entropy(*second, **torch_settings(choice))
    assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-12)

    def total(z, t):
        rows = [part.movedim(0, -1) for part in (z, t)] if layout == "classes second" else (z, t)
        return F.cross_entropy(*rows, reduction="sum", **torch_settings(choice))

    count = N if layout == "examples" else N * POSITIONS
    matches(statistics, model, each(inputs, targets), total, count, tolerance=1e-8)


def test_one_hot_probabilities_are_classes():
    model, inputs = flat()
    targets = torch.tensor([0, 1, 3, 3, 1])
    hard, soft = (
        lossprune.measure(model, [(inputs, t)])
        for t in (targets, F.one_hot(targets, CLASSES).to(torch.float32))
    )
    assert soft.loss == pytest.approx(hard.loss, rel=1e-12)
    for kind in ("gradient", "ggn_diagonal"):
        for name, tensor in getattr(hard, kind).items():
            torch.testing.assert_close(getattr(soft, kind)[name], tensor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_classes_of_any_whole_type(dtype):
    """Of uint8 the class 156 is the number −100 modulo 256."""
    model, inputs = flat(outputs=200)
    targets = torch.tensor([0, 1, 156, 156, 1]) if dtype != torch.bool else torch.arange(N) % 2
    expected = lossprune.measure(model, [(inputs, targets)])
    found = lossprune.measure(model, [(inputs, targets.to(dtype))])
    assert found.loss == expected.loss
    assert torch.equal(found.ggn_diagonal["0.weight"], expected.ggn_diagonal["0.weight"])


def test_next_token_shifts_by_one(matches):
    model, inputs = tokens()
    labels = torch.tensor([[0, 1, 3], [3, -100, 2], [1, 1, 1], [2, 0, 0], [-100, -100, 3]])
    statistics = lossprune.measure(model, [(inputs, labels)], loss="next_token")
    ahead = labels[:, 1:]
    matches(
        statistics,
        model,
        each(inputs, labels),
        lambda z, t: F.cross_entropy(z[:-1], t[1:], reduction="sum"),
        int((ahead != -100).sum()),
    )


def test_the_mean_is_over_everything_that_counts_however_examples_come():
    model, inputs = tokens()
    targets = torch.tensor([[0, 1, 3], [3, -100, 2], [1, 1, 1], [2, 0, 0], [-100, -100, 3]])
    whole = lossprune.measure(model, [(inputs, targets)], loss="token_cross_entropy")
    parts = lossprune.measure(
        model, list(zip(inputs.split(2), targets.split(2), strict=True)), loss="token_cross_entropy"
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, h in whole.ggn_diagonal.items():
        torch.testing.assert_close(parts.ggn_diagonal[name], h, rtol=1e-10, atol=1e-14)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert whole.loss == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["cross_entropy", "probabilities", "token_cross_entropy", "mse", "bce_with_logits"]
)
def test_monte_carlo_is_unbiased(name):
    """Many draws agree with the exact diagonal within 5 standard errors."""
    positions = name not in ("cross_entropy", "probabilities")
    model, inputs = tokens() if positions else flat()
    shape = (N, POSITIONS, CLASSES) if name in ("mse", "bce_with_logits") else inputs.shape[:-1]
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, shape, generator=generator)
    targets = targets.double() if name in ("mse", "bce_with_logits") else targets
    targets = probabilities(N) if name == "probabilities" else targets
    loss = LOSSES[name] if positions else CrossEntropy(WEIGHT)
    exact = lossprune.measure(model, [(inputs, targets)], loss=loss).ggn_diagonal
    draws = [
        lossprune.measure(
            model, [(inputs, targets)], loss=loss, gradient=False, estimator="monte-carlo:1",
            generator=generator,
        ).ggn_diagonal
        for _ in range(150)
    ]  # fmt: skip
    for key, h in exact.items():
        values = torch.stack([draw[key] for draw in draws])
        error = values.std(0) / len(draws) ** 0.5
        assert ((values.mean(0) - h).abs() <= 5 * error + 1e-12).all()
        assert (error <= 0.3 * h.max()).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("estimator", ["exact", "tolerance:0"])
def test_mean_squared_error(shape, estimator, matches):
    model, inputs = flat(outputs=torch.Size(shape).numel())
    model.append(nn.Flatten(0) if shape == () else nn.Unflatten(1, shape))
    targets = torch.randn(N, *shape, dtype=torch.float64)
    statistics = lossprune.measure(model, [(inputs, targets)], loss="mse", estimator=estimator)

    expected = F.mse_loss(model(inputs), targets)
    assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    matches(statistics, model, each(inputs, targets), F.mse_loss, N)


@pytest.mark.parametrize(
    ("weight", "pos_weight"),
    [(None, None), ([0.5, 2.0, 1.0], None), (None, [3.0, 0.2, 1.0]), (2.0, [[1.0], [4.0]])],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_binary_cross_entropy(weight, pos_weight, shape, matches):
    if pos_weight == [[1.0], [4.0]] and shape == (3,):
        pos_weight = [1.0, 4.0, 2.0]
    model, inputs = flat(outputs=torch.Size(shape).numel())
    model.append(nn.Unflatten(1, shape))
    targets = torch.rand(N, *shape, dtype=torch.float64)
    given = {
        name: None if value is None else torch.tensor(value, dtype=torch.float64)
        for name, value in (("weight", weight), ("pos_weight", pos_weight))
    }
    statistics = lossprune.measure(
        model, [(inputs, targets)], loss=BinaryCrossEntropy(weight, pos_weight)
    )

    expected = F.binary_cross_entropy_with_logits(model(inputs), targets, **given)
    assert statistics.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    matches(
        statistics,
        model,
        each(inputs, targets),
        lambda z, t: F.binary_cross_entropy_with_logits(z, t, **given),
        N,
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(st.floats(-60, 60), min_size=6, max_size=6),
    targets=st.lists(st.integers(0, 2), min_size=2, max_size=2),
    smoothing=st.floats(0, 0.9),
)
def test_gradient_and_factor_of_smoothed_cross_entropy(logits, targets, smoothing):
    z = torch.tensor(logits, dtype=torch.float64).view(2, 3)
    t = torch.tensor(targets)
    loss = CrossEntropy([1.0, 0.3, 2.0], smoothing)

    def value(z, n):
        weight = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
        return F.cross_entropy(z, t[n], weight=weight, label_smoothing=smoothing, reduction="sum")

    for n in range(2):
        expected = torch.func.grad(value)(z[n], n)
        torch.testing.assert_close(loss.gradient(z, t)[n], expected, rtol=1e-9, atol=1e-12)
        factor = loss.hessian_factor(z, t)[:, n]
        expected = torch.func.hessian(value)(z[n], n)
        torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, t: F.cross_entropy(z, t, reduction="none") ** 2, id="per example"),
        pytest.param(lambda z, t: F.cross_entropy(z, t) ** 2, id="a single number"),
    ],
)
def test_any_function_for_the_gradient_and_the_empirical_fisher(loss):
    """A single number is taken example by example: the square of a mean is no mean of squares."""
    model, inputs = flat()
    targets = torch.arange(N) % CLASSES
    statistics = lossprune.measure(
        model, [(inputs, targets)], loss=loss, estimator="empirical-fisher"
    )

    slopes = []
    for n in range(N):
        value = F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1]) ** 2
        slopes.append(torch.autograd.grad(value, [model[0].weight, model[2].weight]))
    for index, name in enumerate(("0.weight", "2.weight")):
        part = torch.stack([slope[index] for slope in slopes])
        torch.testing.assert_close(statistics.gradient[name], part.mean(0), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(
            statistics.ggn_diagonal[name], part.square().mean(0), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("estimator", ["exact", "tolerance", "monte-carlo:3"])
def test_other_curvature_of_a_function_is_refused(estimator):
    def hinge(outputs, targets):
        return (1 - outputs.gather(1, targets[:, None])).clamp(min=0)[:, 0]

    model, inputs = flat()
    data = [(inputs, torch.arange(N) % CLASSES)]
    with pytest.raises(PruningError, match=r"hinge.*cross_entropy.*mse.*'empirical-fisher'"):
        lossprune.prune(model, "QM", sparsity=0.5, data=data, loss=hinge, estimator=estimator)
    assert lossprune.prune(model, "LM", sparsity=0.5, data=data, loss=hinge).mask.removed == 21


@pytest.mark.parametrize(
    ("loss", "ours"),
    [
        (F.cross_entropy, CrossEntropy()),
        (F.mse_loss, MeanSquaredError()),
        (F.binary_cross_entropy_with_logits, BinaryCrossEntropy()),
        (
            nn.CrossEntropyLoss(torch.tensor(WEIGHT).double(), ignore_index=2),
            CrossEntropy(WEIGHT, 0, 2),
        ),
        (nn.MSELoss(), "mse"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]).double()),
            BinaryCrossEntropy(None, [2.0]),
        ),
    ],
)
def test_torchs_own_losses_are_known(loss, ours):
    model, inputs = flat()
    targets = torch.tensor([0, 1, 3, 3, 1])
    if isinstance(ours, str) or not isinstance(ours, CrossEntropy):
        targets = F.one_hot(targets, CLASSES).double()
    theirs = lossprune.measure(model, [(inputs, targets)], loss=loss)
    expected = lossprune.measure(model, [(inputs, targets)], loss=ours)
    assert theirs.loss == expected.loss
    assert float(loss(model(inputs), targets).detach()) == pytest.approx(theirs.loss, rel=1e-6)
    for name, h in expected.ggn_diagonal.items():
        assert torch.equal(theirs.ggn_diagonal[name], h)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(weight=[1.0, -1.0]), "weight must be"),
        (lambda: CrossEntropy(weight=torch.ones(2, 2)), "weight must be"),
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing.*\[0, 1\), got 1\.0"),
        (lambda: CrossEntropy(class_dim=2), "class_dim must be 1 or -1, got 2"),
        (lambda: CrossEntropy(shift=2), "shift must be 0 or 1, got 2"),
        (lambda: BinaryCrossEntropy(pos_weight=[float("nan")]), "pos_weight must be"),
    ],
)
def test_settings_that_are_not_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        ("mse", torch.zeros(N), r"\(4, 4\), got \(4,\)"),
        ("bce_with_logits", torch.full((N, CLASSES), 1.5), r"\[0, 1\], got 1\.5"),
        (CrossEntropy([1.0, 2.0]), torch.zeros(N).long(), "4 classes, got 2"),
        (BinaryCrossEntropy([1.0, 2.0]), torch.zeros(N, CLASSES), r"\(4,\), got shape \(2,\)"),
        ("cross_entropy", torch.full((N,), -100), "no target counts"),
        ("cross_entropy", torch.full((N, CLASSES), -0.5), r"at least 0, got -0\.5 to -0\.5"),
        ("cross_entropy", torch.full((N, CLASSES), torch.nan), "finite numbers of at least 0"),
        ("cross_entropy", torch.zeros(N, 2), r"class probabilities of the outputs' shape, got"),
        ("cross_entropy", torch.zeros(N, CLASSES).long(), "whole-number class per example"),
        (CrossEntropy([1.0, 2.0]), torch.full((N, CLASSES), 0.5), "4 classes, got 2"),
        (lambda z, t: z, torch.zeros(N), r"one number per example, \(5,\).*got shape \(5, 4\)"),
        (lambda z, t: torch.ones(len(z)), torch.zeros(N), "does not depend on the outputs"),
        (lambda z, t: 0.0, torch.zeros(N), "must return a tensor, got float"),
    ],
)
def test_targets_that_do_not_fit(loss, targets, message):
    model, inputs = flat()
    with pytest.raises(PruningError, match=message):
        lossprune.measure(model, [(inputs, targets)], loss=loss, ggn_diagonal=False)


@pytest.mark.parametrize("name", ["NLLLoss", "nll_loss", "BCELoss", "binary_cross_entropy"])
def test_losses_on_probabilities_name_the_one_on_logits_that_is_the_same(name):
    likely = name[0] in "Nn"
    loss = getattr(nn if name[0].isupper() else F, name)
    loss = loss() if name[0].isupper() else loss
    plain, inputs = flat()
    model = nn.Sequential(*plain, nn.LogSoftmax(1) if likely else nn.Sigmoid())
    targets = torch.arange(N) % CLASSES if likely else torch.rand(N, CLASSES).double()
    same = "cross_entropy" if likely else "bce_with_logits"
    with pytest.raises(PruningError, match=f"^stage 1 of 14: the loss {name} .*loss='{same}'") as e:
        lossprune.prune(model, "QM", sparsity=0.5, data=[(inputs, targets)], loss=loss)
    assert len(str(e.value)) < 500
    gradient = lossprune.measure(model, [(inputs, targets)], loss=loss, ggn_diagonal=False)
    expected = lossprune.measure(plain, [(inputs, targets)], loss=same)
    assert gradient.loss == pytest.approx(expected.loss, rel=1e-12)
    for key, slope in expected.gradient.items():
        torch.testing.assert_close(gradient.gradient[key], slope, rtol=1e-10, atol=1e-15)
    if likely:  # the softmax of log-probabilities is that of the logits
        found = lossprune.measure(model, [(inputs, targets)], loss=same)
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
        for key, h in expected.ggn_diagonal.items():
            torch.testing.assert_close(found.ggn_diagonal[key], h, rtol=1e-10, atol=1e-15)


def test_a_weight_that_would_cancel_is_refused():
    model, inputs = flat()
    data = [(inputs, torch.arange(N) % CLASSES)]
    loss = nn.NLLLoss(torch.tensor(WEIGHT).double())
    with pytest.raises(ValueError, match=r"nn\.CrossEntropyLoss with the same weight"):
        lossprune.prune(model, "LM", sparsity=0.5, data=data, loss=loss)


def test_classes_last_are_told_from_classes_second():
    model, inputs = tokens()
    with pytest.raises(PruningError, match=r"'token_cross_entropy'.*'next_token'"):
        lossprune.measure(model, [(inputs, torch.zeros(N, POSITIONS).long())])


SEGMENTS = torch.zeros(2, 32, 32, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "inputs", "targets", "loss", "passes"),
    [
        (nn.Linear(1, 20_000), (2, 1), torch.zeros(2).long(), "cross_entropy", 19_999),
        (nn.Conv2d(1, 21, 1), (2, 1, 32, 32), SEGMENTS, "cross_entropy", 20_480),
        (nn.Conv2d(1, 3, 1), (2, 1, 64, 64), torch.zeros(2, 3, 64, 64), "mse", 12_288),
        (nn.Linear(1, 50_000), (2, 3, 1), torch.zeros(2, 3).long(), "next_token", 99_998),
    ],
    ids=["classes", "segmentation", "images", "tokens"],
)
@pytest.mark.parametrize("estimator", ["exact", "tolerance"])
def test_more_passes_than_end_are_refused_with_the_way_out(
    model, inputs, targets, loss, passes, estimator
):
    data = [(torch.ones(inputs), targets)]
    message = (
        rf"{passes} backward passes for one .*'monte-carlo'.* estimator=\w+\(.*most={passes}\)"
    )
    with pytest.raises(PruningError, match=message) as error:
        lossprune.prune(model, "QM", sparsity=0.5, data=data, loss=loss, estimator=estimator)
    assert "\n" not in str(error.value)
    h = lossprune.measure(model, data, loss=loss, estimator="monte-carlo:1").ggn_diagonal
    assert float(h["weight"].sum()) > 0


def test_passes_are_counted_and_taken_all_the_same_where_that_is_said():
    """Two of three positions that count, four classes: 6 columns, whatever the third would add."""
    model = nn.Conv1d(2, 4, 1).double()
    targets = torch.tensor([[0, 1, -100], [-100, 2, -100]])
    data = [(torch.randn(2, 2, 3, dtype=torch.float64), targets)]
    all_of_them = lossprune.measure(model, data).ggn_diagonal["weight"]
    for estimator in (Exact(6), "exact:6", Tolerance(0.0, most=6)):
        taken = lossprune.measure(model, data, estimator=estimator).ggn_diagonal["weight"]
        torch.testing.assert_close(taken, all_of_them, rtol=1e-9, atol=1e-15)
    for estimator in (Exact(5), "exact:5", Tolerance(0.0, most=5)):
        with pytest.raises(PruningError, match="6 backward passes for one example"):
            lossprune.measure(model, data, estimator=estimator)


def test_a_loss_of_few_columns_is_measured_on_outputs_of_any_size():
    """The squared mean of an image: one column."""

    class SquaredMean:
        def check(self, outputs, targets):
            pass

        def value(self, outputs, targets):
            return (outputs.flatten(1).mean(1) - targets) ** 2

        def gradient(self, outputs, targets):
            residual = outputs.flatten(1).mean(1) - targets
            return (2 * residual / outputs[0].numel())[:, None, None, None].expand_as(outputs)

        def hessian_factor(self, outputs):
            return torch.full_like(outputs, 2**0.5 / outputs[0].numel())[None]

    model = nn.Conv2d(1, 3, 1).double()
    inputs = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    statistics = lossprune.measure(model, [(inputs, torch.ones(2))], loss=SquaredMean())
    expected = 2 * inputs.flatten(1).mean(1).square().mean() / 9
    torch.testing.assert_close(
        statistics.ggn_diagonal["weight"].flatten(), expected.expand(3), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("loss", [3, None, "hinge"])
def test_what_is_no_loss(loss):
    model, inputs = flat()
    with pytest.raises(ValueError, match=r"cross_entropy.*next_token.*mse"):
        lossprune.measure(model, [(inputs, torch.zeros(N).long())], loss=loss)
