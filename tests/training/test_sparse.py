"""Training over the surviving weights alone is dense masked training, but for rounding."""

import copy
import math
import platform
import shutil
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lossprune.data import Dataset, Split
from lossprune.kernels.compiler import compiler_available
from lossprune.networks import NETWORKS
from lossprune.pruning import Mask
from lossprune.training import (
    DenseTraining,
    DivergedError,
    NotSparseError,
    SparseTraining,
    choose_training,
    evaluate,
    make_optimizer,
    train_epoch,
)
from tests.compilers import hide_compilers
from tests.training.stacks import random_mask, seeded

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

GRADIENT = 1e-5  # relative to the largest: a saturated tanh has few digits of its own
CURVE = 2e-4  # absolute, of a weight after three epochs in float32


def random_data(shape: tuple[int, int, int], examples: int, classes: int, seed: int) -> Dataset:
    generator = seeded(seed)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, classes, (count,), generator=generator)
        labels[:classes] = torch.arange(classes)[:count]
        return Split(images, labels)

    means = tuple(0.1 * (channel + 1) for channel in range(shape[0]))
    stds = tuple(0.2 + 0.05 * channel for channel in range(shape[0]))
    names = tuple(map(str, range(classes)))
    return Dataset("random", split(examples), split(50), split(50), names, means, stds)


TANH = nn.Tanh()


def the_same_tanh() -> nn.Module:
    """One module after every layer: in a network of several layers it has several names."""
    return TANH


def perceptron(sizes: list[int], activation: Callable[[], nn.Module], bias: bool, seed: int):
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        if number:
            layers.append(activation())
        layers.append(nn.Linear(inputs, outputs, bias=bias))
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) * 0.5)
            seed += 1
    return network


def oracle(network: nn.Module, mask: Mask, dataset: Dataset) -> dict[str, Tensor]:
    """Gradients of the mean loss over all training examples, dense and masked, in float64."""
    double = copy.deepcopy(network).double()
    inputs = dataset.inputs(dataset.train.images).double()
    F.cross_entropy(double(inputs), dataset.train.labels).backward()
    gradients = {}
    for name, parameter in double.named_parameters():
        assert parameter.grad is not None
        kept = mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
        gradients[name] = parameter.grad * kept
    return gradients


def largest_term(network: nn.Module, mask: Mask, dataset: Dataset) -> float:
    """The largest of the mean |gradient of one example|, what is added up in the gradients.

    Examples of different labels may cancel each other to a hundredth of that.
    """
    double = copy.deepcopy(network).double()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(double, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    parameters = {name: parameter.detach() for name, parameter in double.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, dataset.inputs(dataset.train.images).double(), dataset.train.labels
    )
    kept = {name: mask.get(name, 1) for name in each}
    return max(float((one.abs().mean(0) * kept[name]).max()) for name, one in each.items())


def sparse_gradients(
    network: nn.Module, mask: Mask, dataset: Dataset, batch: int
) -> dict[str, Tensor]:
    """After one step from rest, without decay, SGD's momentum is the gradient."""
    optimizer = make_optimizer(network, lr=0.0, l2=0.0)
    training = SparseTraining(network, mask, dataset)
    training.train_epoch(optimizer, batch_size=batch, generator=seeded(0))
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in network.named_parameters()
    }


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 3, 5), (1, 4, 4), (1, 5, 7), (3, 4, 7), (2, 1, 17)]),
    hidden=st.lists(st.integers(1, 40), max_size=3),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, the_same_tanh]),
    bias=st.booleans(),
    examples=st.integers(3, 300),
    left=st.sampled_from([0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@example(
    shape=(1, 4, 4),
    hidden=[24, 24, 18],
    activation=nn.Tanh,
    bias=False,
    examples=3,
    left=0.05,
    seed=1,
)  # fmt: skip
def test_gradients_are_the_dense_masked_ones(shape, hidden, activation, bias, examples, left, seed):
    """Whole panels and parts of them, dead units, empty layers, images of any size."""
    dataset = random_data(shape, examples, 3, seed)
    network = perceptron([math.prod(shape), *hidden, 3], activation, bias, seed)
    mask = random_mask(network, left, seed)
    mask.apply_(network)
    expected = oracle(network, mask, dataset)
    largest = largest_term(network, mask, dataset)
    for name, gradient in sparse_gradients(network, mask, dataset, examples).items():
        error = (gradient.double() - expected[name]).abs().max()
        assert float(error) <= GRADIENT * largest, name


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("bias", [True, False])
def test_epochs_are_those_of_the_dense_loop(digits, activation, bias):
    """Momentum, decay, order, last batch; the weights that lead nowhere decay as well."""
    dense = perceptron([64, 50, 20, 10], activation, bias, seed=3)
    mask = random_mask(dense, 0.05, seed=5)
    mask.apply_(dense)
    sparse = copy.deepcopy(dense)
    by_dense = make_optimizer(dense, lr=0.02, l2=0.01)
    by_sparse = make_optimizer(sparse, lr=0.02, l2=0.01)
    training = SparseTraining(sparse, mask, digits)
    assert sum(len(layer.idle_weights) for layer in training.layers) > 0
    with mask.enforce(dense, by_dense):
        for epoch in range(3):
            one = train_epoch(dense, digits, by_dense, generator=seeded(epoch))
            other = training.train_epoch(by_sparse, generator=seeded(epoch))
            assert other == pytest.approx(one, rel=1e-5)
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], weight, atol=CURVE, rtol=0)
        assert torch.equal(sparse.state_dict()[name] == 0, weight == 0)
    for split in (digits.train, digits.valid, digits.test):
        one, other = evaluate(sparse, digits, split), training.evaluate(split)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.error == pytest.approx(one.error, abs=1.5 / len(split))


def test_the_optimizer_goes_on_in_the_other_way(digits):
    """Momentum is kept in torch's own format, so an epoch of one may follow one of the other."""
    mixed = perceptron([64, 50, 10], nn.Tanh, bias=True, seed=3)
    mask = random_mask(mixed, 0.1, seed=5)
    mask.apply_(mixed)
    plain = copy.deepcopy(mixed)
    by_mixed = make_optimizer(mixed, lr=0.02, l2=0.01)
    by_plain = make_optimizer(plain, lr=0.02, l2=0.01)
    mask.enforce(mixed, by_mixed)
    mask.enforce(plain, by_plain)
    training = SparseTraining(mixed, mask, digits)
    for epoch in range(4):
        train_epoch(plain, digits, by_plain, generator=seeded(epoch))
        if epoch % 2:
            train_epoch(mixed, digits, by_mixed, generator=seeded(epoch))
        else:
            training.train_epoch(by_mixed, generator=seeded(epoch))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(mixed.state_dict()[name], weight, atol=CURVE, rtol=0)


def test_it_is_the_same_to_the_bit_with_any_number_of_threads(digits):
    threads = torch.get_num_threads()

    def outcome(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        network = perceptron([64, 30, 10], nn.Tanh, bias=True, seed=3)
        mask = random_mask(network, 0.1, seed=5)
        mask.apply_(network)
        optimizer = make_optimizer(network, lr=0.05, l2=0.01)
        training = SparseTraining(network, mask, data)
        training.train_epoch(optimizer, generator=seeded(1))
        scores = training.evaluate(data.train)
        return [*network.state_dict().values(), torch.tensor([scores.loss, scores.error])]

    data = random_data((1, 8, 8), 11_000, 10, seed=1)
    try:
        for one, other in zip(outcome(1), outcome(3), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_tanh_and_its_loss_hold_far_out():
    """Large inputs saturate, infinite ones as well; the loss is that of float64."""
    dataset = random_data((1, 4, 4), 200, 4, seed=9)
    network = perceptron([16, 20, 4], nn.Tanh, bias=True, seed=1)
    for scale in (1e-4, 1.0, 30.0):
        wide = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in wide.parameters():
                parameter.mul_(scale)
        mask = Mask.dense(wide)
        inputs = dataset.inputs(dataset.train.images).double()
        expected = F.cross_entropy(copy.deepcopy(wide).double()(inputs), dataset.train.labels)
        found = SparseTraining(wide, mask, dataset).evaluate(dataset.train)
        assert found.loss == pytest.approx(expected.item(), rel=2e-6)


def test_a_loss_that_is_not_a_number_stops_training_as_it_does_densely(digits):
    told = []
    for sparse in (False, True):
        network = NETWORKS["MLP"](shape=(1, 8, 8), generator=seeded(1111))
        mask = random_mask(network, 0.1, seed=5)
        mask.apply_(network)
        optimizer = make_optimizer(network, lr=1e38, l2=0.0)
        training = (
            SparseTraining(network, mask, digits)
            if sparse
            else DenseTraining(network, digits, "for comparison")
        )
        with pytest.raises(DivergedError) as error:
            training.train_epoch(optimizer, generator=seeded(1))
        told.append(str(error.value))
    assert told == ["the training loss is not finite within 13 steps"] * 2


def test_training_leaves_the_global_random_state_and_the_hooks_alone(digits):
    network = perceptron([64, 20, 10], nn.Tanh, bias=True, seed=1)
    mask = random_mask(network, 0.1, seed=2)
    optimizer = make_optimizer(network, lr=0.1, l2=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before, steps = torch.get_rng_state(), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    SparseTraining(network, mask, digits).train_epoch(optimizer, generator=seeded(1))
    schedule.step()  # warns, and so fails, where no step has been taken
    assert steps == [1]
    assert torch.equal(torch.get_rng_state(), before)


def hooked() -> nn.Module:
    network = perceptron([64, 10], nn.Tanh, bias=True, seed=1)
    network[1].register_forward_hook(lambda *_: None)
    return network


def frozen() -> nn.Module:
    network = perceptron([64, 10], nn.Tanh, bias=True, seed=1)
    network[1].bias.requires_grad_(False)
    return network


def cell_twice() -> nn.Module:
    cell = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), cell, nn.Tanh(), cell, nn.Tanh(), nn.Linear(64, 10))


def tied() -> nn.Module:
    network = perceptron([64, 64, 64, 10], nn.Tanh, bias=True, seed=1)
    network[3].weight = network[1].weight
    return network


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Linear(64, 10), "Linear is not a Sequential"),
        (nn.Sequential(nn.Linear(64, 10)), "does not begin with Flatten"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Sigmoid()), "2 is Sigmoid"),
        (nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), "1 takes 63 inputs, an image has 64"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), "1 has fewer outputs than the data"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double()), "1.weight is torch.float64"),
        (hooked(), "it has hooks"),
        (frozen(), "1.bias is not trained"),
        (cell_twice(), "a parameter that is used twice"),
        (tied(), "a parameter that is used twice"),
    ],
)
def test_what_cannot_be_trained_sparsely_says_why_and_is_trained_densely(digits, network, reason):
    with pytest.raises(NotSparseError, match=reason):
        SparseTraining(network, {}, digits)
    with pytest.raises(ValueError, match=f"train sparse cannot be done: .*{reason}"):
        choose_training(network, {}, digits, "sparse")


@pytest.mark.parametrize(
    ("train", "left", "mode", "reason"),
    [
        ("auto", 0.05, "sparse", "hidden units"),
        ("auto", 0.6, "dense", "of the weights are left, more than"),
        ("sparse", 0.6, "sparse", "hidden units"),
        ("dense", 0.05, "dense", "asked for"),
    ],
)
def test_the_way_of_training_is_chosen_by_what_is_left(digits, train, left, mode, reason):
    network = perceptron([64, 40, 10], nn.Tanh, bias=True, seed=1)
    training = choose_training(network, random_mask(network, left, seed=4), digits, train)
    assert training.mode == mode
    assert reason in training.reason


def test_without_a_compiler_training_is_dense_and_says_so(digits, monkeypatch):
    hide_compilers(monkeypatch)
    network = perceptron([64, 40, 10], nn.Tanh, bias=True, seed=1)
    mask = random_mask(network, 0.05, seed=4)
    training = choose_training(network, mask, digits)
    assert training.mode == "dense"
    assert training.reason.startswith("no C compiler")


@pytest.mark.parametrize("options", [{"nesterov": True}, {"momentum": 0.9, "dampening": 0.1}])
def test_another_optimizer_is_refused(digits, options):
    network = perceptron([64, 10], nn.Tanh, bias=True, seed=1)
    training = SparseTraining(network, {}, digits)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, **{"momentum": 0.9, **options})
    with pytest.raises(ValueError, match="optimizer must be SGD without nesterov"):
        training.train_epoch(optimizer, generator=seeded(1))


def test_without_momentum_it_is_the_dense_loop_too(digits):
    dense = perceptron([64, 30, 10], nn.Tanh, bias=True, seed=1)
    mask = random_mask(dense, 0.1, seed=4)
    mask.apply_(dense)
    sparse = copy.deepcopy(dense)
    by_dense = make_optimizer(dense, lr=0.1, l2=0.01, momentum=0.0)
    by_sparse = make_optimizer(sparse, lr=0.1, l2=0.01, momentum=0.0)
    with mask.enforce(dense, by_dense):
        train_epoch(dense, digits, by_dense, generator=seeded(1))
    SparseTraining(sparse, mask, digits).train_epoch(by_sparse, generator=seeded(1))
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], weight, atol=CURVE, rtol=0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64 compilers")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_give_the_same_gradients(tmp_path, monkeypatch, flag):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler of that name")
    monkeypatch.setenv("CC", f"{compiler} {flag}")
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path))
    dataset = random_data((3, 4, 7), 150, 3, seed=1)
    network = perceptron([84, 30, 20, 3], nn.Tanh, bias=True, seed=2)
    mask = random_mask(network, 0.3, seed=3)
    mask.apply_(network)
    expected = oracle(network, mask, dataset)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in sparse_gradients(network, mask, dataset, 150).items():
        error = (gradient.double() - expected[name]).abs().max()
        assert float(error) <= GRADIENT * largest, name
    assert list(tmp_path.glob("sparse_training-*.so"))
