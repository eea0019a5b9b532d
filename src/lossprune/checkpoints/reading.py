"""A folder of ``save_pretrained``: its configuration, and its tensors, read when needed."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lossprune.json_text import parse_json
from lossprune.pruning.names import listed

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """What is in a folder; tensors stay in their files until they are asked for.

    Attributes:
        folder: where it is.
        files: the file of each tensor, by the tensor's name.

    Raises:
        ValueError: the folder has no configuration, or no safetensors that can be read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} has no {CONFIG}: give a folder of save_pretrained")
        names = [SINGLE]
        if (folder / INDEX).is_file():
            names = _files_of(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} has no {listed(missing, 3)}: only safetensors are read, which "
                "save_pretrained writes"
            )
        self.files: dict[str, Path] = {}
        for name in names:
            try:
                with safe_open(folder / name, "pt") as file:
                    self.files |= dict.fromkeys(file.keys(), folder / name)
            except SafetensorError as error:
                raise ValueError(f"{folder / name} is not readable: {error}") from None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors, in memory of their own."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found = {}
        with ExitStack() as stack:
            for path, inside in by_file.items():
                file = stack.enter_context(safe_open(path, "pt"))
                found |= {name: file.get_tensor(name).clone() for name in inside}
        return found

    def network(self) -> nn.Module:
        """Return the network of the configuration, its parameters without values.

        Raises:
            ValueError: ``transformers`` is not installed, or has no such network.
        """
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "a folder of save_pretrained is read by transformers: pip install transformers"
            ) from None
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        name = (config.architectures or [""])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise ValueError(
                f"{self.folder / CONFIG} is of {name or 'no architecture'}, which transformers "
                f"{transformers.__version__} does not have"
            )
        with _EmptyWithoutValues():
            network = kind(config).eval()
        buffers = dict(network.named_buffers())
        for buffer, value in self.read(buffers.keys() & self.files.keys()).items():
            buffers[buffer].copy_(value)
        if lacking := [repr(buffer) for buffer, value in buffers.items() if value.is_meta]:
            raise ValueError(f"{self.folder} lacks {listed(lacking, 3)} of {name}")
        return network

    def keys_of(self, network: nn.Module) -> dict[str, str]:
        """Return the name in the files of each parameter of the network, tied ones under one name.

        Raises:
            ValueError: the files lack a parameter.
        """
        prefix = f"{getattr(network, 'base_model_prefix', '')}."
        names: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        found, missing = {}, []
        for name, parameter in network.named_parameters():
            spelt = [
                spelling
                for other in names[id(parameter)]
                for spelling in (other, prefix + other, other.removeprefix(prefix))
                if spelling in self.files
            ]
            if spelt:
                found[name] = spelt[0]
            else:
                missing.append(repr(name))
        if missing:
            raise ValueError(
                f"{self.folder} lacks {listed(missing, 3)} of {type(network).__name__}"
            )
        return found


class _EmptyWithoutValues(TorchFunctionMode):
    """While entered, what is made empty, as the parameters of layers are, takes no memory.

    What is computed, as positions in buffers that no file has, is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def put_(network: nn.Module, values: dict[str, Tensor]) -> None:
    """Give parameters of the network these values, by the names that it gives them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    fresh = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    for module in network.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and (name := names[id(parameter)]) in fresh:
                module._parameters[attribute] = fresh[name]


def _files_of(index: Path) -> list[str]:
    """The files that an index names, none of them elsewhere."""
    read = parse_json(index.read_text(encoding="utf-8"))
    places = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    ):
        raise ValueError(f"{index} has no weight_map of files beside it")
    return sorted(set(places.values()))
