"""A network trains in a stack as it does alone, but for rounding."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossprune.data import Dataset, load
from lossprune.pruning import Mask
from lossprune.training import (
    DivergedError,
    StackedTraining,
    bytes_per_member,
    evaluate,
    make_optimizer,
    train_epoch,
)
from tests.training.stacks import (
    Runs,
    assert_equal_states,
    convolutions,
    drawn,
    make_runs,
    normalised,
    optimizers_of,
    perceptron,
    rectifiers,
    seeded,
)

# Absolute, of weights below 1 after three epochs. Sums in another order round by 1e-7 (float32) and
# 2e-16 (float64) of themselves; 39 steps of SGD let that grow.
FLOAT32 = 2e-6
FLOAT64 = 1e-12
LOSS32 = 1e-6  # of mean losses and scores, likewise


class Double(nn.Module):
    """A float64 network for the dense loop, whose inputs are float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs.double())


class Any(nn.Module):
    """A network that is no perceptron of the written-out kind: it goes through vmap."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def alone(runs: Runs, *, double: bool = False) -> Runs:
    """The same runs for the dense loop, with the masks enforced on the optimizers."""
    networks = [copy.deepcopy(network) for network in runs.networks]
    if double:
        networks = [Double(network) for network in networks]
    momentum = runs.optimizers[0].param_groups[0]["momentum"]
    optimizers = optimizers_of(networks, momentum)
    prefix = "network." if double else ""
    for network, mask, optimizer in zip(networks, runs.masks, optimizers, strict=True):
        if mask is not None:
            named = Mask({prefix + name: kept for name, kept in mask.items()})
            named.enforce(network, optimizer)
    return Runs(networks, runs.masks, optimizers, runs.order_of)


def train_alone(runs: Runs, datasets: Sequence[Dataset], epoch: int) -> list[float]:
    each = zip(runs.networks, datasets, runs.optimizers, runs.generators(epoch), strict=True)
    return [
        train_epoch(network, dataset, optimizer, generator=generator)
        for network, dataset, optimizer, generator in each
    ]


KINDS = {
    "perceptrons in turn": (perceptron, False),
    "perceptrons at once": (perceptron, True),
    "rectifiers in turn": (rectifiers, False),
    "rectifiers at once": (rectifiers, True),
    "perceptrons by vmap": (lambda seed: Any(perceptron(seed)), None),
    "convolutions": (convolutions, None),
    "convolutions in turn": (convolutions, False),
    "batch norm": (normalised, None),
}
kinds = pytest.mark.parametrize(("build", "together"), KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("augmented", [False, True])
def test_three_epochs_in_float64_are_those_of_the_dense_loop(digits, build, together, augmented):
    """Own masks, rates, decays and orders; momentum, the last part of a batch; running statistics.

    1,297 examples in batches of 100 leave a last one of 97.
    """
    datasets = [replace(digits, augmented=augmented)] * 4
    stacked = make_runs(lambda seed: build(seed).double())
    plain = alone(stacked, double=True)
    training = StackedTraining(stacked.networks, stacked.masks, datasets, together=together)
    for epoch in range(3):
        generators = stacked.generators(epoch)
        found = training.train_epoch(stacked.optimizers, generators=generators)
        # The dense loop sums the losses in float32.
        assert found == pytest.approx(train_alone(plain, datasets, epoch), rel=LOSS32)
        # Later draws go on as they would alone.
        for generator, other in zip(generators, stacked.generators(epoch), strict=True):
            torch.randperm(1297, generator=other)
            if augmented:
                torch.randint(9, (2, 1297), generator=other)
                torch.randint(2, (1297,), generator=other)
            assert torch.equal(generator.get_state(), other.get_state())
    training.store(range(4))
    for network, other in zip(stacked.networks, plain.networks, strict=True):
        assert_equal_states(network, other.network, FLOAT64)


@kinds
def test_epochs_and_scores_in_float32_are_those_of_the_dense_loop(digits, build, together):
    digits = replace(digits, score_every=3)
    other = replace(load("digits", seed=1), score_every=3)  # other examples in training
    datasets = [digits, digits, digits, other]
    stacked = make_runs(build)
    plain = alone(stacked)
    training = StackedTraining(stacked.networks, stacked.masks, datasets, together=together)
    found = training.train_epoch(stacked.optimizers, generators=stacked.generators(0))
    assert found == pytest.approx(train_alone(plain, datasets, 0), rel=1e-5)
    training.store(range(4))
    for network, mask, expected in zip(
        stacked.networks, stacked.masks, plain.networks, strict=True
    ):
        if build is not normalised:  # whose directions without a gradient are rounding alone
            assert_equal_states(network, expected, FLOAT32)
        for name, kept in (mask or {}).items():
            weight = network.get_parameter(name)
            assert (weight[~kept].view(torch.int32) == 0).all()  # +0.0, to the bit
            assert weight[kept].count_nonzero() > 0.9 * kept.sum()
    modes = [module.training for network in stacked.networks for module in network.modules()]
    for which in ("train", "valid", "test"):
        scores = [
            evaluate(network, dataset, dataset.scored[which])
            for network, dataset in zip(stacked.networks, datasets, strict=True)
        ]
        for one, expected in zip(training.evaluate(which), scores, strict=True):
            assert one.loss == pytest.approx(expected.loss, rel=LOSS32)
            assert one.error == pytest.approx(expected.error, abs=1.5 / len(digits.valid))
    assert modes == [module.training for it in stacked.networks for module in it.modules()]


def oracle_step(network: nn.Module, dataset: Dataset, lr: float) -> dict[str, Tensor]:
    double = copy.deepcopy(network).double()
    inputs = dataset.inputs(dataset.train.images).double()
    F.cross_entropy(double(inputs), dataset.train.labels).backward()
    return {
        name: parameter.detach() - lr * parameter.grad
        for name, parameter in double.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@kinds
def test_a_step_on_all_examples_is_that_of_autograd(digits, build, together, momentum):
    """Without the dense loop: one batch of everything, in float64."""
    networks = [build(seed).double() for seed in (1, 2)]
    expected = [oracle_step(it, digits, lr=0.3) for it in networks]
    optimizers = [make_optimizer(it, lr=0.3, l2=0.0, momentum=momentum) for it in networks]
    training = StackedTraining(networks, [None] * 2, [digits] * 2, together=together)
    training.train_epoch(
        optimizers, batch_size=2000, generators=[seeded(seed) for seed in range(2)]
    )
    training.store(range(2))
    for network, optimizer, weights in zip(networks, optimizers, expected, strict=True):
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], atol=FLOAT64, rtol=0)
            has_momentum = optimizer.state[parameter].get("momentum_buffer") is not None
            assert has_momentum == (momentum > 0)


def test_a_layer_of_two_names_keeps_its_parameters(digits):
    """The first network is the one that vmap runs, and whose memory is counted."""

    def build(seed):
        cell = nn.Linear(64, 64)
        return drawn(nn.Sequential(nn.Flatten(), cell, nn.Tanh(), cell, nn.Linear(64, 10)), seed)

    networks = [build(seed).double() for seed in (1, 2)]
    before = [list(it.parameters()) for it in networks]
    expected = [oracle_step(it, digits, lr=0.3) for it in networks]
    assert bytes_per_member(networks[0], digits) > 0
    optimizers = [make_optimizer(it, lr=0.3, l2=0.0, momentum=0.0) for it in networks]
    training = StackedTraining(networks, [None] * 2, [digits] * 2)
    training.train_epoch(optimizers, batch_size=2000, generators=[seeded(0), seeded(0)])
    training.store(range(2))
    for network, parameters, weights in zip(networks, before, expected, strict=True):
        for (name, parameter), own in zip(network.named_parameters(), parameters, strict=True):
            assert parameter is own
            torch.testing.assert_close(parameter.detach(), weights[name], atol=FLOAT64, rtol=0)


@kinds
def test_a_member_that_diverges_says_where_and_disturbs_no_other(digits, build, together):
    stacked = make_runs(build)
    lively = copy.deepcopy(stacked.networks)
    stacked.optimizers[1].param_groups[0]["lr"] = 1e38
    training = StackedTraining(stacked.networks, stacked.masks, [digits] * 4, together=together)
    found = training.train_epoch(
        stacked.optimizers, batch_size=10, generators=stacked.generators(0)
    )
    assert isinstance(found[1], DivergedError)
    failing = copy.deepcopy(lively[1])
    optimizer = make_optimizer(failing, lr=1e38, l2=0.01)
    with pytest.raises(DivergedError) as error:
        train_epoch(failing, digits, optimizer, batch_size=10, generator=stacked.generators(0)[1])
    assert str(found[1]) == str(error.value) == "the training loss is not finite within 100 steps"
    others = [0, 2, 3]
    calm = [lively[it] for it in others]
    optimizers = [optimizers_of(lively)[it] for it in others]
    without = StackedTraining(
        calm, [stacked.masks[it] for it in others], [digits] * 3, together=together
    )
    expected = without.train_epoch(
        optimizers,
        batch_size=10,
        generators=[stacked.generators(0)[it] for it in others],
    )
    assert [found[it] for it in others] == pytest.approx(expected, rel=1e-4)
    training.store(range(4))
    without.store(range(3))
    for member, network in zip(others, calm, strict=True):
        for name, weight in stacked.networks[member].state_dict().items():
            assert weight.isfinite().all(), name
            if build is not normalised:
                torch.testing.assert_close(weight, network.state_dict()[name], atol=1e-4, rtol=0)


@kinds
def test_it_is_the_same_to_the_bit_when_repeated(digits, build, together):
    def outcome() -> list[Tensor]:
        runs = make_runs(build)
        training = StackedTraining(runs.networks, runs.masks, [digits] * 4, together=together)
        for epoch in range(2):
            training.train_epoch(runs.optimizers, generators=runs.generators(epoch))
        scores = [it.loss for it in training.evaluate("valid")]
        training.store(range(4))
        states = [it for network in runs.networks for it in network.state_dict().values()]
        return [*states, torch.tensor(scores)]

    assert all(torch.equal(one, other) for one, other in zip(outcome(), outcome(), strict=True))


@kinds
def test_networks_go_on_alone_and_come_back(digits, build, together):
    """Momentum is kept in torch's own format; who is not active is left as it is."""
    mixed = make_runs(lambda seed: build(seed).double())
    plain = alone(mixed, double=True)
    datasets = [digits] * 4
    training = StackedTraining(mixed.networks, mixed.masks, datasets, together=together)
    for epoch in range(4):
        expected = train_alone(plain, datasets, epoch)
        active = [True, epoch % 2 == 0, True, epoch > 2]
        found = training.train_epoch(
            mixed.optimizers, generators=mixed.generators(epoch), active=active
        )
        training.store(range(4))
        for member, trained in enumerate(active):
            if trained:
                assert found[member] == pytest.approx(expected[member], rel=LOSS32)
                continue
            assert math.isnan(found[member])
            network, mask = mixed.networks[member], mixed.masks[member]
            assert mask is not None
            wrapped = Double(network)
            optimizer = mixed.optimizers[member]
            with Mask({f"network.{name}": it for name, it in mask.items()}).enforce(
                wrapped, optimizer
            ):
                train_epoch(wrapped, digits, optimizer, generator=mixed.generators(epoch)[member])
    for network, other in zip(mixed.networks, plain.networks, strict=True):
        assert_equal_states(network, other.network, FLOAT64)


@kinds
def test_storing_is_the_same_to_the_bit_whenever_it_is_done(digits, build, together):
    """After each epoch, or of one member now and then, or only at the end."""

    def outcome(stored: Callable[[int], Sequence[int]]) -> list[Tensor]:
        runs = make_runs(build)
        training = StackedTraining(runs.networks, runs.masks, [digits] * 4, together=together)
        for epoch in range(3):
            training.train_epoch(runs.optimizers, generators=runs.generators(epoch))
            training.evaluate("valid")
            training.store(stored(epoch))
        training.store(range(4))
        return [it for network in runs.networks for it in network.state_dict().values()]

    always, sometimes, never = (
        outcome(lambda epoch: range(4)),
        outcome(lambda epoch: [epoch]),
        outcome(lambda epoch: []),
    )
    assert all(map(torch.equal, always, sometimes))
    assert all(map(torch.equal, always, never))


@kinds
def test_networks_changed_after_storing_are_read_anew(digits, build, together):
    """One goes back to where it began, with a new optimizer: its next epoch is its first again."""
    runs, fresh = make_runs(build), make_runs(build)
    training = StackedTraining(runs.networks, runs.masks, [digits] * 4, together=together)
    first = training.train_epoch(runs.optimizers, generators=runs.generators(0))
    training.store(range(4))
    runs.networks[2].load_state_dict(fresh.networks[2].state_dict())
    optimizers = [*runs.optimizers[:2], optimizers_of(runs.networks)[2], runs.optimizers[3]]
    again = training.train_epoch(optimizers, generators=runs.generators(0))
    assert [again[it] == first[it] for it in range(4)] == [False, False, True, False]


def test_scores_of_members_that_are_not_active_are_nan(digits):
    runs = make_runs(perceptron)
    training = StackedTraining(runs.networks, runs.masks, [digits] * 4)
    scores = training.evaluate("test", active=[False, True, False, False])
    assert [math.isnan(it.loss) and math.isnan(it.error) for it in scores] == [
        True,
        False,
        True,
        True,
    ]
    assert training.train_epoch(
        runs.optimizers, generators=runs.generators(0), active=[False] * 4
    ) == pytest.approx([math.nan] * 4, nan_ok=True)


def test_schedules_see_a_step_and_the_global_random_state_stays(digits):
    runs = make_runs(perceptron)
    schedules = [torch.optim.lr_scheduler.StepLR(it, 1, 0.5) for it in runs.optimizers]
    before = torch.get_rng_state()
    training = StackedTraining(runs.networks, runs.masks, [digits] * 4)
    training.train_epoch(runs.optimizers, generators=runs.generators(0))
    training.store(range(4))
    for schedule in schedules:
        schedule.step()  # warns, and so fails, where no step has been taken
    assert torch.equal(torch.get_rng_state(), before)
