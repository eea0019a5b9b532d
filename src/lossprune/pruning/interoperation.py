"""Masks to and from torch's own ways to hold one: ``nn.utils.prune`` and ``nn.utils.parametrize``.

Both keep the weights θ as another parameter and compute the layer's weight θ ⊙ m from it at every
forward pass, so that an optimizer trains θ, whose removed entries have no gradient.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.matching import made_of, match
from lossprune.pruning.wholeness import check_whole


class MaskParametrization(nn.Module):
    """θ ↦ θ where kept, 0 elsewhere: a parametrisation for ``torch.nn.utils.parametrize``.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> kept = torch.tensor([[True, False]])
    >>> _ = parametrize.register_parametrization(layer, "weight", MaskParametrization(kept))
    >>> (layer.weight != 0).tolist()
    [[True, False]]
    """

    mask: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", kept.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight; not a product, as 0 · NaN is NaN."""
        return torch.where(self.mask, weight, torch.zeros_like(weight))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return ``weight`` itself: all of it is kept as θ."""
        return weight


def read_mask(source: nn.Module | Mapping[str, Tensor]) -> Mask:
    """Read the mask that a network, or the state dict of one, holds in one of torch's ways.

    Those are ``torch.nn.utils.prune`` (by any of its methods, of weights and biases) and
    parametrisations with a buffer named ``mask``: :class:`MaskParametrization`, or torch.ao's.
    Several on one parameter are joined: kept is what all keep.  A weight that layers share counts
    once, under the first of its names; in a state dict where its copies share their memory.

    Raises:
        PruningError: there is no mask; one has other values than 0 and 1; layers that share a
            weight have different masks, or one of them none; or it is offloaded, on the meta
            device or sharded.

    >>> layer = torch_prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=3)
    >>> read_mask(layer)
    Mask(3 of 4 weights removed, 1 parameter)
    """
    tensors: dict[str, Tensor] = (
        dict(source)
        if isinstance(source, Mapping)
        else dict(source.named_parameters(remove_duplicate=False))
        | dict(source.named_buffers(remove_duplicate=False))
    )
    masks = {key: name for key in tensors if (name := _masked_by(key, tensors)) is not None}
    check_whole(source, {key: tensors[key] for key in masks})
    kept: dict[str, Tensor] = {}
    for key, name in masks.items():
        tensor = tensors[key]
        if not ((tensor == 0) | (tensor == 1)).all():
            raise PruningError(f"the mask {key!r} has other values than 0 and 1")
        kept[name] = kept[name] & tensor.bool() if name in kept else tensor.bool().clone()
    if not kept:
        what = "the state dict" if isinstance(source, Mapping) else type(source).__name__
        raise PruningError(
            f"{what} holds no mask: neither by torch.nn.utils.prune nor in a parametrisation"
        )
    return Mask(_once(kept, tensors))


def _masked_by(key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Which parameter this tensor is a mask of, if it is one."""
    if key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in tensors:
        return key.removesuffix("_mask")
    *path, last = key.split(".")
    if last == "mask" and path[-3:-2] == ["parametrizations"]:
        return ".".join([*path[:-3], path[-2]])
    return None


def _once(kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, with that of a weight that layers share under the first of its names alone."""
    originals = {name: next(key for key in made_of(name) if key in tensors) for name in kept}
    first: dict[Hashable, str] = {}
    masks: dict[str, Tensor] = {}
    for name, mask in kept.items():
        shared = first.setdefault(_identity(tensors[originals[name]]), name)
        if not torch.equal(masks.setdefault(shared, mask), mask):
            raise PruningError(f"{shared!r} and {name!r} are one weight, but have different masks")
    for key in tensors.keys() - set(originals.values()):
        if (masked := first.get(_identity(tensors[key]))) is not None:
            raise PruningError(f"{masked!r} and {key!r} are one weight, but only one has a mask")
    return masks


def _identity(tensor: Tensor) -> Hashable:
    """What a parameter and all tensors of a state dict that are it have in common."""
    address = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return (address, tensor.shape, tensor.stride()) if address else id(tensor)


def write_torch_pruning_(model: nn.Module, mask: Mask) -> nn.Module:
    """Hold ``model`` to the mask by ``torch.nn.utils.prune``, in place; return ``model``.

    Every parameter ``name`` becomes ``name_orig``, with a buffer ``name_mask`` beside it, in every
    layer that shares it.  ``torch.nn.utils.prune`` multiplies: a removed weight that is NaN stays.

    torch computes ``name`` when the layer is called, which attention does not do with its output
    projection, nor a network with a layer whose weight alone it reads.  A hook of ``model`` itself
    therefore computes all of them whenever ``model`` is called; :func:`remove_masks_` removes it.

    Raises:
        PruningError: as :meth:`Mask.apply_`.
    """
    for module, attribute, kept in _places(model, mask):
        torch_prune.custom_from_mask(module, attribute, kept)
    if _compute_masked_weights not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_compute_masked_weights)
    return model


def _compute_masked_weights(model: nn.Module, inputs: Any) -> None:
    """Compute every weight that ``torch.nn.utils.prune`` masks, whether its layer is called or not.

    A plain function: copies of the network keep it, and it can be found again to be removed.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                hook(module, inputs)


def write_parametrizations_(model: nn.Module, mask: Mask) -> nn.Module:
    """Hold ``model`` to the mask by ``torch.nn.utils.parametrize``, in place; return ``model``.

    Each layer's ``weight`` is computed by a :class:`MaskParametrization`; the state dict has
    ``parametrizations.weight.original`` and ``parametrizations.weight.0.mask``.

    Raises:
        PruningError: as :meth:`Mask.apply_`.
    """
    for module, attribute, kept in _places(model, mask):
        parametrize.register_parametrization(module, attribute, MaskParametrization(kept))
    return model


def _places(model: nn.Module, mask: Mask) -> list[tuple[nn.Module, str, Tensor]]:
    """Every module and attribute whose parameter is masked, and its mask."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {
        id(parameters[found]): mask[name].to(parameters[found].device)
        for name, found in match(mask, model).items()
    }
    return [
        (module, attribute, kept[id(parameter)])
        for module in list(model.modules())
        for attribute, parameter in list(module.named_parameters(recurse=False))
        if id(parameter) in kept
    ]


def remove_masks_(model: nn.Module) -> nn.Module:
    """Make what :func:`read_mask` reads permanent, in place; return ``model``.

    Every masked parameter is an ordinary one again, the very same that an optimizer holds, and
    exactly 0 where it is removed.  torch puts it behind the other parameters of its layer.

    Raises:
        PruningError: there is no mask; a parameter has other parametrisations beside it; or it is
            offloaded, on the meta device or sharded.
    """
    mask = read_mask(model)
    originals = {original for name in mask for original in made_of(name)}
    parameters = model.named_parameters(remove_duplicate=False)
    check_whole(model, {name: tensor for name, tensor in parameters if name in originals})
    masked = list(_masked_modules(model))
    for module, attribute in masked:
        if torch_prune.is_pruned(module) and hasattr(module, f"{attribute}_orig"):
            torch_prune.remove(module, attribute)
        else:
            parametrize.remove_parametrizations(module, attribute)
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is _compute_masked_weights:
            del model._forward_pre_hooks[number]
    return mask.apply_(model)


def _masked_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for name, _ in module.named_buffers(recurse=False):
            attribute = name.removesuffix("_mask")
            if name.endswith("_mask") and hasattr(module, f"{attribute}_orig"):
                yield module, attribute
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for attribute, chain in chains.items():
            masks = [step for step in chain if "mask" in dict(step.named_buffers(recurse=False))]
            if masks and len(masks) < len(chain):
                raise PruningError(
                    f"{type(module).__name__}.{attribute} has parametrisations beside its mask; "
                    "remove those first"
                )
            if masks:
                yield module, attribute
