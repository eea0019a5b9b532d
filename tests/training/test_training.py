import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossprune.data import Dataset, Split
from lossprune.networks import NETWORKS
from lossprune.pruning import Mask
from lossprune.training import DivergedError, evaluate, make_optimizer, train_epoch

ROUNDING = 1e-6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_network() -> nn.Module:
    return NETWORKS["MLP"](shape=(1, 8, 8), generator=seeded(1111))


def test_an_epoch_is_what_the_plain_loop_does(digits):
    ours, plain = new_network(), new_network()
    mean_loss = train_epoch(
        ours, digits, make_optimizer(ours, lr=0.1, l2=0.01), generator=seeded(7), batch_size=100
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    inputs, labels = digits.inputs(digits.train.images), digits.train.labels
    total = 0.0
    for chosen in torch.randperm(1297, generator=seeded(7)).split(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(inputs[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    assert mean_loss == pytest.approx(total / 1297, abs=ROUNDING)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, atol=ROUNDING, rtol=0)


def test_the_same_generator_gives_the_same_weights_to_the_bit(digits):
    def trained(seed: int) -> torch.Tensor:
        network = new_network()
        train_epoch(
            network, digits, make_optimizer(network, lr=0.1, l2=0.0), generator=seeded(seed)
        )
        return network.state_dict()["fc1.weight"]

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_training_leaves_the_global_random_state_alone(digits):
    network = new_network()
    before = torch.get_rng_state()
    train_epoch(network, digits, make_optimizer(network, lr=0.1, l2=0.0), generator=seeded(1))
    evaluate(network, digits, digits.valid)
    assert torch.equal(torch.get_rng_state(), before)


def test_removed_weights_stay_exactly_zero(digits):
    network = new_network()
    kept = torch.rand(300, 64, generator=seeded(3)) > 0.9
    optimizer = make_optimizer(network, lr=0.1, l2=0.01)
    Mask({"fc1.weight": kept}).enforce(network, optimizer)
    train_epoch(network, digits, optimizer, generator=seeded(1))
    weight = network.state_dict()["fc1.weight"]
    assert torch.count_nonzero(weight[~kept]) == 0
    assert torch.count_nonzero(weight[kept]) == kept.sum()


def test_evaluation_is_the_mean_over_all_examples(digits):
    network = new_network()
    with torch.no_grad():
        logits = network(digits.inputs(digits.test.images))
    loss = F.cross_entropy(logits, digits.test.labels).item()
    wrong = (logits.argmax(1) != digits.test.labels).sum().item()
    for batch_size in (1000, 64):
        result = evaluate(network, digits, digits.test, batch_size=batch_size)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.error == wrong / 250


def test_evaluation_neither_trains_nor_changes_modes(digits):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, digits, digits.valid)
    assert [module.training for module in network] == [True, False, True]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_restores_modes_after_an_error(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(63, 10))
    with pytest.raises(RuntimeError):
        evaluate(network, digits, digits.valid)
    assert network.training


def test_a_loss_that_is_not_a_number_stops_training(digits):
    network = new_network()
    optimizer = make_optimizer(network, lr=1e38, l2=0.0)
    with pytest.raises(DivergedError, match="not finite within"):
        train_epoch(network, digits, optimizer, generator=seeded(1))


def test_augmented_data_are_augmented_in_training_only():
    generator = seeded(5)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(40) % 2)
    seen: list[torch.Tensor] = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs.clone())
            return self.linear(inputs.flatten(1))

    network = Recording()
    for augmented in (False, True):
        data = Dataset("x", split, split, split, ("a", "b"), (0.5,), (0.25,), augmented=augmented)
        raw = {bytes(image.numpy().tobytes()) for image in data.inputs(images)}
        seen.clear()
        train_epoch(network, data, make_optimizer(network, lr=0.0, l2=0.0), generator=seeded(1))
        trained = {image.numpy().tobytes() for batch in seen for image in batch}
        assert (trained == raw) is not augmented
        seen.clear()
        evaluate(network, data, data.train)
        assert {image.numpy().tobytes() for batch in seen for image in batch} == raw


def test_the_last_batch_counts_by_its_examples():
    images = torch.zeros(3, 1, 1, 1, dtype=torch.uint8)
    images[1:] = 255
    split = Split(images, torch.tensor([0, 1, 1]))
    data = Dataset("x", split, split, split, ("a", "b"), (0.0,), (1.0,))
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.constant_(network[1].weight, 0.5)
    optimizer = make_optimizer(network, lr=1e-30, l2=0.0)
    mean = train_epoch(network, data, optimizer, batch_size=2, generator=seeded(1))
    assert mean == pytest.approx(math.log(2), abs=ROUNDING)
