"""Dense training in bfloat16 and compiled, and an epoch that waits for no step on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossprune.data import Dataset, Split
from lossprune.experiment import RunConfig, run
from lossprune.experiment.runner import opened
from lossprune.networks import NETWORKS
from lossprune.training import DivergedError, Forward, evaluate, make_optimizer, train_epoch

BF16 = 2**-8  # its rounding


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron() -> nn.Module:
    return NETWORKS["MLP"](shape=(1, 8, 8), generator=seeded(1))


def test_bf16_rounds_the_logits_and_leaves_float32_everywhere(digits):
    network = perceptron()
    inputs = digits.inputs(digits.valid.images)
    rounded = Forward(network, "bf16")(inputs)
    exact = network(inputs)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 8 * BF16 * exact.abs().max()
    F.cross_entropy(rounded, digits.valid.labels).backward()
    assert {it.dtype for it in network.parameters()} == {torch.float32}
    assert {it.grad.dtype for it in network.parameters() if it.grad is not None} == {torch.float32}


def test_bf16_trains(digits):
    network = perceptron()
    optimizer = make_optimizer(network, lr=0.05, l2=0.0)
    forward = Forward(network, "bf16")
    for seed in range(3):
        train_epoch(network, digits, optimizer, generator=seeded(seed), forward=forward)
    assert evaluate(network, digits, digits.valid, forward=forward).error < 0.15


def test_an_unknown_amp_is_refused():
    with pytest.raises(ValueError, match=r"amp must be one of off, bf16, got 'fp16'"):
        Forward(perceptron(), "fp16")


def config(path, **changes) -> RunConfig:
    settings = {"arch": "MLP", "dataset": "digits", "prune_epoch": 1, "sparsity": 0.9, "epochs": 3}
    # One size of batches to compile training for.
    settings |= {"train": "dense", "batch_size": 1297, "lr": 0.1}
    return RunConfig(path=path, device="cpu", threads=1, **{**settings, **changes})


def test_a_run_in_bf16_is_repeated_to_the_bit_and_says_so(tmp_path):
    records = [run(config(tmp_path / name, amp="bf16")) for name in "ab"]
    assert records[0].config["amp"] == "bf16"
    assert "amp=bf16" in config(tmp_path, amp="bf16").name
    assert "amp" not in config(tmp_path).name
    assert [it.scores for it in records[0].epochs] == [it.scores for it in records[1].epochs]
    exact = run(config(tmp_path / "c"))
    assert [it.scores for it in exact.epochs] != [it.scores for it in records[0].epochs]
    saved = torch.load(
        config(tmp_path / "a", amp="bf16").folder / "best_model.pt", weights_only=True
    )
    assert {it.dtype for it in saved["state_dict"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("way", "rounding"),
    [
        ({"amp": "bf16"}, 0.05),
        pytest.param({"compiled": True}, 1e-4, marks=pytest.mark.full("compiled training")),
    ],
)
def test_it_is_the_plain_run_to_rounding_and_goes_on_to_the_bit(tmp_path, way, rounding):
    plain = run(config(tmp_path / "plain"))
    # A process of its own has compiled nothing; what was before counts against torch's limit.
    torch.compiler.reset()
    expected = run(config(tmp_path / "undisturbed", **way))
    for one, other in zip(expected.epochs, plain.epochs, strict=True):
        assert one.scores.train_loss == pytest.approx(other.scores.train_loss, abs=rounding)
        assert one.scores.valid_loss == pytest.approx(other.scores.valid_loss, abs=rounding)
    stopped = config(tmp_path / "stopped", **way)
    torch.compiler.reset()
    with opened(stopped) as going:
        going.begin()
        going.train()
    torch.compiler.reset()
    found = run(stopped)
    assert [it.scores for it in found.epochs] == [it.scores for it in expected.epochs]
    for name in ("best_model.pt", "last_model.pt"):
        undisturbed = config(tmp_path / "undisturbed", **way).folder / name
        assert (stopped.folder / name).read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"amp": "fp16"}, "--amp must be one of off, bf16, got 'fp16'"),
        ({"amp": "bf16", "train": "sparse"}, "--train sparse with --amp bf16"),
        ({"compiled": True, "train": "sparse"}, "--train sparse with --compile"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_divergence_is_told_with_the_first_step_checked(digits, device):
    network = perceptron().to(device)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    optimizer = make_optimizer(network, lr=0.1, l2=0.0)
    with pytest.raises(DivergedError, match="not finite within 100 steps"):
        train_epoch(network, digits.to(device), optimizer, batch_size=5, generator=seeded(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_on_cuda_no_step_waits_for_the_device(recwarn, amp):
    """An epoch of many steps synchronises as often as one of few."""
    images = torch.randint(0, 256, (2400, 3, 32, 32), dtype=torch.uint8, generator=seeded(1))
    split = Split(images, torch.arange(2400) % 10)
    names = tuple("0123456789")
    data = Dataset("random", split, split, split, names, (0.5,) * 3, (0.25,) * 3, augmented=True)
    data = data.to("cuda")
    network = NETWORKS["VGG11"](shape=data.shape, generator=seeded(1)).cuda()
    optimizer = make_optimizer(network, lr=0.001, l2=0.0)
    forward = Forward(network, amp)
    waits = []
    for batch_size in (600, 10, 600, 10):
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_epoch(
                network,
                data,
                optimizer,
                batch_size=batch_size,
                generator=seeded(1),
                forward=forward,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(it.message) for it in recwarn))
    assert waits[2] == waits[3]
    assert all(it.is_contiguous() for it in network.parameters())
