"""Training convolutions over their kept weights alone is dense masked training, to rounding."""

import copy

import pytest
import torch
from torch import nn

from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import Mask
from lossprune.training import (
    ConvolutionTraining,
    DivergedError,
    Forward,
    NotSparseError,
    choose_training,
    evaluate,
    train_epoch,
)
from tests.compilers import hide_compilers
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
    work, kept = training.work, {name: int(left.sum()) for name, left in mask.items()}
    assert work.whole == 54 * 64 + 216 * 36 + 1440
    assert work.by_torch == 54 * 64
    assert (work.convolutions, work.linear) == (kept["2.weight"] * 36, kept["5.weight"])
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


class Twice(nn.Module):
    """One kernel in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        self.two.weight = self.one.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x).relu()).flatten(1))


def test_a_kernel_that_two_layers_share_is_trained_as_one(few):
    network = drawn(Twice(), 3)
    mask = Mask({"one.weight": torch.rand(1, 1, 3, 3, generator=seeded(2)) < 0.6})
    mask.apply_(network)
    dense = copy.deepcopy(network)
    ConvolutionTraining(network, mask, few).train_epoch(begun(network, mask), generator=seeded(1))
    train_epoch(dense, few, begun(dense, mask), generator=seeded(1))
    close(network, dense, statistics=True)


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


def few_kept(network: nn.Module, share: float) -> Mask:
    """A mask that cuts no channel off, where some of its weights are kept."""
    generator = seeded(9)
    mask = {}
    for name, whole in Mask.dense(network).items():
        mask[name] = torch.rand(whole.shape, generator=generator) < share
        mask[name].flatten(1)[:, 0] = True
        mask[name][0] = True
    return Mask(mask)


@pytest.mark.parametrize("build", [plain, residual])
def test_it_is_chosen_where_few_multiply_adds_are_of_kept_weights(few, build):
    network = build()
    for share, mode in ((0.1, "sparse"), (0.8, "dense")):
        mask = few_kept(network, share)
        training = choose_training(network, mask, few)
        assert training.mode == mode
        assert isinstance(training, ConvolutionTraining) == (mode == "sparse")
        assert choose_training(network, mask, few, "dense").mode == "dense"
        assert choose_training(network, mask, few, "sparse").mode == "sparse"
    bf16 = Forward(network, "bf16")
    assert choose_training(network, few_kept(network, 0.1), few, forward=bf16).mode == "dense"


def test_the_reason_counts_what_is_done(few):
    network = plain()
    mask = few_kept(network, 0.1)
    training = choose_training(network, mask, few)
    assert isinstance(training, ConvolutionTraining)
    kept = {name: int(left.sum()) for name, left in mask.items()}
    done = kept["0.weight"] * 64 + kept["3.weight"] * 4 + kept["6.weight"] + kept["8.weight"]
    assert training.work.done == done
    whole = 108 * 64 + 1080 * 4 + 800 + 200
    assert training.reason == (
        f"{done / 1e6:.1f} of {whole / 1e6:.1f} million multiply-adds an example, "
        "4 layers over kept weights alone"
    )


def test_compaction_is_chosen_where_it_leaves_less_to_do(few):
    """Dense within the channels that are left, of which nothing is removed."""
    network = plain()
    mask = {name: torch.ones_like(kept) for name, kept in Mask.dense(network).items()}
    mask["0.weight"][3:] = False
    mask["3.weight"][:, 3:] = False
    mask["3.weight"][3:] = False
    mask["6.weight"][:, 12:] = False
    Mask(mask).apply_(network)
    assert choose_training(network, mask, few).mode == "compacted"
    assert choose_training(network, mask, few, "sparse").mode == "sparse"


class Looks(nn.Module):
    """What it computes depends on the values, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x if x.sum() > 0 else -x)


def hooked() -> nn.Module:
    network = plain()
    network[0].register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Looks, "layers change their layout each by itself"), (hooked, "it has hooks")],
)
def test_it_is_not_chosen_where_it_would_not_pay_or_cannot_be_done(few, build, reason):
    network = build()
    training = choose_training(network, few_kept(network, 0.1), few)
    assert training.mode == "dense"
    assert reason in training.reason


def test_without_a_compiler_it_is_not_chosen(few, monkeypatch):
    hide_compilers(monkeypatch)
    network = plain()
    mask = few_kept(network, 0.1)
    training = choose_training(network, mask, few)
    assert training.mode == "dense"
    assert "needs a C compiler" in training.reason
    with pytest.raises(ValueError, match=r"train sparse cannot be done: .*needs a C compiler"):
        choose_training(network, mask, few, "sparse")


def test_a_perceptron_that_its_own_kernels_refuse_is_sparse_if_asked(few):
    """As one with another activation; by itself it stays dense, for torch's product is fast."""
    network = drawn(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10)), 4
    )
    mask = few_kept(network, 0.1)
    mask.apply_(network)
    assert choose_training(network, mask, few).mode == "dense"
    training = choose_training(network, mask, few, "sparse")
    dense = copy.deepcopy(network)
    training.train_epoch(begun(network, mask), generator=seeded(1))
    train_epoch(dense, few, begun(dense, mask), generator=seeded(1))
    close(network, dense, statistics=True)
