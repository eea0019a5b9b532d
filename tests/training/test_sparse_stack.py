"""A pruned perceptron trains in a sparse stack as it does in the dense loop, but for rounding.

Where there is no GPU the CUDA kernels themselves run on the CPU, thread by thread, in the emulation
of ``tests/kernels/cuda_on_cpu.h``; where there is one they run there as well.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lossprune.data import Dataset, Split, load
from lossprune.pruning import Mask
from lossprune.training import (
    DivergedError,
    NotSparseError,
    NotStackableError,
    SparseStack,
    choose_stack,
    choose_training,
    evaluate,
    make_optimizer,
    train_epoch,
)
from lossprune.training.perceptron.stack import SparseGpuTraining

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
machines = pytest.mark.parametrize("where", ["emulated", pytest.param("cuda", marks=needs_gpu)])

# Absolute, of weights and momenta below 2 and losses below 3, in float32: sums in another order and
# a tanh whose relative error is 4e-7, after a dozen steps.
CLOSE = 3e-6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Few examples, for the emulation is slow, and no whole number of batches."""
    all_digits = load("digits", seed=1111)
    few = {
        name: Split(split.images[:count], split.labels[:count])
        for (name, split), count in zip(all_digits.splits.items(), (230, 70, 150), strict=True)
    }
    return replace(all_digits, **few)


@pytest.fixture(scope="module")
def colours(digits) -> Dataset:
    """Three channels, each with a mean and a standard deviation of its own."""
    splits = {
        name: Split(torch.cat([split.images // part for part in (1, 2, 3)], 1), split.labels)
        for name, split in digits.splits.items()
    }
    return replace(digits, **splits, mean=(0.3, 0.15, 0.1), std=(0.37, 0.2, 0.12))


def perceptron(
    seed: int, activation: type[nn.Module] = nn.Tanh, inputs: int = 64, bias: bool = True
) -> nn.Module:
    """Three layers, with more hidden units than warps, and not a multiple of them."""
    layers = [
        nn.Linear(inputs, 37, bias=bias), activation(), nn.Linear(37, 19), activation(),
        nn.Linear(19, 10),
    ]  # fmt: skip
    return drawn(nn.Sequential(nn.Flatten(), *layers), seed)


def drawn(network: nn.Module, seed: int) -> nn.Module:
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return network


def random_mask(network: nn.Module, seed: int, density: float = 0.15) -> dict[str, Tensor]:
    """Some units lose all that leads to them, or from them: there are idle weights and biases."""
    generator = seeded(seed)
    mask = {
        name: torch.rand(it.shape, generator=generator) < density
        for name, it in network.named_parameters()
        if name.endswith("weight")
    }
    list(mask.values())[-1][:, :3] = False
    with torch.no_grad():
        for name, kept in mask.items():
            network.get_parameter(name).masked_fill_(~kept, 0)
    return mask


class Runs:
    """Networks that are trained twice: in a stack, and one after the other by the dense loop."""

    def __init__(self, build, dataset, count=2, lr=0.2, batch_size=100):
        self.dataset, self.batch_size = dataset, batch_size
        self.networks = [build(seed) for seed in range(count)]
        self.masks = [random_mask(it, 100 + seed) for seed, it in enumerate(self.networks)]
        self.rates = [lr / (1 + number) for number in range(count)]
        self.seeds = [7 + number // 2 for number in range(count)]
        self.twins = copy.deepcopy(self.networks)
        self.optimizers, self.others = self.make(self.networks), self.enforced()

    def make(self, networks):
        return [
            make_optimizer(network, lr=lr, l2=0.01)
            for network, lr in zip(networks, self.rates, strict=True)
        ]

    def enforced(self):
        """For the dense loop, which knows nothing of masks."""
        optimizers = self.make(self.twins)
        for twin, mask, optimizer in zip(self.twins, self.masks, optimizers, strict=True):
            Mask(mask).enforce(twin, optimizer)
        return optimizers

    def generators(self, epoch):
        return [seeded(seed * 100 + epoch) for seed in self.seeds]

    def stack(self, where, emulated_gpu, **changes):
        if where == "emulated":
            machine = replace(emulated_gpu, **changes)
            return SparseStack(
                self.networks, self.masks, [self.dataset] * len(self.networks), machine=machine
            )
        self.networks = [it.cuda() for it in self.networks]
        self.optimizers = self.make(self.networks)
        data = self.dataset.to("cuda")
        return SparseStack(self.networks, self.masks, [data] * len(self.networks))

    def train(self, stack, epoch):
        return stack.train_epoch(
            self.optimizers, batch_size=self.batch_size, generators=self.generators(epoch)
        )

    def train_densely(self, epoch, members=None):
        generators = self.generators(epoch)
        return [
            train_epoch(
                self.twins[it],
                self.dataset,
                self.others[it],
                batch_size=self.batch_size,
                generator=generators[it],
            )
            for it in members or range(len(self.twins))
        ]

    def compare(self):
        """Of each network and its twin: weights, zeros, and the momentum of kept weights."""
        for network, twin, optimizer, other, mask in zip(
            self.networks, self.twins, self.optimizers, self.others, self.masks, strict=True
        ):
            for name, parameter in network.named_parameters():
                kept = mask.get(name, torch.ones_like(parameter, dtype=torch.bool).cpu())
                reference = twin.get_parameter(name)
                assert not parameter.detach().cpu()[~kept].any()
                near(parameter.detach(), reference.detach())
                momentum = optimizer.state[parameter]["momentum_buffer"]
                expected = other.state[reference]["momentum_buffer"] * kept
                near(momentum, expected)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=CLOSE)


def thin(seed: int) -> nn.Module:
    return drawn(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed)


CASES = {
    "tanh": (perceptron, 100),
    "relu, no bias": (lambda seed: perceptron(seed, nn.ReLU, bias=False), 100),
    "no activation": (lambda seed: perceptron(seed, nn.Identity), 33),
    "one layer": (thin, 33),
    "batches of several panels": (perceptron, 140),
    "a batch of all": (perceptron, 1000),
}


def activations(build):
    """nn.Identity stands for no module at all."""

    def made(seed):
        network = build(seed)
        return nn.Sequential(*(it for it in network if not isinstance(it, nn.Identity)))

    return made


@machines
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_the_dense_loop_does(digits, case, where, emulated_gpu):
    build, batch_size = CASES[case]
    runs = Runs(activations(build), digits, batch_size=batch_size)
    stack = runs.stack(where, emulated_gpu)
    for epoch in range(2):
        assert runs.train(stack, epoch) == pytest.approx(runs.train_densely(epoch), abs=CLOSE)
    for which in ("train", "valid", "test"):
        for found, twin in zip(stack.evaluate(which), runs.twins, strict=True):
            expected = evaluate(twin, digits, digits.splits[which])
            assert found.loss == pytest.approx(expected.loss, abs=CLOSE)
            assert found.error == expected.error
    stack.store(range(2))
    runs.compare()


@machines
def test_colours_have_factors_of_their_own(colours, where, emulated_gpu):
    runs = Runs(lambda seed: perceptron(seed, inputs=192), colours)
    stack = runs.stack(where, emulated_gpu)
    assert runs.train(stack, 0) == pytest.approx(runs.train_densely(0), abs=CLOSE)
    stack.store(range(2))
    runs.compare()


def test_activations_without_room_in_shared_memory_give_the_same_bits(digits, emulated_gpu):
    states = []
    for shared in (227 * 1024, 12 * 1024):
        runs = Runs(perceptron, digits)
        stack = runs.stack("emulated", emulated_gpu, shared_bytes=shared)
        outcome = runs.train(stack, 0), stack.evaluate("valid")
        stack.store(range(2))
        states.append((outcome[0], [it.state_dict() for it in runs.networks]))
    assert states[0][0] == states[1][0]
    for one, other in zip(states[0][1], states[1][1], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@machines
def test_whoever_trains_beside_it_and_wherever_it_stops_the_bits_are_the_same(
    digits, where, emulated_gpu
):
    """Three at once; one alone, stored and read again after an epoch."""
    together = Runs(perceptron, digits, count=3)
    stack = together.stack(where, emulated_gpu)
    scores = []
    for epoch in range(2):
        together.train(stack, epoch)
        scores.append(stack.evaluate("test")[1])
    stack.store([1])
    alone = Runs(perceptron, digits, count=3)
    alone.stack(where, emulated_gpu)  # which moves the networks to where it runs
    for held in ("networks", "masks", "optimizers", "seeds"):
        setattr(alone, held, getattr(alone, held)[1:2])
    for epoch in range(2):
        one = SparseStack(
            alone.networks,
            alone.masks,
            [stack.datasets[0]],
            machine=emulated_gpu if where == "emulated" else None,
        )
        alone.train(one, epoch)
        assert one.evaluate("test") == [scores[epoch]]
        one.store([0])
    for name, parameter in together.networks[1].named_parameters():
        other = alone.networks[0].get_parameter(name)
        assert torch.equal(parameter, other)
        momenta = (
            optimizer.state[it]["momentum_buffer"]
            for optimizer, it in (
                (together.optimizers[1], parameter), (alone.optimizers[0], other),
            )
        )  # fmt: skip
        assert torch.equal(*momenta)


@machines
def test_a_network_that_diverges_harms_no_other_and_one_that_rests_stays(
    digits, where, emulated_gpu
):
    runs = Runs(perceptron, digits, count=3, batch_size=10)
    runs.rates = [0.1, 1e30, 0.1]
    runs.optimizers = runs.make(runs.networks)
    stack = runs.stack(where, emulated_gpu)
    found = stack.train_epoch(
        runs.optimizers, batch_size=10, generators=runs.generators(0), active=[True, True, False]
    )
    runs.others = runs.enforced()
    with pytest.raises(DivergedError) as told:
        runs.train_densely(0, [1])
    assert str(found[1]) == str(told.value)
    assert found[0] == pytest.approx(runs.train_densely(0, [0])[0], abs=CLOSE)
    assert found[2] != found[2]
    before = runs.twins[2].state_dict()
    stack.store([2])
    assert all(torch.equal(it.cpu(), before[n]) for n, it in runs.networks[2].state_dict().items())


@machines
def test_alone_it_is_a_stack_of_one(digits, where, emulated_gpu):
    together = Runs(perceptron, digits, count=2)
    stack = together.stack(where, emulated_gpu)
    outcome, scores = together.train(stack, 0)[0], stack.evaluate("valid")[0]
    stack.store([0])
    one = Runs(perceptron, digits, count=1)
    data = one.stack(where, emulated_gpu).datasets[0]
    machine = emulated_gpu if where == "emulated" else None
    training = SparseGpuTraining(one.networks[0], one.masks[0], data, machine=machine)
    assert training.mode == "sparse"
    assert training.reason.startswith("on the GPU, ")
    found = training.train_epoch(one.optimizers[0], generator=one.generators(0)[0])
    assert found == outcome
    assert training.evaluate(data.valid) == scores
    for name, parameter in together.networks[0].named_parameters():
        assert torch.equal(parameter, one.networks[0].get_parameter(name))
    with pytest.raises(ValueError, match="split must be one of the data set's own"):
        training.evaluate(data.valid.take(torch.arange(9)))
    one.optimizers[0].param_groups[0]["lr"] = 1e30
    with pytest.raises(DivergedError, match="not finite within"):
        training.train_epoch(one.optimizers[0], batch_size=10, generator=seeded(1))


@needs_gpu
def test_on_a_gpu_it_is_chosen_where_it_can_be_done(digits):
    data, network = digits.to("cuda"), perceptron(1)
    mask = random_mask(network, 2)
    network = network.cuda()
    assert choose_training(network, mask, data).mode == "sparse"
    assert choose_stack([network], [mask], [data]).mode == "sparse stack"
    assert choose_training(network, mask, data, "dense").mode == "dense"
    assert choose_stack([network], [mask], [data], "dense").mode == "stacked"
    assert choose_stack([network], [None], [data]).mode == "stacked"
    full = {name: torch.ones_like(kept) for name, kept in mask.items()}
    assert choose_training(network, full, data).mode == "dense"


def test_what_it_cannot_train_is_refused(digits, emulated_gpu):
    network = perceptron(1)
    mask = random_mask(network, 2)

    def stack(network=network, mask=mask, dataset=digits, machine=emulated_gpu):
        return SparseStack([network], [mask], [dataset], machine=machine)

    with pytest.raises(NotSparseError, match="not on a GPU"):
        stack(machine=None)
    with pytest.raises(NotSparseError, match="5, the last layer, has an activation"):
        stack(nn.Sequential(*perceptron(1), nn.Tanh()))
    with pytest.raises(NotSparseError, match="bytes of shared memory, which has 4,096"):
        stack(machine=replace(emulated_gpu, shared_bytes=4096))
    with pytest.raises(NotSparseError, match="augmented"):
        stack(dataset=replace(digits, augmented=True))
    with pytest.raises(NotSparseError, match=r"not torch\.float32"):
        stack(perceptron(1).double())
    empty = {**mask, "1.weight": torch.zeros_like(mask["1.weight"])}
    with pytest.raises(NotSparseError, match="1 has no weight with a path to an output"):
        stack(mask=empty)
    with pytest.raises(NotStackableError, match="network 0: "):
        stack(mask={"7.weight": mask["1.weight"]})
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        stack().train_epoch(
            [make_optimizer(network, lr=0.1, l2=0)], batch_size=0, generators=[seeded(1)]
        )
    with pytest.raises(ValueError, match="which must be train, valid or test, got 'all'"):
        stack().evaluate("all")
