"""What the tests of the library share: an oracle for the statistics, and one thread."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

LossFunction = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.logsumexp(logits, 0) - logits[target]


def _by_autograd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: LossFunction = cross_entropy,
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradient and diag(Jᵀ H J), in double precision, by automatic differentiation alone.

    One example at a time: J is the Jacobian of its outputs in every parameter, H the Hessian of
    its loss in the outputs.
    """
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name, kept in (mask or {}).items():
        parameters[name] = parameters[name] * kept
    total = 0.0
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    diagonal = {name: torch.zeros_like(p) for name, p in parameters.items()}
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    for example, target in zip(inputs, targets, strict=True):

        def outputs(values, example=example):
            return functional_call(model, values, (example[None].clone(),))[0]

        def value(values, outputs=outputs, target=target):
            return loss(outputs(values), target)

        logits = outputs(parameters)
        total += float(loss(logits, target))
        curvature = hessian(loss)(logits, target)
        slope = grad(value)(parameters)
        jacobian = jacrev(outputs)(parameters)
        for name, p in parameters.items():
            j = jacobian[name].reshape(len(logits), -1)
            gradient[name] += slope[name]
            diagonal[name] += torch.einsum("ci,cd,di->i", j, curvature, j).view_as(p)
    n = len(inputs)
    return (
        total / n,
        {name: part / n for name, part in gradient.items()},
        {name: part / n for name, part in diagonal.items()},
    )


@pytest.fixture(scope="session")
def by_autograd():
    return _by_autograd


@pytest.fixture(scope="session")
def agrees():
    """Assert that statistics are those of the oracle, to a relative tolerance of each tensor."""

    def check(statistics, model, inputs, targets, *, tolerance=1e-10, **settings):
        loss, gradient, diagonal = _by_autograd(model, inputs, targets, **settings)
        assert statistics.examples == len(inputs)
        assert statistics.loss == pytest.approx(loss, rel=tolerance)
        assert statistics.gradient.keys() == statistics.ggn_diagonal.keys()
        for ours, theirs in (
            (statistics.gradient, gradient),
            (statistics.ggn_diagonal, diagonal),
        ):
            for name, tensor in ours.items():
                expected = theirs[name]
                assert tensor.shape == expected.shape
                if ours is statistics.ggn_diagonal and (mask := settings.get("mask")):
                    # Removed weights need not be measured.
                    expected = torch.where(~mask[name] & (tensor == 0), 0.0, expected)
                error = (tensor.double() - expected).abs().max()
                assert error <= tolerance * expected.abs().max(), name

    return check
