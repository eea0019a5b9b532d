"""A sparse model in anyone's loop: trained, saved, copied and written back."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossprune
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError
from tests.training.convolution.oracle import close, drawn, masked, random_mask

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

SHAPE = (18, 3, 8, 8)


class Residual(nn.Module):
    """Convolutions, a residual branch, norms, a pool and two layers of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down = nn.Conv2d(8, 6, 3, stride=2)
        self.hidden = nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.ones(7))
        self.register_buffer("offset", torch.full((7,), 0.1))
        self.out = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.relu(x + self.branch(x))
        x = self.down(x).flatten(1)
        return self.out(torch.tanh(self.hidden(x)) * self.scale + self.offset)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual()


@pytest.fixture
def mask(network):
    return random_mask(network, 0.3)


@pytest.fixture
def model(network, mask):
    return lossprune.sparse(network, mask, drawn(*SHAPE))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return drawn(*SHAPE, seed=seed), torch.arange(SHAPE[0]) % 4


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_it_trains_as_the_masked_dense_network(network, mask, model, optimizer):
    """Ten steps; the network that it came from is as it was until it is written back."""
    before = copy.deepcopy(network.state_dict())
    dense = masked(network, mask)
    own = optimizer(model.parameters())
    theirs = optimizer(dense.parameters())
    for step in range(10):
        x, labels = batch(step)
        for one, by, inputs in ((model, own, x), (dense, theirs, x.double())):
            by.zero_grad()
            F.cross_entropy(one(inputs), labels).backward()
            by.step()
        lossprune.Mask(mask).apply_(dense)
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    assert model.write_back_() is network
    expected = dense.state_dict()
    for name, found in network.state_dict().items():
        error = (found.double() - expected[name]).abs().max()
        assert error <= 1e-4 * expected[name].abs().max(), name
        if name in mask:
            assert not found[~mask[name]].any()
    held = sum(state.numel() for s in own.state.values() for state in s.values() if state.dim())
    per_weight = 1 if isinstance(own, torch.optim.SGD) else 2
    assert held == per_weight * sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_the_kept_values_and_all_others(network, mask, model):
    kept = sum(int(one.sum()) for one in mask.values())
    others = sum(p.numel() for name, p in network.named_parameters() if name not in mask)
    assert sum(parameter.numel() for parameter in model.parameters()) == kept + others
    assert model.training
    assert model.notes == ["mul runs as torch runs it"]


@torch.no_grad()
def test_what_is_written_back_is_exact(network, model):
    for number, tensor in enumerate((*model.parameters(), *model.buffers())):
        if tensor.dtype == torch.float32:
            tensor.copy_(drawn(*tensor.shape, seed=number).abs())
    model.write_back_()
    model.eval()
    network.eval()
    again = dict(network.state_dict())
    for name, tensor, kept in model.mirrored():
        whole = again.pop(name)
        found = whole if kept is None else whole.flatten()[kept.long()]
        assert torch.equal(found, tensor)
        assert kept is None or int(whole.count_nonzero()) == int(tensor.count_nonzero())
    assert not again
    close(model(drawn(*SHAPE)), copy.deepcopy(network).double()(drawn(*SHAPE).double()), "outputs")


def moved(model: nn.Module) -> nn.Module:
    """One step away from where it was."""
    x, labels = batch(1)
    F.cross_entropy(model(x), labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def test_a_state_goes_round(network, mask, model):
    """Through a file, into another sparse model of the same network."""
    moved(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = lossprune.sparse(network, mask, drawn(*SHAPE))
    x, _ = batch(2)
    assert not torch.equal(other.eval()(x), model.eval()(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_a_state_of_another_mask_is_refused(network, model):
    other = lossprune.sparse(network, random_mask(network, 0.3, seed=5), drawn(*SHAPE))
    with pytest.raises(PruningError, match=r"network\.first\.kept: the state is of another mask$"):
        model.load_state_dict(other.state_dict())


def test_a_state_of_another_mask_is_refused_by_what_torch_runs():
    network = nn.Sequential(nn.Conv1d(2, 2, 2))
    masks = [torch.arange(8).view(2, 2, 2) % 2 == rest for rest in (0, 1)]
    one, other = (lossprune.sparse(network, {"0.weight": m}, torch.ones(1, 2, 3)) for m in masks)
    with pytest.raises(PruningError, match=r"\.kept: the state is of another mask$"):
        one.load_state_dict(other.state_dict())


COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_train_by_themselves(model, copied):
    moved(model)
    x, _ = batch(2)
    expected = model(x)
    other = copied(model)
    assert not any(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state = copy.deepcopy(model.state_dict())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    again = other(x)
    assert torch.equal(again, expected)
    assert other.notes == model.notes
    moved(other)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not torch.equal(other.eval()(x), model.eval()(x))


def test_frozen_parameters_stay(network, mask):
    network.first.weight.requires_grad_(False)
    network.norm.requires_grad_(False)
    network.branch.bias.requires_grad_(False)
    model = lossprune.sparse(network, mask, drawn(*SHAPE))
    before = copy.deepcopy(network.state_dict())
    moved(model).write_back_()
    for name, parameter in network.named_parameters():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(parameter, expected) != parameter.requires_grad, name


def test_a_frozen_norm_in_evaluation_mode(network, mask, model):
    """While all others train, by the mode of the module itself."""
    model.network.norm.eval()
    dense = masked(network, mask)
    dense.norm.eval()
    x, _ = batch(0)
    close(model(x), dense(x.double()), "outputs")
    assert model.network.norm.num_batches_tracked == 0


def test_gradients_of_a_second_order_are_refused(model):
    x = drawn(*SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_gradients_add_up_until_they_are_put_to_zero(model):
    x, _ = batch(0)
    model.eval()(x).sum().backward()
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_is_refused_later_too(model, kind):
    """Before anything is read that is not there."""
    x, _ = batch(0)
    with pytest.raises(
        PruningError, match=rf"^sparse training is in float32 on the CPU, not {kind}"
    ):
        model.to(kind)(x)


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, within):
    x, _ = batch(0)
    expected = model.eval()(x)
    with within():
        found = model(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_the_same_bits_with_every_number_of_calls(model):
    """And with two threads, what one computes but for rounding."""
    x, labels = batch(0)

    def gradients(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        try:
            own = copy.deepcopy(model)
            out = own(x)
            F.cross_entropy(out, labels).backward()
            return [out.detach(), *(parameter.grad for parameter in own.parameters())]
        finally:
            torch.set_num_threads(1)

    one, two = ([gradients(threads) for _ in range(2)] for threads in (1, 2))
    for found, again in (one, two):
        assert all(map(torch.equal, again, found))
    for a, b in zip(one[0], two[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_making_a_model_draws_no_random_numbers_and_leaves_the_network(network, mask):
    before, state = torch.random.get_rng_state(), copy.deepcopy(network.state_dict())
    network.eval()
    network.norm.train()
    modes = [module.training for module in network.modules()]
    network.hidden.register_forward_hook(lambda _, __, output: F.dropout(output, 0.5))
    lossprune.sparse(network, mask, drawn(*SHAPE))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_usual_precision_of_torch_does_not_matter(network, mask, model):
    x, labels = batch(0)
    expected = copy.deepcopy(model)(x)
    F.cross_entropy(expected, labels).backward()
    torch.set_default_dtype(torch.float64)
    try:
        out = lossprune.sparse(network, mask, drawn(*SHAPE).float())(x)
        F.cross_entropy(out, labels).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


def test_it_is_called_as_the_network(network, model):
    """Trainers look at the signature to find which columns of the data to give it."""
    assert inspect.signature(model.forward) == inspect.signature(network.forward)
    x = drawn(*SHAPE)
    assert torch.equal(model.eval()(x=x), model(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        model(x, y=x)
