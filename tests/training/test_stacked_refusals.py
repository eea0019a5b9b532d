"""What cannot be trained in a stack, or is not worth it, is told in one sentence."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lossprune.training import NotStackableError, StackedTraining, worthwhile
from tests.training.stacks import convolutions, optimizers_of, perceptron, seeded


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(1)
        return self.linear(rows) if self.linear(rows).sum() > 0 else self.linear(2 * rows)


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *layers)


def hooked() -> nn.Module:
    network = flat()
    network[1].register_forward_hook(lambda *_: None)
    return network


def frozen() -> nn.Module:
    network = flat()
    network[1].bias.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("networks", "reason"),
    [
        ([], "there is no network to stack"),
        ([nn.Flatten()], "the networks have no parameters"),
        ([flat(), nn.Sequential(nn.Flatten(), nn.Linear(64, 11))], "network 1 is built otherwise"),
        ([flat(), flat(nn.ReLU())], "network 1 is built otherwise than network 0"),
        ([flat(nn.Dropout(0.1))], "2 is dropout, whose draws would differ in a stack"),
        ([flat().half()], "1.weight is torch.float16, not torch.float32 or float64"),
        ([hooked()], "network 0 has hooks on 1, which a stack would not run"),
        ([frozen()], "network 0 has parameters that are not trained"),
        ([LooksAtValues(), LooksAtValues()], "torch.func.vmap cannot batch LooksAtValues: "),
        ([nn.Sequential(nn.Flatten(), nn.Linear(63, 10))], "cannot batch Sequential: "),
    ],
)
def test_what_cannot_be_stacked_says_why(digits, networks, reason):
    with pytest.raises(NotStackableError, match=reason):
        StackedTraining(networks, [None] * len(networks), [digits] * len(networks))


def test_a_network_given_twice_wrong_masks_and_data_are_refused(digits):
    network = flat()
    with pytest.raises(NotStackableError, match="a network is given twice"):
        StackedTraining([network] * 2, [None] * 2, [digits] * 2)
    mask = {"1.wight": torch.ones(10, 64, dtype=torch.bool)}
    with pytest.raises(NotStackableError, match=r"network 1: the mask does not fit .*'1.wight'"):
        StackedTraining([network, flat()], [None, mask], [digits] * 2)
    fewer = replace(digits, train=digits.train.take(torch.arange(1000)))
    with pytest.raises(NotStackableError, match=r"data set 1 has .*1000, .* data set 0"):
        StackedTraining([network, flat()], [None] * 2, [digits, fewer])
    with pytest.raises(ValueError, match="as many, got 1, 2 and 1"):
        StackedTraining([network], [None] * 2, [digits])


def test_other_optimizers_counts_and_sizes_are_refused(digits):
    networks = [flat(), flat()]
    training = StackedTraining(networks, [None] * 2, [digits] * 2)
    optimizers = optimizers_of(networks)
    generators = [seeded(0), seeded(1)]
    with pytest.raises(ValueError, match="optimizers must be one for each of the 2"):
        training.train_epoch(optimizers[:1], generators=generators)
    with pytest.raises(ValueError, match=r"batch_size must be .*, got 0"):
        training.train_epoch(optimizers, generators=generators, batch_size=0)
    with pytest.raises(ValueError, match="which must be train, valid or test, got 'tset'"):
        training.evaluate("tset")
    optimizers[1].param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"the same momentum, got \[0.5, 0.9\]"):
        training.train_epoch(optimizers, generators=generators)
    nesterov = torch.optim.SGD(networks[0].parameters(), lr=0.1, momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="optimizer must be SGD without nesterov"):
        training.train_epoch([nesterov, optimizers[1]], generators=generators)


def test_on_the_cpu_stacks_are_worthwhile_for_perceptrons(digits):
    assert worthwhile(perceptron(1), digits)
    assert not worthwhile(convolutions(1), digits)
