"""Every public call on a network: right against plain torch, or refused in one sentence."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from lossprune import Mask
from lossprune.deployment.onnx import OnnxNetwork
from lossprune.pruning import (
    prunable_weights,
    read_mask,
    remove_masks_,
    write_parametrizations_,
    write_torch_pruning_,
)
from tests.models.architectures import ARCHITECTURES, Architecture
from tests.models.oracle import (
    EXAMPLES,
    LOSSES,
    fresh,
    inputs_of,
    logits_of,
    measured,
    normalise_anew_,
    outputs_of,
    plain,
    targets_of,
    zero_,
)

SPARSITY = 0.5
# Relative to the largest entry, of what is computed in each type.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
LONGEST = 500


class RefusedError(Exception):
    """The library answered with one sentence, and left the network as it was."""


def outcome(architecture: str, call: str, folder: Path) -> str | None:
    """Return None where the call is right on this network, or the sentence that refuses it.

    Raises:
        AssertionError: the result is wrong, or the network is not as it was.
        Exception: whatever else the call raised.
    """
    try:
        CALLS[call](architecture, folder)
    except RefusedError as refusal:
        return str(refusal)
    return None


@contextmanager
def the_library(network: nn.Module, *, in_place: bool = False) -> Iterator[None]:
    """Run one call of the library; the network is as before, or with ``in_place`` if it refuses."""
    before, random = snapshot(network), torch.get_rng_state()
    try:
        yield
    except (lossprune.PruningError, ValueError) as error:
        assert_same(snapshot(network), before)
        sentence = str(error)
        assert "\n" not in sentence
        assert 0 < len(sentence) < LONGEST
        raise RefusedError(sentence) from error
    if not in_place:
        assert_same(snapshot(network), before)
    assert torch.equal(torch.get_rng_state(), random)


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Everything of a network that a call must leave alone, by what it is."""
    modules = dict(network.named_modules(remove_duplicate=False))
    return {
        "parameters": dict(network.named_parameters(remove_duplicate=False)),
        "buffers": dict(network.named_buffers(remove_duplicate=False)),
        "values": {
            f"{name}.{key}": _copy(tensor)
            for name, module in modules.items()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        },
        "gradients": {
            name: _copy(p.grad) for name, p in network.named_parameters() if p.grad is not None
        },
        "requires_grad": {name: p.requires_grad for name, p in network.named_parameters()},
        "modes": {name: module.training for name, module in modules.items()},
        "kinds": {name: type(module) for name, module in modules.items()},
        "hooks": {
            f"{name}.{key}": list(value.items())
            for name, module in modules.items()
            for key, value in vars(module).items()
            if "_hooks" in key and isinstance(value, dict)
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


def _copy(tensor: Tensor) -> Tensor | None:
    """Return the values, where there are any."""
    if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return None
    return tensor.detach().clone()


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    for what, expected in before.items():
        assert now[what].keys() == expected.keys(), what
        for name, value in expected.items():
            other = now[what][name]
            if what in ("values", "gradients") and value is not None:
                same = torch.equal(other, value)
            elif isinstance(value, Tensor):
                same = other is value
            else:
                same = other == value
            assert same, f"{what} of {name}"


def assert_close(given: list[Tensor], expected: list[Tensor]) -> None:
    assert len(given) == len(expected)
    for ours, theirs in zip(given, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        scale = max(1.0, float(theirs.abs().max()))
        tolerance = TOLERANCES.get(theirs.dtype, 0.0)
        assert float((ours - theirs).abs().max()) <= tolerance * scale


# What the calls are made with.


def network_of(architecture: Architecture) -> nn.Module:
    """Return a network that has gradients."""
    network = fresh(architecture)
    for p in network.parameters():
        if p.requires_grad and _copy(p) is not None:
            p.grad = torch.full_like(p, 7.0)
    return network


def mask_of(architecture: Architecture) -> Mask:
    """Return a mask of half the weights and a first row, for a network that may not be pruned."""
    network = fresh(architecture)
    try:
        names = list(prunable_weights(network, **architecture.chosen))
    except lossprune.PruningError:
        names = [name for name, _ in network.named_parameters() if name.endswith("weight")]
    generator = torch.Generator().manual_seed(2)
    kept = {}
    for name in names:
        weight = network.get_parameter(name)
        lacks_shape = isinstance(weight, nn.parameter.UninitializedTensorMixin)
        shape = (9, 8) if lacks_shape else weight.shape
        if len(shape) > 1:
            kept[name] = torch.rand(shape, generator=generator) > SPARSITY
            kept[name][0] = False
    return Mask(kept)


def expected_of(architecture: Architecture, mask: Mask, inputs: tuple[Any, ...]) -> list[Tensor]:
    return outputs_of(zero_(fresh(architecture), mask), inputs)


def data_of(architecture: Architecture) -> dict[str, Any]:
    """Return the arguments with which a network is measured: pairs, or a forward of one's own."""
    inputs, targets = inputs_of(architecture), targets_of(architecture)
    common = {"loss": architecture.loss, **architecture.chosen}
    if len(inputs) == 1 and isinstance(inputs[0], Tensor) and architecture.logits is None:
        return {"batches": [(inputs[0][:4], targets[:4]), (inputs[0][4:], targets[4:])], **common}

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return logits_of(architecture, model(*batch[0])), batch[1]

    return {"batches": [(inputs, targets)], "forward": forward, **common}


# The calls.


def prune(criterion: str, name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, arguments = network_of(architecture), data_of(architecture)
    data = arguments.pop("batches")
    stages = 2 if criterion == "SynFlow" else 1
    with the_library(network):
        mask = lossprune.prune(
            network, criterion, sparsity=SPARSITY, data=data, stages=stages, reg=0, **arguments
        ).mask
    weights = prunable_weights(network, **architecture.chosen)
    assert {key: kept.shape for key, kept in mask.items()} == {
        key: weight.shape for key, weight in weights.items()
    }
    assert mask.removed == round(SPARSITY * mask.total)
    if criterion in SALIENCIES:
        saliencies = SALIENCIES[criterion](name, list(mask))
        removed = torch.cat([saliencies[key][~kept] for key, kept in mask.items()])
        every = torch.cat([saliency.flatten() for saliency in saliencies.values()])
        least = every.sort().values[: mask.removed]
        dtype = next(iter(weights.values())).dtype
        tolerance = TOLERANCES[dtype] * float(every.abs().max())
        # Which of equal ones goes does not matter: the sorted saliencies must be the least.
        assert float((removed.sort().values - least).abs().max()) <= tolerance


def _magnitude(name: str, keys: list[str]) -> dict[str, Tensor]:
    named = dict(fresh(ARCHITECTURES[name]).named_parameters())
    return {key: named[key].detach().abs().double() ** 2 / 2 for key in keys}


def _linear(name: str, keys: list[str]) -> dict[str, Tensor]:
    of = measured(name)
    return {key: (of.gradient[key] * of.weights[key]).abs() for key in keys}


def _quadratic(name: str, keys: list[str]) -> dict[str, Tensor]:
    of = measured(name)
    return {
        key: (-of.gradient[key] * of.weights[key] + of.ggn_diagonal[key] * of.weights[key] ** 2 / 2)
        .abs()
        for key in keys
    }  # fmt: skip


def _flow(name: str, keys: list[str]) -> dict[str, Tensor]:
    of = measured(name)
    return {key: of.weights[key] * of.hessian_gradient[key] for key in keys}


SALIENCIES: dict[str, Callable[[str, list[str]], dict[str, Tensor]]] = {
    "MP": _magnitude,
    "LM": _linear,
    "QM": _quadratic,
    "GraSP": _flow,
}


def measure(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network = network_of(architecture)
    with the_library(network):
        statistics = lossprune.measure(network, **data_of(architecture))
    oracle = measured(name)
    assert statistics.examples == EXAMPLES
    tolerance = TOLERANCES[next(network.parameters()).dtype]
    assert math.isclose(statistics.loss, oracle.loss, rel_tol=tolerance)
    weights = prunable_weights(network, **architecture.chosen)
    for ours, theirs in (
        (statistics.gradient, oracle.gradient),
        (statistics.ggn_diagonal, oracle.ggn_diagonal),
    ):
        assert ours.keys() == weights.keys()
        largest = max(float(theirs[key].abs().max()) for key in ours)
        for key, tensor in ours.items():
            assert float((tensor - theirs[key]).abs().max()) <= tolerance * largest


def apply(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, inputs = network_of(architecture), mask_of(architecture), inputs_of(architecture)
    before = dict(network.named_parameters(remove_duplicate=False))
    with the_library(network, in_place=True):
        assert mask.apply_(network) is network
    after = dict(network.named_parameters(remove_duplicate=False))
    assert all(after[key] is p for key, p in before.items())
    assert _state_equals(network, zero_(fresh(architecture), mask))
    assert_close(outputs_of(network, inputs), expected_of(architecture, mask, inputs))


def _state_equals(network: nn.Module, other: nn.Module) -> bool:
    one, two = network.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def enforce(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask = network_of(architecture), mask_of(architecture)
    optimizer = _optimizer(network)
    with the_library(network, in_place=True):
        handle = mask.enforce(network, optimizer)
    _train(architecture, network, optimizer)
    other = zero_(fresh(architecture), mask)
    _train(architecture, other, _optimizer(other), lambda: zero_(other, mask))
    assert _state_equals(network, other)
    assert not _state_equals(network, zero_(fresh(architecture), mask))
    handle.remove()


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)


def _train(
    architecture: Architecture,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    after: Callable[[], object] = lambda: None,
    steps: int = 3,
) -> None:
    """Three steps, in training mode as the network was built."""
    inputs, targets = inputs_of(architecture), targets_of(architecture)
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(3)
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = logits_of(architecture, network(*inputs))
            LOSSES[architecture.loss](outputs.float(), targets).backward()
            optimizer.step()
            after()


def write(writer: Callable[[nn.Module, Mask], nn.Module], name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, inputs = network_of(architecture), mask_of(architecture), inputs_of(architecture)
    before = dict(network.named_parameters(remove_duplicate=False))
    modes = [module.training for module in network.modules()]
    with the_library(network, in_place=True):
        writer(network, mask)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    expected = expected_of(architecture, mask, inputs)
    assert_close(outputs_of(network, inputs), expected)
    with the_library(network):
        again = read_mask(network)
    assert _plainly(again) == _plainly(mask)
    other = writer(fresh(architecture, seed=1), mask)
    other.load_state_dict(state)
    assert_close(outputs_of(other, inputs), expected)
    trained = writer(fresh(architecture), mask)
    _train(architecture, trained, _optimizer(trained))
    assert_close(outputs_of(network, inputs), expected)
    for module, mode in zip(network.modules(), modes, strict=False):
        module.training = mode
    with the_library(network, in_place=True):
        remove_masks_(network)
    after = dict(network.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[key] is p for key, p in before.items())
    state = network.state_dict()
    for key, tensor in zero_(fresh(architecture), mask).state_dict().items():
        assert torch.equal(state[key], tensor)


def _plainly(mask: Mask) -> dict[str, list[Any]]:
    return {plain(name): kept.tolist() for name, kept in mask.items()}


def recalibrate(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, data = network_of(architecture), data_of(architecture)
    batches, forward = data["batches"], data.get("forward")
    before = snapshot(network)
    with the_library(network, in_place=True):
        assert lossprune.recalibrate(network, batches, forward=forward) is network
    after = snapshot(network)
    for values in (before["values"], after["values"]):
        for key in [key for key in values if ".running_" in key]:
            del values[key]
    assert_same(after, before)
    given = [inputs if forward else (inputs,) for inputs, _ in batches]
    expected = normalise_anew_(fresh(architecture), given).state_dict()
    found = {key: b for key, b in network.state_dict().items() if ".running_" in key}
    assert_close(list(found.values()), [expected[key] for key in found])


def compact(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, inputs = network_of(architecture), mask_of(architecture), inputs_of(architecture)
    with the_library(network):
        compaction = lossprune.compact(network, mask, inputs)
    assert compaction.parameters_after <= compaction.parameters_before
    for given in (inputs, inputs_of(architecture, 3, seed=4)):
        assert_close(outputs_of(compaction.model, given), expected_of(architecture, mask, given))


def deploy(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, inputs = network_of(architecture), mask_of(architecture), inputs_of(architecture)
    example = inputs[0] if len(inputs) == 1 else inputs
    with the_library(network):
        deployed = lossprune.deploy(network, mask, example, seconds=0.001)
    assert not [note for note in deployed.notes if "differs from the masked network" in note]
    for given in (inputs, inputs_of(architecture, 3, seed=4)):
        assert_close(outputs_of(deployed, given), expected_of(architecture, mask, given))


def sparse(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, inputs = network_of(architecture), mask_of(architecture), inputs_of(architecture)
    with the_library(network):
        model = lossprune.sparse(network, mask, inputs[0] if len(inputs) == 1 else inputs)
    _train(architecture, model, _optimizer(model))
    expected = zero_(fresh(architecture).train(), mask)
    _train(architecture, expected, _optimizer(expected), lambda: zero_(expected, mask))
    assert model.write_back_() is network
    assert_close(list(network.state_dict().values()), list(expected.state_dict().values()))
    for given in (inputs, inputs_of(architecture, 3, seed=4)):
        assert_close(outputs_of(model, given), outputs_of(expected, given))


def save_sparse(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, mask, path = network_of(architecture), mask_of(architecture), folder / "sparse"
    with the_library(network):
        lossprune.save_sparse(network, mask, path)
    other = fresh(architecture, seed=1)
    with the_library(other, in_place=True):
        loaded = lossprune.load_sparse(path, other)
    assert _plainly(loaded) == _plainly(mask)
    assert _state_equals(other, zero_(fresh(architecture), mask))


def export_onnx(name: str, folder: Path) -> None:
    architecture = ARCHITECTURES[name]
    mask, inputs = mask_of(architecture), inputs_of(architecture)
    network, path = zero_(network_of(architecture), mask), folder / "network.onnx"
    example: Any = inputs[0] if len(inputs) == 1 else inputs
    with the_library(network):
        lossprune.export_onnx(network, path, example)
    for given in (inputs, inputs_of(architecture, 3, seed=4)):
        assert_close([OnnxNetwork(path)(*given)], expected_of(architecture, mask, given))


CALLS: dict[str, Callable[[str, Path], None]] = {
    **{
        f"prune {criterion}": partial(prune, criterion)
        for criterion in ("MP", "LM", "QM", "GraSP", "SynFlow")
    },
    "measure": measure,
    "apply_": apply,
    "enforce": enforce,
    "write_torch_pruning_": partial(write, write_torch_pruning_),
    "write_parametrizations_": partial(write, write_parametrizations_),
    "recalibrate": recalibrate,
    "compact": compact,
    "deploy": deploy,
    "sparse": sparse,
    "save_sparse": save_sparse,
    "export_onnx": export_onnx,
}
