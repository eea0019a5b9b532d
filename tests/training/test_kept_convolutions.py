"""Training convolutions over their kept weights alone is dense masked training, to rounding."""

import copy

import pytest
import torch
from torch import nn

from lossprune.kernels.compiler import compiler_available
from lossprune.training import (
    ConvolutionTraining,
    DivergedError,
    NotSparseError,
    evaluate,
    train_epoch,
)
from tests.training.cut_networks import CURVE, begun, close, cutting, plain, residual
from tests.training.stacks import drawn, seeded

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


@pytest.mark.parametrize("build", [plain, residual])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_epochs_are_those_of_the_dense_loop(few, build, momentum):
    """Momentum, decay, running statistics, order, last batch."""
    dense = build()
    mask = cutting(dense)
    mask.apply_(dense)
    network = copy.deepcopy(dense)
    one, other = begun(dense, mask, momentum=momentum), begun(network, mask, momentum=momentum)
    training = ConvolutionTraining(network, mask, few)
    assert training.mode == "sparse"
    assert not training.notes
    for epoch in range(3):
        expected = train_epoch(dense, few, one, batch_size=100, generator=seeded(epoch))
        found = training.train_epoch(other, batch_size=100, generator=seeded(epoch))
        assert found == pytest.approx(expected, rel=1e-5)
    close(network, dense, statistics=True)
    for (name, whole), trained in zip(dense.named_parameters(), network.parameters(), strict=True):
        kept = mask[name] if name in mask else torch.ones_like(whole, dtype=torch.bool)
        assert not trained[~kept].any()
        assert trained.grad is None
        if momentum:
            expected, found = (
                by.state[of]["momentum_buffer"] for by, of in ((one, whole), (other, trained))
            )
            torch.testing.assert_close(found[kept], expected[kept], atol=CURVE, rtol=0)
            assert not found[~kept].any()
    for split in (few.train, few.valid, few.test):
        expected, found = evaluate(dense, few, split), training.evaluate(split)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.error == expected.error
        assert evaluate(network, few, split).loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("build", [plain, residual])
def test_it_goes_on_where_the_dense_loop_stopped_and_back(few, build):
    """Momentum comes from the optimizer and goes back to it."""
    start = build()
    mask = cutting(start)
    mask.apply_(start)
    ends = []
    for order in ("dense dense dense", "dense sparse dense"):
        network = copy.deepcopy(start)
        optimizer = begun(network, mask)
        for epoch, way in enumerate(order.split()):
            if way == "dense":
                train_epoch(network, few, optimizer, generator=seeded(epoch))
            else:
                ConvolutionTraining(network, mask, few).train_epoch(
                    optimizer, generator=seeded(epoch)
                )
        ends.append(network)
    close(ends[1], ends[0], statistics=True)


def test_taken_up_again_it_is_the_same_to_the_bit(few):
    """A training made anew of network and optimizer goes on as the one that was there."""
    ends = []
    for anew in (False, True):
        network = residual()
        mask = cutting(network)
        mask.apply_(network)
        optimizer = begun(network, mask)
        training = ConvolutionTraining(network, mask, few)
        for epoch in range(3):
            if anew and epoch:
                saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
                network = residual()
                optimizer = begun(network, mask)
                network.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                training = ConvolutionTraining(network, mask, few)
            loss = training.train_epoch(optimizer, generator=seeded(epoch))
        scores = training.evaluate(few.test)
        ends.append((loss, scores, network.state_dict(), optimizer.state_dict()["state"]))
    assert ends[0][:2] == ends[1][:2]
    for name, value in ends[0][2].items():
        assert torch.equal(value, ends[1][2][name])
    for place, state in ends[0][3].items():
        assert torch.equal(state["momentum_buffer"], ends[1][3][place]["momentum_buffer"])


def test_weights_that_are_changed_from_outside_are_read(few):
    """As the best network is, where a run goes back to it."""
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    training = ConvolutionTraining(network, mask, few)
    training.train_epoch(begun(network, mask), generator=seeded(1))
    network.load_state_dict(plain().state_dict())
    mask.apply_(network)
    expected = evaluate(network, few, few.test)
    assert training.evaluate(few.test).loss == pytest.approx(expected.loss, rel=1e-5)


def test_what_the_kernels_lack_is_told_and_trained_by_torch(few):
    network = drawn(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(6, 4, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
        ),
        5,
    )  # fmt: skip
    mask = cutting(network)
    mask.apply_(network)
    dense = copy.deepcopy(network)
    training = ConvolutionTraining(network, mask, few)
    assert training.notes == ("0 runs as torch runs it: its padding is of 'reflect'",)
    assert training.work.whole == 54 * 64 + 216 * 36 + 1440
    assert training.work.by_torch == 54 * 64
    kept = {name: int(left.sum()) for name, left in mask.items()}
    assert training.work.kept == kept["2.weight"] * 36 + kept["5.weight"]
    training.train_epoch(begun(network, mask), generator=seeded(1))
    train_epoch(dense, few, begun(dense, mask), generator=seeded(1))
    close(network, dense, statistics=True)


def test_a_loss_that_is_not_finite(few):
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    training = ConvolutionTraining(network, mask, few)
    with pytest.raises(DivergedError, match="within 2 steps"):
        training.train_epoch(begun(network, mask, lr=1e30), generator=seeded(1))


def test_other_networks_and_optimizers_are_refused(few):
    network = plain()
    mask = cutting(network)
    training = ConvolutionTraining(network, mask, few)
    with pytest.raises(ValueError, match=r"must be torch\.optim\.SGD"):
        training.train_epoch(torch.optim.Adam(network.parameters()), generator=seeded(1))
    nesterov = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="without nesterov"):
        training.train_epoch(nesterov, generator=seeded(1))
    with pytest.raises(NotSparseError, match=r"0\.weight is torch\.float64 on cpu"):
        ConvolutionTraining(plain().double(), mask, few)
    with pytest.raises(NotSparseError, match=r"it names '9\.weight'"):
        ConvolutionTraining(network, {"9.weight": mask["0.weight"]}, few)
    network[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotSparseError, match="hooks"):
        ConvolutionTraining(network, mask, few)
    network = plain()
    network[0].bias.requires_grad_(False)
    with pytest.raises(NotSparseError, match=r"0\.bias is not trained"):
        ConvolutionTraining(network, mask, few)
