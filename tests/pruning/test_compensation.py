"""Compensation: the weights that are left are those of the dense solution in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F

import lossprune
from lossprune.pruning import LOSSES, CrossEntropy, PruningError
from lossprune.pruning.curvature.losses import FullLoss
from tests.models.architectures import ARCHITECTURES
from tests.models.calls import assert_same, data_of, network_of, snapshot
from tests.models.expectations import REFUSED

EXAMPLES = 60


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.out(torch.tanh(self.other(torch.tanh(self.one(x)))))


class Tokens(nn.Module):
    """A recurrent layer, attention and a head, (n, t, 4) to (n, t, 3)."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x, _ = self.rnn(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Rounded(torch.autograd.Function):
    """Without a forward-mode derivative; its backward one is that of x ↦ x."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(Rounded.apply(10 * self.fc(x)) / 10))


def perceptron(outputs=3):
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs))


def convolution():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def drawn(*shape):
    return torch.randn(EXAMPLES, *shape, dtype=torch.float64)


# What each is trained on: make, shape of an input, loss, and targets of the outputs of the network
# before it is pruned, so that what fits some examples fits others.
CASES = {
    "linear": (perceptron, (5,), "cross_entropy", lambda z: z.argmax(1)),
    "convolution": (convolution, (1, 4, 4), "cross_entropy", lambda z: z.argmax(1)),
    "shared": (Shared, (6,), "cross_entropy", lambda z: z.argmax(1)),
    "mse": (perceptron, (5,), "mse", lambda z: z),
    "bce": (perceptron, (5,), "bce_with_logits", lambda z: z.sigmoid()),
    "weighted": (
        perceptron, (5,), CrossEntropy(weight=(0.5, 1.0, 2.0), label_smoothing=0.1),
        lambda z: z.argmax(1),
    ),
    "probabilities": (perceptron, (5,), "cross_entropy", lambda z: z.softmax(1)),
    "tokens": (
        Tokens, (4, 4), "token_cross_entropy",
        lambda z: torch.where(torch.rand(z.shape[:2]) < 0.2, -100, z.argmax(2)),
    ),
}  # fmt: skip


def case(name):
    torch.manual_seed(3)
    make, shape, loss, targets = CASES[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    inputs = drawn(*shape)
    with torch.no_grad():
        targets = targets(model.eval()(inputs))
    return model.train(), inputs, targets, LOSSES[loss] if isinstance(loss, str) else loss


def dense_step(model, inputs, targets, loss, before, after, damping):
    """θ ⊙ m + δ with δ_S from the whole matrix, and gᵀδ + ½ δᵀGδ; one example at a time."""
    model = copy.deepcopy(model).eval()
    theta = {name: p.detach() * before.get(name, 1) for name, p in model.named_parameters()}
    names = list(after)
    size = sum(theta[name].numel() for name in names)
    g, matrix, amount = torch.zeros(size).double(), torch.zeros(size, size).double(), 0.0

    def flat(tensors):
        return torch.cat([tensors[name].flatten() for name in names])

    for x, t in zip(inputs, targets, strict=True):

        def outputs(values, x=x):
            return functional_call(model, {**theta, **values}, (x[None],))

        def value(z, t=t):
            return loss.value(z, t[None]).sum()

        weights = {name: theta[name] for name in names}
        z = outputs(weights)
        jacobian = {n: j.reshape(z.numel(), -1) for n, j in jacrev(outputs)(weights).items()}
        j = torch.cat([jacobian[name] for name in names], 1)
        h = hessian(value)(z).reshape(z.numel(), z.numel())
        g += flat(grad(lambda values, f=outputs, v=value: v(f(values)))(weights))
        matrix += j.T @ h @ j
        amount += float(loss.amount(z, t[None]).sum()) if hasattr(loss, "amount") else 1.0
    g, matrix = g / amount, matrix / amount
    kept = flat({name: after[name].bool() for name in names})
    delta = torch.where(kept, 0.0, -flat(theta))
    left = matrix[kept][:, kept] + damping * torch.eye(int(kept.sum()), dtype=torch.float64)
    delta[kept] = torch.linalg.solve(left, -(g + matrix @ delta)[kept])
    change = g @ delta + 0.5 * delta @ matrix @ delta
    moved = flat(theta) + delta
    parts = moved.split([theta[name].numel() for name in names])
    return {n: p.view_as(theta[n]) for n, p in zip(names, parts, strict=True)}, float(change)


def of_the_fit(tensor):
    """All but every fifth example."""
    return tensor[(torch.arange(len(tensor)) + 1) % 5 != 0]


@pytest.mark.parametrize("parameters", ["prunable", "all"])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_dense_solution(name, parameters):
    model, inputs, targets, loss = case(name)
    before = copy.deepcopy(model.state_dict())
    result = lossprune.prune(
        model, "random", sparsity=0.5, data=[*zip(inputs.split(7), targets.split(7), strict=True)],
        loss=loss, seed=0, progress=False,
        compensate=lossprune.Compensation(400, dampings=(1.0, 10.0, 1000.0), parameters=parameters),
    )  # fmt: skip
    record = result.stages[0].compensation
    assert record.moved
    after = dict(result.mask)
    if parameters == "all":
        after = {n: after.get(n, torch.ones_like(p)) for n, p in model.named_parameters()}
    expected, change = dense_step(
        model, of_the_fit(inputs), of_the_fit(targets), loss, {}, after, record.damping
    )
    assert result.weights.keys() == expected.keys()
    for weight, moved in result.weights.items():
        torch.testing.assert_close(moved, expected[weight], rtol=1e-8, atol=1e-8)
    assert record.predicted_change == pytest.approx(change, abs=1e-9)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.full("every kind of network, beside the oracle's few")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if (name, "prune LM") not in REFUSED]
)
def test_every_kind_of_network_can_be_compensated(name):
    architecture = ARCHITECTURES[name]
    network, arguments = network_of(architecture), data_of(architecture)
    arguments["data"] = arguments.pop("batches")
    before = snapshot(network)
    result = lossprune.prune(
        network, "MP", sparsity=0.5, stages=1, progress=False,
        compensate=lossprune.Compensation(3), **arguments,
    )  # fmt: skip
    assert_same(snapshot(network), before)
    record = result.stages[0].compensation
    if record.moved:
        assert record.predicted_change < record.predicted_change_without
        assert record.loss_apart < record.loss_apart_without
    for key, weight in result.weights.items():
        assert weight.isfinite().all()
        assert not weight[~result.mask[key]].any()


def test_second_stage_starts_from_the_moved_weights():
    model, inputs, targets, loss = case("mse")
    inputs, targets = inputs.repeat(10, 1), targets.repeat(10, 1)
    masks = []
    result = lossprune.prune(
        model, "MP", sparsity=0.6, stages=2, data=[(inputs, targets)], loss=loss, progress=False,
        compensate=lossprune.Compensation(400, dampings=(1.0, 10.0, 1000.0)),
        on_stage=lambda mask, _: masks.append(mask),
    )  # fmt: skip
    fit = of_the_fit(inputs), of_the_fit(targets)
    here = copy.deepcopy(model)
    for before, after, stage in zip([{}, masks[0]], masks, result.stages, strict=True):
        assert stage.compensation.moved
        moved, _ = dense_step(here, *fit, loss, before, after, stage.compensation.damping)
        here.load_state_dict({**here.state_dict(), **moved})
        assert stage.loss_after == pytest.approx(F.mse_loss(here(inputs), targets).item())
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight, here.get_parameter(name), rtol=1e-8, atol=1e-8)
    # MP ranks by the weights as they are after the first stage.
    assert result.stages[1].loss_before == pytest.approx(result.stages[0].loss_after)
    assert masks[1] != lossprune.prune(model, "MP", sparsity=0.6).mask


def test_operation_without_forward_derivative():
    torch.manual_seed(0)
    model, inputs = StraightThrough().double(), drawn(5)
    targets = model(inputs).argmax(1)
    settings = {
        "sparsity": 0.5, "data": [(inputs, targets)], "seed": 0, "progress": False,
        "compensate": lossprune.Compensation(400, dampings=(1.0, 10.0, 1000.0)),
    }  # fmt: skip
    result = lossprune.prune(model, "random", **settings)
    record = result.stages[0].compensation
    assert record.moved
    after = dict(result.mask)

    class Same(StraightThrough):
        """A network of the same values and backward derivatives, which has forward ones."""

        def forward(self, x):
            y = 10 * self.fc(x)
            return self.out(torch.tanh((y + (y.round() - y).detach()) / 10))

    same = Same().double()
    same.load_state_dict(model.state_dict())
    fit = of_the_fit(inputs), of_the_fit(targets)
    loss = LOSSES["cross_entropy"]
    expected, _ = dense_step(same, *fit, loss, {}, after, record.damping)
    for name, weight in result.weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-8, atol=1e-8)


def test_little_memory_changes_nothing_but_rounding():
    model, inputs, targets, loss = case("convolution")
    much, little = (
        lossprune.prune(
            model, "MP", sparsity=0.5, data=[(inputs[:10], targets[:10])], loss=loss, seed=0,
            memory=memory, progress=False, compensate=lossprune.Compensation(5),
        )
        for memory in (None, 1)
    )  # fmt: skip
    assert much.stages[0].compensation.iterations == 5
    for name, weight in much.weights.items():
        torch.testing.assert_close(little.weights[name], weight, rtol=1e-9, atol=1e-12)


def test_step_that_raises_the_loss_apart_is_not_taken():
    """What fits the examples of the fit does not fit those apart, which are of another class."""
    torch.manual_seed(0)
    model, inputs = perceptron().double(), drawn(5)
    targets = ((torch.arange(EXAMPLES) + 1) % 5 == 0).long()
    result = lossprune.prune(
        model, "MP", sparsity=0.1, data=[(inputs, targets)], progress=False,
        compensate=lossprune.Compensation(50),
    )  # fmt: skip
    record = result.stages[0].compensation
    assert not record.moved
    assert record.predicted_change == record.predicted_change_without
    assert record.loss_apart == record.loss_apart_without
    for name, weight in result.weights.items():
        assert torch.equal(weight, model.get_parameter(name) * result.mask[name])
    assert result.stages[0].loss_after == record.loss_without


@pytest.mark.parametrize("examples", [40, 600])
def test_small_fall_is_believed_of_many_examples_apart_only(examples):
    """Labels by chance: a step that fits them lowers the loss apart, if it does, by chance too."""
    moved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model = perceptron().double()
        inputs, targets = torch.randn(examples, 5).double(), torch.randint(3, (examples,))
        record = lossprune.prune(
            model, "random", sparsity=0.1, data=[(inputs, targets)], seed=seed, progress=False,
            compensate=lossprune.Compensation(30, dampings=(1000.0,)),
        ).stages[0].compensation  # fmt: skip
        assert record.apart == examples // 5
        assert not record.moved or record.loss_apart < record.loss_apart_without
        moved += record.moved
    assert moved <= 2 if examples == 40 else moved >= 9


def test_fewer_examples_are_those_that_come_first():
    model, inputs, targets, loss = case("linear")
    batches = [*zip(inputs.split(7), targets.split(7), strict=True)]
    settings = {"sparsity": 0.5, "loss": loss, "seed": 0, "progress": False}
    some = lossprune.prune(
        model, "MP", data=batches, compensate=lossprune.Compensation(5, examples=25), **settings
    )
    cut = lossprune.prune(
        model, "MP", data=batches, examples=25, compensate=lossprune.Compensation(5), **settings
    )
    assert some.stages[0].compensation.apart == cut.stages[0].compensation.apart == 5
    for name, weight in cut.weights.items():
        torch.testing.assert_close(some.weights[name], weight, rtol=1e-10, atol=1e-12)
    whole = lossprune.prune(
        model, "MP", data=batches, compensate=lossprune.Compensation(5), **settings
    )
    assert any(not torch.equal(whole.weights[name], cut.weights[name]) for name in cut.weights)


def test_finish_stages_remove_nothing_and_lower_the_loss():
    model, inputs, targets, loss = case("linear")
    settings = {
        "sparsity": 0.5,
        "stages": 2,
        "data": [(inputs, targets)],
        "loss": loss,
        "progress": False,
    }
    plain = lossprune.prune(model, "QM", compensate=True, **settings)
    more = lossprune.prune(model, "QM", compensate=lossprune.Compensation(finish=3), **settings)
    assert [stage.removed for stage in more.stages] == [
        *(stage.removed for stage in plain.stages), *[plain.mask.removed] * 3
    ]  # fmt: skip
    assert more.mask == plain.mask
    assert more.stages[-1].loss_after < plain.stages[-1].loss_after
    assert all(stage.predicted_change == 0 for stage in more.stages[2:])


def test_pruning_by_stage_moves_the_network_and_goes_on():
    model, inputs, targets, loss = case("convolution")
    settings = {
        "sparsity": 0.7, "stages": 4, "data": [(inputs, targets)], "loss": loss, "seed": 1,
        "compensate": True, "recalibrate": "stages",
    }  # fmt: skip
    whole = lossprune.prune(model, "QM", **settings)
    moving = copy.deepcopy(model)
    stages = lossprune.prune_by_stage(moving, "QM", **settings)
    for _ in range(2):
        mask, record = next(stages)
    later = copy.deepcopy(moving)  # as a checkpoint has it
    rest = lossprune.prune_by_stage(
        later, "QM", start=mask, completed=2, damping=record.compensation.damping, **settings
    )
    records = [record for _, record in rest]
    assert [r.loss_after for r in records] == [r.loss_after for r in whole.stages[2:]]
    assert [r.compensation.damping for r in records] == [
        r.compensation.damping for r in whole.stages[2:]
    ]
    applied = whole.apply_(model)
    for name, tensor in applied.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name]), name
    assert whole.buffers.keys() == {"1.running_mean", "1.running_var"}


def test_result_is_put_into_a_network():
    model, inputs, targets, loss = case("linear")
    result = lossprune.prune(
        model, "QM", sparsity=0.5, data=[(inputs, targets)], loss=loss, progress=False,
        compensate=True,
    )  # fmt: skip
    only_mask = result.mask.apply_(copy.deepcopy(model))
    biases = model[0].bias.clone()
    assert result.apply_(model) is model
    assert F.cross_entropy(model(inputs), targets).item() == pytest.approx(
        result.stages[-1].loss_after
    )
    assert F.cross_entropy(only_mask(inputs), targets).item() != pytest.approx(
        result.stages[-1].loss_after
    )
    assert torch.equal(model[0].bias, biases)
    for name, kept in result.mask.items():
        assert not model.get_parameter(name)[~kept].any()
    wrapped = result.apply_(nn.DataParallel(perceptron().double()))
    assert torch.equal(wrapped.module[0].weight, model[0].weight)
    with pytest.raises(PruningError, match="does not fit the network"):
        result.apply_(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))


def absolute(outputs, targets):
    return (outputs - targets).abs().mean(1)


@pytest.mark.parametrize(
    ("error", "sentence", "changed"),
    [
        (ValueError, "compensate needs data", {"data": None}),
        (ValueError, "compensate must be True, False or a lossprune.Compensation",
         {"compensate": "yes"}),
        (ValueError, "recalibrate must be None or one of stages, end", {"recalibrate": "always"}),
        (ValueError, "compensate needs the curvature of the loss, but absolute is a plain function",
         {"loss": absolute}),
        (PruningError, "sets one of every 5 examples apart.*has only 4", {"examples": 4}),
    ],
)  # fmt: skip
def test_refusals(error, sentence, changed):
    settings = {
        "criterion": "MP",
        "sparsity": 0.5,
        "data": [(drawn(5), torch.arange(EXAMPLES) % 3)],
        "compensate": True,
        "progress": False,
    }
    with pytest.raises(error, match=sentence):
        lossprune.prune(perceptron().double(), **{**settings, **changed})


def test_complex_weights_are_refused():
    model = nn.Linear(5, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="real weights, but 'weight' is complex"):
        lossprune.prune(model, "MP", sparsity=0.5, data=[(drawn(5), None)], compensate=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0}, {"iterations": True}, {"finish": -1}, {"examples": 0},
        {"dampings": ()}, {"dampings": (0.0, 1.0)}, {"dampings": "abc"}, {"parameters": "biases"},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        lossprune.Compensation(**wrong)


def test_contradicting_derivatives_are_refused():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return Wrong.apply(self.fc(x))

    # Its backward derivatives alone do: they are what a gradient is made of.
    model, inputs = Network().double(), drawn(5)
    settings = {
        "sparsity": 0.5, "data": [(inputs, model(inputs).argmax(1))], "progress": False, "seed": 0,
        "compensate": lossprune.Compensation(100, dampings=(1.0, 10.0, 1000.0)),
    }  # fmt: skip
    result = lossprune.prune(model, "random", **settings)
    plain = nn.Sequential()
    plain.fc = model.fc
    expected = lossprune.prune(plain, "random", **settings)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(result.weights[name], weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", ["cross_entropy", "token_cross_entropy", "mse", "bce_with_logits"])
def test_products_with_the_hessian_in_the_outputs(loss):
    torch.manual_seed(0)
    outputs, vectors = drawn(4, 3), drawn(4, 3)
    if "entropy" in loss and "bce" not in loss:
        classes = {"cross_entropy": (4, (EXAMPLES, 3)), "token_cross_entropy": (3, (EXAMPLES, 4))}
        most, shape = classes[loss]
        targets = torch.randint(most, shape)
        targets[0, 0] = -100
    else:
        targets = torch.rand(EXAMPLES, 4, 3).double()
    loss = LOSSES[loss]
    for n in range(EXAMPLES):
        h = hessian(lambda z, n=n: loss.value(z[None], targets[n : n + 1]).sum())(outputs[n])
        expected = (h.reshape(12, 12) @ vectors[n].flatten()).view(4, 3)
        found = loss.hessian_product(outputs[n : n + 1], targets[n : n + 1], vectors[n : n + 1])
        torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)
        general = FullLoss.hessian_product(
            loss, outputs[n : n + 1], targets[n : n + 1], vectors[n : n + 1]
        )
        torch.testing.assert_close(general[0], expected, rtol=1e-10, atol=1e-12)
