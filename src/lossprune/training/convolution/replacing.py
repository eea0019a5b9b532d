"""A copy of a network whose pruned layers hold their kept weights alone."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lossprune.channels.calls import Call
from lossprune.channels.costs import inputs_of, weighted_layers
from lossprune.channels.nodes import changed
from lossprune.torch_state import in_mode
from lossprune.training.convolution.layers import (
    BLOCK_NORMS,
    Scattered,
    SparseLayer,
    convolution_of,
    over_blocks,
    settings_of,
)
from lossprune.training.convolution.structure import dense_is_faster


def replaced(
    network: nn.Module, kept: Mapping[str, Tensor], call: Call, notes: list[str]
) -> nn.Module:
    """Return a copy of ``network`` with its pruned layers replaced.

    Args:
        network: any.
        kept: what is kept of a parameter, by all its names.
        call: as the network is called.
        notes: to which is added what torch computes, and why.
    """
    return _Replacing(kept, _faster_dense(network, kept, call), notes).of(network)


class _Replacing:
    def __init__(
        self, kept: Mapping[str, Tensor], dense: Mapping[str, str], notes: list[str]
    ) -> None:
        self._kept, self._dense, self._notes = kept, dense, notes
        self._values: dict[Tensor, nn.Parameter] = {}  # by the parameter, which layers may share

    def of(self, network: nn.Module) -> nn.Module:
        whole = copy.deepcopy(network).train()
        done: dict[nn.Module, nn.Module] = {}
        for path, module in list(whole.named_modules(remove_duplicate=False)):
            prefix = f"{path}." if path else ""
            own = [name for name in module._parameters if f"{prefix}{name}" in self._kept]
            new = done.get(module)
            if new is None and own:
                new = self._layer(module, path, {n: self._kept[f"{prefix}{n}"] for n in own})
            elif new is None and type(module) in BLOCK_NORMS and not changed(module):
                new = over_blocks(module)
            if new is not None:
                done[module] = new
            if new is not None and new is not module:
                whole = _put(whole, path, new)
        return whole

    def _layer(self, module: nn.Module, path: str, masks: Mapping[str, Tensor]) -> nn.Module:
        """A sparse layer, or the module itself with its weights made of the kept ones."""
        why = _unfit(module, list(masks)) or self._dense.get(path)
        values = {name: self._kept_of(module._parameters[name], masks[name]) for name in masks}
        if why is None:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            return SparseLayer(module, masks["weight"], values["weight"])
        self._notes.append(f"{path or type(module).__name__} runs as torch runs it: {why}")
        for name, mask in masks.items():
            # Torch would change the parameter itself, which another layer may share.
            module.register_parameter(name, nn.Parameter(module.get_parameter(name).clone()))
            parametrize.register_parametrization(module, name, Scattered(mask), unsafe=True)
            module.get_submodule(f"parametrizations.{name}").original = values[name]
        return module

    def _kept_of(self, weight: Tensor | None, mask: Tensor) -> nn.Parameter:
        assert weight is not None
        if weight not in self._values:
            values = weight.detach().flatten()[mask.flatten()]
            self._values[weight] = nn.Parameter(values, weight.requires_grad)
        return self._values[weight]


def _faster_dense(network: nn.Module, kept: Mapping[str, Tensor], call: Call) -> dict[str, str]:
    """Return which layers torch computes faster, by name, and why."""
    layers = {n: m for n, m in weighted_layers(network).items() if f"{n}.weight" in kept}
    with in_mode(network, training=False):
        seen = inputs_of(network, call, list(layers.values()))
    found = {}
    for name, layer in layers.items():
        if layer not in seen or _unfit(layer, ["weight"]):
            continue
        (x,) = seen[layer].inputs or (None,)
        linear, settings = settings_of(layer)
        if isinstance(x, Tensor) and x.dim() == (2 if linear else 4):
            channels, height, width = (*x.shape[1:], 1, 1)[:3]
            weight = kept[f"{name}.weight"]
            done = convolution_of(weight.shape, (channels, height, width), settings)
            left = int(weight.sum())
            if dense_is_faster(done, left):
                found[name] = f"{left / weight.numel():.0%} of its weights are kept"
    return found


def _unfit(module: nn.Module, own: Sequence[str]) -> str | None:
    """Why a module is none that the kernels compute; None: it is."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(module).__name__}"
    if own != ["weight"]:
        return f"its {' and '.join(own)} are pruned"
    if hooked_backwards(module):
        return "it has hooks"
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return f"its padding is {module.padding!r}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"its padding is of {module.padding_mode!r}"
    return changed(module)


def hooked_backwards(module: nn.Module) -> bool:
    """Whether a module's gradients are seen or changed by hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _put(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
    return root
