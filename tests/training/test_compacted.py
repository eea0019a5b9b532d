"""Training without the channels that lead to no output is dense masked training, to rounding."""

import copy

import pytest
import torch

from lossprune.channels.narrowing import NotNarrowableError
from lossprune.pruning import Mask
from lossprune.training import (
    CompactedTraining,
    DivergedError,
    Forward,
    choose_training,
    evaluate,
    make_optimizer,
    train_epoch,
)
from tests.training.cut_networks import CURVE, begun, close, cutting, plain, residual
from tests.training.stacks import seeded


@pytest.mark.parametrize("build", [plain, residual])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_epochs_are_those_of_the_dense_loop(few, build, momentum):
    """Momentum, decay, order, last batch; what is left out decays as well, step by step."""
    dense = build()
    mask = cutting(dense)
    mask.apply_(dense)
    compacted = copy.deepcopy(dense)
    by_dense, by_compacted = (begun(it, mask, momentum=momentum) for it in (dense, compacted))
    training = CompactedTraining(compacted, mask, few)
    before, after = training.multiply_adds
    assert after < 0.7 * before
    for epoch in range(2):
        one = train_epoch(dense, few, by_dense, batch_size=100, generator=seeded(epoch))
        other = training.train_epoch(by_compacted, batch_size=100, generator=seeded(epoch))
        assert other == pytest.approx(one, rel=1e-5)
    close(compacted, dense, statistics=False)
    for (name, one), other in zip(dense.named_parameters(), compacted.parameters(), strict=True):
        kept = mask[name] if name in mask else torch.ones_like(one, dtype=torch.bool)
        assert not other[~kept].any()
        if momentum:
            expected, found = by_dense.state[one], by_compacted.state[other]
            torch.testing.assert_close(
                found["momentum_buffer"][kept],
                expected["momentum_buffer"][kept],
                atol=CURVE,
                rtol=0,
            )
    for split in (few.train, few.valid, few.test):
        expected, found = evaluate(dense, few, split), training.evaluate(split)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.error == expected.error
        assert evaluate(compacted, few, split).loss == pytest.approx(expected.loss, rel=1e-5)


def test_what_is_left_out_is_the_dense_loops_to_the_bit(few):
    """Weights and biases that get no gradient only decay."""
    dense = plain()
    mask = cutting(dense)
    mask.apply_(dense)
    compacted = copy.deepcopy(dense)
    train_epoch(dense, few, begun(dense, mask), generator=seeded(1))
    training = CompactedTraining(compacted, mask, few)
    training.train_epoch(begun(compacted, mask), generator=seeded(1))
    # Every third channel of the first convolution is read by nobody.
    start = plain()
    for name in ("0.weight", "0.bias"):
        one, other = (it.state_dict()[name][::3] for it in (dense, compacted))
        assert torch.equal(one, other)
        assert not torch.equal(other, start.state_dict()[name][::3])


@pytest.mark.parametrize("build", [plain, residual])
def test_it_goes_on_where_the_dense_loop_stopped_and_back(few, build):
    """Momentum comes from the optimizer and goes back to it."""
    start = build()
    mask = cutting(start)
    mask.apply_(start)
    ends = []
    for order in ("dense dense dense", "dense compacted dense"):
        network = copy.deepcopy(start)
        optimizer = begun(network, mask)
        for epoch, way in enumerate(order.split()):
            if way == "dense":
                train_epoch(network, few, optimizer, generator=seeded(epoch))
            else:
                CompactedTraining(network, mask, few).train_epoch(
                    optimizer, generator=seeded(epoch)
                )
        ends.append(network)
    close(ends[1], ends[0], statistics=False)


def test_the_same_twice_to_the_bit(few):
    ends = []
    for _ in range(2):
        network = residual()
        mask = cutting(network)
        mask.apply_(network)
        training = CompactedTraining(network, mask, few)
        training.train_epoch(begun(network, mask), generator=seeded(3))
        ends.append(network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_mask_named_as_in_a_compiled_network(few):
    """What its names have before them does not matter: what is removed never comes back."""
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    optimizer = make_optimizer(network, lr=0.02, l2=0.01)
    with mask.enforce(network, optimizer):
        train_epoch(network, few, optimizer, generator=seeded(0))  # removed weights get a momentum
    compiled = Mask({f"_orig_mod.{name}": kept for name, kept in mask.items()})
    CompactedTraining(network, compiled, few).train_epoch(optimizer, generator=seeded(1))
    assert not any(network.get_parameter(name)[~kept].any() for name, kept in mask.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("build", [plain, residual])
def test_on_a_gpu(few, build):
    dense = build()
    mask = cutting(dense)
    mask.apply_(dense)
    compacted = copy.deepcopy(dense).cuda()
    train_epoch(dense, few, begun(dense, mask), generator=seeded(1))
    training = CompactedTraining(compacted, mask, few.to(torch.device("cuda")))
    training.train_epoch(begun(compacted, mask), generator=seeded(1))
    for name, parameter in dense.named_parameters():
        # Convolutions there may round their inputs to TensorFloat-32.
        found = compacted.get_parameter(name).cpu()
        torch.testing.assert_close(found, parameter, atol=2e-3, rtol=0, msg=name)


def test_a_loss_that_is_not_finite(few):
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    training = CompactedTraining(network, mask, few)
    with pytest.raises(DivergedError, match="within 2 steps"):
        training.train_epoch(begun(network, mask, lr=1e30), generator=seeded(1))


def test_it_is_chosen_where_it_pays(few):
    network = residual()
    mask = cutting(network)
    mask.apply_(network)
    training = choose_training(network, mask, few)
    assert training.mode == "compacted"
    before, after = training.multiply_adds
    assert training.reason == (
        f"{after / 1e6:.1f} of {before / 1e6:.1f} million multiply-adds an example"
    )
    assert choose_training(network, mask, few, "dense").mode == "dense"
    assert choose_training(network, Mask.dense(network), few).mode == "dense"
    network.stem.weight.requires_grad_(False)
    assert choose_training(network, mask, few).mode == "dense"


def test_bfloat16_goes_through_the_smaller_network(few):
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    dense, exact = copy.deepcopy(network), copy.deepcopy(network)
    training = choose_training(network, mask, few, forward=Forward(network, "bf16"))
    assert training.mode == "compacted"
    found = training.train_epoch(begun(network, mask), generator=seeded(1))
    expected = train_epoch(
        dense, few, begun(dense, mask), generator=seeded(1), forward=Forward(dense, "bf16")
    )
    assert found == pytest.approx(expected, rel=0.01)
    in_float32 = CompactedTraining(exact, mask, few)
    assert found != in_float32.train_epoch(begun(exact, mask), generator=seeded(1))


def test_other_networks_and_optimizers_are_refused(few):
    network = plain()
    mask = cutting(network)
    mask.apply_(network)
    training = CompactedTraining(network, mask, few)
    with pytest.raises(ValueError, match=r"must be torch\.optim\.SGD"):
        training.train_epoch(torch.optim.Adam(network.parameters()), generator=seeded(1))
    network[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotNarrowableError, match="hooks"):
        CompactedTraining(network, mask, few)
    network = plain()
    network[0].bias.requires_grad_(False)
    with pytest.raises(NotNarrowableError, match=r"0\.bias is not trained"):
        CompactedTraining(network, mask, few)
