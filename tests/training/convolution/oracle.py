"""A sparse model beside the masked dense network, by torch's autograd in float64."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import lossprune
from lossprune.training.convolution.model import SparseModel
from tests.training.stacks import seeded

TOLERANCE = 1e-5  # relative to the largest number of a tensor

Masks = Mapping[str, Tensor]


def random_mask(network: nn.Module, left: float, seed: int = 0) -> Masks:
    """Keep each weight of the layers with probability ``left``."""
    generator = seeded(seed)
    return {
        name: torch.rand(weight.shape, generator=generator) < left
        for name, weight in network.named_parameters()
        if weight.dim() > 1
    }


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=seeded(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Return whole numbers: their products' sums are exact, and a rectifier sees the same 0."""
    return torch.randint(-2, 3, shape, generator=seeded(seed)).float()


def masked(network: nn.Module, mask: Masks) -> nn.Module:
    """Return a copy in double precision whose removed weights are 0."""
    dense = copy.deepcopy(network).double()
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, kept in mask.items():
            parameters[name].mul_(kept)
    return dense


def compared(
    network: nn.Module,
    mask: Masks,
    *inputs: Tensor,
    modes: Sequence[bool] = (True,),
    numbers: Callable[..., Tensor] = drawn,
) -> SparseModel:
    """Assert that outputs, gradients and buffers are those of the masked dense network.

    Args:
        network: takes the inputs, and returns one tensor.
        modes: training or evaluation, one after the other.
        numbers: makes the direction of the gradients.

    Returns the sparse model, after one backward pass in each mode.
    """
    model, dense = lossprune.sparse(network, mask, inputs), masked(network, mask)
    for training in modes:
        model.zero_grad()
        dense.zero_grad()
        out, own = _called(model.train(training), inputs)
        expected, exact = _called(dense.train(training), [x.double() for x in inputs])
        close(out, expected, "outputs")
        direction = numbers(*out.shape, seed=1)
        out.backward(direction)
        expected.backward(direction.double())
        for number, (x, y) in enumerate(zip(own, exact, strict=True)):
            close(x.grad, y.grad, f"gradient of input {number}")
        same_state(model, dense)
    return model


def _called(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return outputs, and inputs with gradients, for one seed of the random numbers."""
    own = [x.clone().requires_grad_() for x in inputs]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(*own), own


def same_state(model: SparseModel, dense: nn.Module) -> None:
    """Assert that gradients of parameters, and buffers, are those of a masked dense network."""
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    buffers = dict(dense.named_buffers(remove_duplicate=False))
    found = {name: (tensor, kept) for name, tensor, kept in model.mirrored()}
    assert found.keys() == {*parameters, *buffers}
    for name, expected in buffers.items():
        close(found[name][0], expected, name)
    for name, parameter in parameters.items():
        tensor, kept = found[name]
        if tensor.grad is None or parameter.grad is None:
            assert tensor.grad is parameter.grad, name
            continue
        expected = parameter.grad if kept is None else parameter.grad.flatten()[kept.long()]
        close(tensor.grad, expected, f"gradient of {name}", parameter.grad)


def close(
    found: Tensor | None, expected: Tensor | None, what: str, among: Tensor | None = None
) -> None:
    """Assert that no number is off by more than a share of the largest of those expected.

    Args:
        found: in single precision.
        expected: in double precision.
        what: they are.
        among: what the largest is sought among, if not these.
    """
    assert found is not None, what
    assert expected is not None, what
    assert found.shape == expected.shape, what
    if expected.numel() == 0:
        return
    error = float((found.detach().double() - expected.detach()).abs().max())
    largest = float((expected if among is None else among).detach().abs().max())
    assert error <= TOLERANCE * largest, f"{what}: {error} beside {largest}"
