"""An oracle for losses of any outputs: automatic differentiation, one example at a time."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev


def _oracle(model, examples, loss, names, count):
    """Sums of ℓ, ∂ℓ/∂θ and diag(Jᵀ H J) over the examples, each divided by ``count``.

    ``examples`` are (args, kwargs, target) of one example each; ``loss(outputs, target)`` takes
    the outputs of one, and the outputs are ``model(*args, **kwargs)``, or their ``logits``.
    """
    model = copy.deepcopy(model).double().eval()
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: fixed[name] for name in names}
    total = 0.0
    slopes = {name: torch.zeros_like(p) for name, p in weights.items()}
    squares = {name: torch.zeros_like(p) for name, p in weights.items()}
    for args, kwargs, target in examples:

        def outputs(values, args=args, kwargs=kwargs):
            found = functional_call(model, {**fixed, **values}, args, kwargs)
            return getattr(found, "logits", found)[0]

        def flat(z, shape, target=target):
            return loss(z.reshape(shape), target)

        z = outputs(weights)
        total += float(loss(z, target).detach())
        h = hessian(lambda v, s=z.shape: flat(v, s))(z.reshape(-1))
        slope = grad(lambda values, f=outputs, t=target: loss(f(values), t))(weights)
        jacobian = jacrev(outputs)(weights)
        for name, p in weights.items():
            j = jacobian[name].reshape(z.numel(), -1)
            slopes[name] += slope[name]
            squares[name] += torch.einsum("ci,cd,di->i", j, h, j).view_as(p)
    return (
        total / count,
        {name: part / count for name, part in slopes.items()},
        {name: part / count for name, part in squares.items()},
    )


@pytest.fixture(scope="session")
def matches():
    """Assert that statistics are those of the oracle, to a relative tolerance of each tensor."""

    def check(statistics, model, examples, loss, count, tolerance=1e-9):
        names = list(statistics.ggn_diagonal)
        value, slopes, squares = _oracle(model, examples, loss, names, count)
        assert statistics.loss == pytest.approx(value, rel=tolerance)
        for ours, theirs in ((statistics.gradient, slopes), (statistics.ggn_diagonal, squares)):
            for name in names:
                error = (ours[name].double() - theirs[name]).abs().max()
                assert theirs[name].abs().max() > 0, name
                assert error <= tolerance * theirs[name].abs().max(), name

    return check
