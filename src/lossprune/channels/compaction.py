"""Compaction: the network without the units and channels that a mask has cut off."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.channels.analysis import Analysis, analyse
from lossprune.channels.calls import (
    Call,
    TooManyCallsError,
    differing,
    possible_fixed,
    same_outputs,
    usual_fixed,
)
from lossprune.channels.connectivity import (
    Connectivity,
    LayerConnectivity,
    connectivity_of,
    grouped,
)
from lossprune.channels.costs import multiply_adds
from lossprune.channels.slicing import slice_
from lossprune.channels.tracing import UntraceableError, apart, trace
from lossprune.pruning.mask import Mask
from lossprune.pruning.matching import match
from lossprune.pruning.names import listed
from lossprune.pruning.wholeness import check_whole, unwrapped


@dataclass(frozen=True)
class Compaction:
    """A network made smaller, and what was left of it.

    Attributes:
        model: of the same class, with layers of the same names, in evaluation mode; removed
            weights are exactly 0.
        mask: of ``model``'s weights, by the same parameter names.
        layers: what the mask cut off, layer by layer, counted in the network before.
        nominal_sparsity: the fraction of the prunable weights that the mask removes.
        effective_sparsity: the fraction that is removed or on no path from input to output.
        left_dense: why a layer could not be made smaller, by its name.
        parameters_before: numbers in all parameters of the network as it was.
        parameters_after: numbers in all parameters of ``model``, zeros included.
        multiply_adds_before: of linear and convolution layers as dense ones, for one batch
            ``example``; None where none was given.
        multiply_adds_after: the same for ``model``.
    """

    model: nn.Module
    mask: Mask
    layers: tuple[LayerConnectivity, ...]
    nominal_sparsity: float
    effective_sparsity: float
    left_dense: dict[str, str]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int | None = None
    multiply_adds_after: int | None = None

    @property
    def notes(self) -> list[str]:
        """What ``left_dense`` says, with the layers of each reason together."""
        return grouped(self.left_dense, "all channels are kept, with the same outputs,")

    def __repr__(self) -> str:
        parts = [
            type(self.model).__name__,
            f"{self.parameters_after:,} of {self.parameters_before:,} parameters left",
        ]
        if self.multiply_adds_after is not None:
            parts.append(
                f"{self.multiply_adds_after:,} of {self.multiply_adds_before:,} multiply-adds"
            )
        parts.append(f"effective sparsity {self.effective_sparsity:.5g}")
        if self.left_dense:
            parts.append(f"{len(self.left_dense)} layers left dense")
        return f"Compaction({', '.join(parts)})"


def compact(model: nn.Module, mask: Mapping[str, Tensor], example: Any = None) -> Compaction:
    """Remove every unit and channel of ``model`` that ``mask`` cuts off from input or output.

    A unit whose inputs are all cut off holds a constant, which goes through activations, batch
    norm, sums, pooling and flatten into the bias of the layers that read it.  Where a convolution
    pads with zeros that would be wrong at the border; one constant channel then stays and stands
    for all others (``slicing.py``).  Channels that a residual sum adds stay or go together.  A
    layer that would lose all its channels keeps one.

    The outputs equal those of the masked network in evaluation mode to rounding.

    Args:
        model: left unchanged.  The first dimension of its inputs is the batch.
        mask: which weights are kept, by parameter name; a weight it does not name is kept.
        example: a batch of inputs, a tuple of the network's arguments or a dict of them by name;
            to count multiply-adds, and to compare the two networks' outputs.

    Raises:
        PruningError: the mask names a parameter that the model lacks or has in another shape; or
            the model does not take such an ``example``.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> mask = Mask.dense(model)
    >>> mask["0.weight"][1:3] = False  # two hidden units lose all inputs
    >>> compaction = compact(model, Mask(mask))
    >>> compaction.model
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): Tanh()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    >>> compaction.nominal_sparsity, compaction.effective_sparsity
    (0.3, 0.5)
    """
    masked, mask = masked_copy(model, mask)
    small, left, found = cut_copy(masked, mask, example)
    if (
        small is not masked
        and example is not None
        and (reason := _difference(small, masked, example))
    ):
        small, left, found = masked, mask, found.with_reason(reason)
    costs = (None, None)
    if example is not None:
        costs = multiply_adds(masked, example), multiply_adds(small, example)
    return Compaction(
        small,
        left,
        found.layers,
        found.nominal_sparsity,
        found.effective_sparsity,
        found.left_dense,
        _count(masked),
        _count(small),
        *costs,
    )


def cut_copy(
    masked: nn.Module, mask: Mask, example: Any = None
) -> tuple[nn.Module, Mask, Connectivity]:
    """Return the network of :func:`compact`, the mask of what is left, and what was cut off.

    The network is ``masked`` itself where nothing may be cut; what it gives on ``example`` is not
    compared.
    """
    found, analysis = connectivity_of(masked, mask, usual_fixed(masked, example))
    if analysis is None:
        return masked, mask, found
    cut = copy.deepcopy(masked)
    kept = slice_(cut, analysis)
    if reason := _doubt(cut, analysis, masked, mask, example):
        return masked, mask, found.with_reason(reason)
    return cut, _mask(mask, kept, cut), found


def count_live(model: nn.Module, mask: Mapping[str, Tensor]) -> Connectivity:
    """Count which weights and units of ``model`` are left on a path from input to output.

    The analysis of :func:`compact` alone; arguments and errors are the same.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> mask = Mask.dense(model)
    >>> mask["2.weight"][:, 0] = False  # nothing reads the first hidden unit
    >>> for layer in count_live(model, Mask(mask)).layers:
    ...     print(layer.name, layer.kept, layer.live, layer.units, layer.dead_units)
    0.weight 12 9 4 1
    2.weight 6 6 2 0
    """
    masked, mask = masked_copy(model, mask)
    return connectivity_of(masked, mask, usual_fixed(masked))[0]


def _doubt(
    cut: nn.Module, analysis: Analysis, masked: nn.Module, mask: Mask, example: Any
) -> str | None:
    """Why ``cut`` may not do what ``masked`` does, however that is called; None: it does."""
    try:
        usual, *others = possible_fixed(masked, example)
    except TooManyCallsError as error:
        return str(error)
    changes = "the network's code computes with the sizes of its layers"
    try:
        if not trace(cut, usual).same(analysis.trace):
            return changes
        for other in others:
            elsewhere, again = analyse(masked, mask, other), copy.deepcopy(masked)
            slice_(again, elsewhere)
            if not _equal(again, cut):
                names = listed(map(repr, differing(usual, other)))
                return f"what the network computes depends on the argument {names}"
            if not trace(again, other).same(elsewhere.trace):
                return changes
    except UntraceableError as error:
        return str(error)
    return None


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of the same code have the same numbers."""
    tensors, others = (
        {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for network in (one, other)
    )
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


@torch.no_grad()
def _difference(cut: nn.Module, masked: nn.Module, example: Any) -> str | None:
    """How ``cut`` differs from ``masked`` on ``example``; None: not beyond rounding."""
    call = Call.of(example)
    expected = call(apart(masked))
    try:
        outputs = call(apart(cut))
    except Exception as error:  # whatever the network's own code raises on other sizes
        said = " ".join(str(error).split()) or type(error).__name__
        return f"without these channels it fails on the example: {said}"
    same = same_outputs(outputs, expected)
    return None if same else "without these channels its outputs on the example are others"


def masked_copy(model: nn.Module, mask: Mapping[str, Tensor]) -> tuple[nn.Module, Mask]:
    """Return a masked copy in evaluation mode, and the mask by its parameters' names.

    They may differ from the mask's by what wrappers such as ``torch.compile`` put before them.
    """
    check_whole(model)
    model = unwrapped(model)
    mask = mask if isinstance(mask, Mask) else Mask(mask)
    found = match(mask, model)  # before the copy, which a network that holds masks may not allow
    masked = mask.apply_(copy.deepcopy(model, _computed(model))).eval()
    named = {found[name]: kept for name, kept in mask.items()}
    return masked, Mask(named, criterion=mask.criterion)


def _computed(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by identity, of tensors that hooks left in layers and that deepcopy refuses.

    ``torch.nn.utils.weight_norm`` computes the weight before each call and keeps it with its graph.
    """
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _mask(mask: Mask, kept: Mapping[str, Tensor], small: nn.Module) -> Mask:
    """The mask of the weights of ``small`` among the parameters that ``mask`` names."""
    parameters = dict(small.named_parameters(remove_duplicate=False))
    masks = {name: kept.get(name, old).to(old.device) for name, old in mask.items()}
    return Mask(
        {name: new for name, new in masks.items() if new.shape == parameters[name].shape},
        criterion=mask.criterion,
    )


def _count(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
