"""Which parameters pruning may touch."""

from collections.abc import Mapping

from torch import Tensor, nn

from lossprune.pruning.errors import PruningError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear and convolution layers of ``model``, by parameter name.

    Never biases, never normalisation parameters.  A weight that several layers share appears once,
    under the name that ``model.named_parameters()`` gives it.

    Raises:
        PruningError: the network has no such layer; a layer is not initialised yet; or its weight
            is computed from other parameters (a parametrisation, spectral norm, torch's own
            pruning), so that removing an entry of it would not last.

    >>> from torch import nn
    >>> list(prunable_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))))
    ['0.weight', '2.weight']
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        name = f"{layer_name}.weight" if layer_name else "weight"
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise PruningError(
                f"{name!r} is not initialised yet: run the network once on a batch before pruning"
            )
        if id(layer.weight) not in names:
            raise PruningError(
                f"{name!r} is computed from other parameters: make it an ordinary parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations or prune.remove)"
            )
        weights[names[id(layer.weight)]] = layer.weight
    if not weights:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise PruningError(
            f"{type(model).__name__} has nothing to prune: none of its layers is a {kinds}"
        )
    return weights


def check_mask(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a ``ValueError`` unless ``mask`` has exactly the names and shapes of ``weights``."""
    for name in [*weights, *mask]:
        if name not in mask or name not in weights:
            raise ValueError(
                f"{what} must be a mask of this network's prunable weights: "
                + (f"it lacks {name!r}" if name in weights else f"{name!r} is none of them")
            )
        if mask[name].shape != weights[name].shape:
            raise ValueError(
                f"{what} has shape {tuple(mask[name].shape)} for {name!r}, "
                f"the weight {tuple(weights[name].shape)}"
            )
