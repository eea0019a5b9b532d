"""Measuring and pruning leave everything as they found it, also when they fail."""

import copy

import pytest
import torch
from torch import nn

import lossprune


class Network(nn.Module):
    """Convolutions, batch norm that tracks, dropout, a buffer that forward writes, and a switch.

    A cell that runs twice and the norm have several names each.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen_norm = nn.BatchNorm2d(4).eval()
        self.dropout = nn.Dropout(0.5)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.cells = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.last_norm = self.frozen_norm
        self.head = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.fails = False

    def forward(self, x):
        self.steps += 1
        noise = torch.rand(())  # moves the random state
        x = self.dropout(self.frozen_norm(torch.relu(self.norm(self.conv(x)))))
        if self.fails:
            raise ArithmeticError("as the test wants it")
        x = self.recurrent(x.mean((2, 3))[:, None])[0][:, -1]
        for cell in self.cells:
            x = torch.tanh(cell(x))
        return self.head(x) + 0 * noise


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 2, 5, 5, generator=generator)
    return [(inputs[:8], torch.arange(8) % 3), (inputs[8:], torch.arange(4) % 3)]


@pytest.fixture
def network():
    torch.manual_seed(3)
    network = Network()
    network.conv.bias.requires_grad_(False)
    network.head.weight.requires_grad_(False)
    network.norm.train()
    network.frozen_norm.eval()
    network.dropout.train()
    network.conv.weight.grad = torch.full_like(network.conv.weight, 7.0)
    network.calls = []
    network.conv.register_forward_hook(lambda *_: network.calls.append("forward"))
    network.head.register_forward_pre_hook(lambda *_: network.calls.append("pre"))
    return network


def snapshot(network):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": {
            name: (id(p), p.data_ptr(), p._version, p.requires_grad)
            for name, p in network.named_parameters(remove_duplicate=False)
        },
        "buffers": {
            name: (id(b), b._version) for name, b in network.named_buffers(remove_duplicate=False)
        },
        "weights of the LSTM": [id(p) for p in network.recurrent._flat_weights],
        "state": {name: value.tolist() for name, value in network.state_dict().items()},
        "gradients": {
            name: None if p.grad is None else p.grad.tolist()
            for name, p in network.named_parameters()
        },
        "modes": {name: module.training for name, module in network.named_modules()},
        "hooks": {
            (name, kind): list(getattr(module, kind))
            for name, module in network.named_modules()
            for kind in hooks
        },
        "attributes": {name: sorted(vars(module)) for name, module in network.named_modules()},
        "random": torch.get_rng_state().tolist(),
        "autograd": torch.is_grad_enabled(),
    }


USES = {
    "measure": lambda network: lossprune.measure(network, batches()),
    "measure under a mask": lambda network: lossprune.measure(
        network, batches(), mask=lossprune.Mask.dense(network)
    ),
    **{
        criterion: lambda network, criterion=criterion: lossprune.prune(
            network, criterion, sparsity=0.5, data=batches(), stages=2
        )
        for criterion in lossprune.CRITERIA
    },
    "sensitivity": lambda network: lossprune.sensitivity(network, batches()),
    "MP without data": lambda network: lossprune.prune(network, "MP", sparsity=0.5),
}


@pytest.mark.parametrize("use", USES)
def test_everything_is_left_as_it_was(network, use):
    before = snapshot(network)
    USES[use](network)
    assert snapshot(network) == before


@pytest.mark.parametrize("use", [use for use in USES if use != "MP without data"])
def test_everything_is_left_as_it_was_after_an_exception_in_forward(network, use):
    network.fails = True
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match="as the test wants it"):
        USES[use](network)
    assert snapshot(network) == before


def test_everything_is_left_as_it_was_after_an_exception_in_the_data(network):
    def broken():
        yield batches()[0]
        torch.rand(5)
        raise OSError("disk on fire")

    before = snapshot(network)
    with pytest.raises(OSError, match="disk on fire"):
        lossprune.measure(network, broken())
    assert snapshot(network) == before


def test_everything_is_left_as_it_was_between_stages(network):
    before = snapshot(network)
    stages = lossprune.pruning.prune_by_stage(
        network, "QM", sparsity=0.5, data=batches(), stages=3
    )  # fmt: skip
    for _ in stages:
        assert snapshot(network) == before


def test_data_is_not_changed(network):
    data = batches()
    before = copy.deepcopy(data)
    lossprune.prune(network, "QM", sparsity=0.5, data=data, examples=9, stages=2)
    for batch, expected in zip(data, before, strict=True):
        for tensor, other in zip(batch, expected, strict=True):
            assert torch.equal(tensor, other)
            assert not tensor.requires_grad


def test_measured_in_evaluation_mode(network):
    """Dropout is off, batch norm uses its running statistics; so two measurements agree."""
    network.norm.running_var.fill_(4.0)
    first, second = (lossprune.measure(network, batches()) for _ in range(2))
    network.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(network(x), t, reduction="sum") for x, t in batches()]
    assert first.loss == pytest.approx(float(sum(losses)) / 12, rel=1e-6)
    for name, tensor in first.ggn_diagonal.items():
        assert torch.equal(tensor, second.ggn_diagonal[name])


FLOAT32 = {
    "convolution on a GPU": lambda: torch.backends.cudnn.conv,
    "product on a GPU": lambda: torch.backends.cuda.matmul,
    "convolution on a CPU": lambda: torch.backends.mkldnn.conv,
    "product on a CPU": lambda: torch.backends.mkldnn.matmul,
}


def precision() -> dict[str, object]:
    """How torch computes float32 now, and whether by cuDNN."""
    kinds = {name: place().fp32_precision for name, place in FLOAT32.items()}
    cudnn = torch.backends.cudnn
    return {**kinds, "cuDNN": cudnn.enabled, "its benchmark": cudnn.benchmark}


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since torch 2.9")
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_measured_with_all_digits_by_the_libraries_that_torch_has(network, matmul):
    """Convolutions may use TF32 by default; where it is off, cuDNN, far faster, must not be."""
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    seen = []
    network.head.register_forward_hook(lambda *_: seen.append(precision()))
    try:
        before = precision()
        lossprune.prune(network, "QM", sparsity=0.5, data=batches())
        assert precision() == before
        assert torch.get_float32_matmul_precision() == matmul
    finally:
        torch.set_float32_matmul_precision(asked)
    assert before["cuDNN"] is True
    assert seen
    assert all(it == {**before, **dict.fromkeys(FLOAT32, "ieee")} for it in seen)


def test_hooks_of_the_user_run(network):
    lossprune.measure(network, batches())
    assert set(network.calls) == {"forward", "pre"}


def test_training_goes_on_the_same_with_and_without_pruning_in_between(network):
    def train(prunes: bool) -> list[list[float]]:
        model = copy.deepcopy(network)
        model.requires_grad_(True).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(5)
        for inputs, targets in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if prunes:
                lossprune.prune(model, "QM", sparsity=0.5, data=batches())
        return [p.tolist() for p in model.parameters()]

    assert train(prunes=True) == train(prunes=False)
