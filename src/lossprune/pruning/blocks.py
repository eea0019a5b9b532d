"""The blocks of a network, one after the other: what each is given, and what it makes of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.layers import WeightCalls
from lossprune.pruning.curvature.running import described, evaluating, run
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed
from lossprune.pruning.substitution import call_with

_ADVICE = "blocks= names the modules that run one after the other, each on what the last one gave"


@dataclass
class Call:
    """A block's call on a batch: its arguments, of which the first is what the last one gave."""

    states: Tensor
    args: tuple[Any, ...]
    named: Mapping[str, Any]
    first: str | None  # the name of the first one, where it is given by name

    def of(self, states: Tensor, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with these states, on a device."""
        args, named = tree_map(lambda x: _on(x, device), (self.args, dict(self.named)))
        states = states.to(device)
        if self.first is None:
            return (states, *args), named
        return args, {self.first: states, **named}


def find_blocks(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> dict[str, nn.Module]:
    """Return the blocks of ``model`` in their order, by name.

    Args:
        model: the network.
        blocks: the name of the module that lists them, or the modules; if not given, the longest
            list (``nn.ModuleList`` or ``nn.Sequential``) of two or more modules of one type.

    Raises:
        ValueError: there is none, or it is not what ``blocks`` says.

    >>> layer = nn.TransformerEncoderLayer(4, 2)
    >>> list(find_blocks(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), None))
    ['layers.0', 'layers.1', 'layers.2']
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    if blocks is None:
        lists = [
            module
            for module in modules.values()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(module) > 1
            and len({type(part) for part in module}) == 1
            and any(part.children() for part in module)
        ]
        if not lists:
            raise ValueError(
                f"{type(model).__name__} has no list of modules of one type: {_ADVICE}"
            )
        found = list(max(lists, key=len))
    elif isinstance(blocks, str):
        if blocks not in modules:
            raise ValueError(f"blocks={blocks!r} names no module of {type(model).__name__}")
        found = list(modules[blocks].children())
    else:
        found = list(blocks)
    if not found or not all(isinstance(part, nn.Module) and id(part) in names for part in found):
        raise ValueError(f"blocks must be modules of {type(model).__name__}: {_ADVICE}")
    return {names[id(block)]: block for block in found}


@torch.no_grad()
def calls_of(
    model: nn.Module,
    step: Callable[[Any], Any],
    device: torch.device,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
) -> list[dict[str, Call]]:
    """Return, for each batch, how ``model`` calls each block, by the block's name.

    ``step`` calls it on a batch that is on ``device``.

    The network runs once a batch, with no block but the first: the others give what they are given,
    in the form of the first one's answer.  So what a block gets beside its states, masks and
    positions say, is its own.  What the states are, the calls of the first block alone say.

    Raises:
        PruningError: the network cannot be run; a block is not called once, or not on a tensor.
    """
    found = []
    with evaluating(model), _without_caches(model), torch.no_grad():
        for batch in batches:
            seen: dict[str, Call] = {}
            given = batch.to(device).map(torch.clone).value
            with _watched(blocks, seen), WeightCalls({}):
                run(
                    f"the network could not be run on a batch of {described(batch.value)}",
                    lambda given=given: step(given),
                    lambda text: _ADVICE,
                )
            missing = [name for name in blocks if name not in seen]
            if missing:
                raise PruningError(f"the network does not call {listed(missing, 3)}: {_ADVICE}")
            found.append(seen)
    return found


@contextmanager
def _watched(blocks: Mapping[str, nn.Module], seen: dict[str, Call]) -> Iterator[None]:
    """Note how blocks are called; all but the first give what they are given."""
    form: list[Any] = []

    def watch(name: str, block: nn.Module, own: Any) -> Any:
        def forward(*args: Any, **named: Any) -> Any:
            if name in seen:
                raise PruningError(f"the network calls {name!r} more than once: {_ADVICE}")
            seen[name] = call = _call(name, args, named)
            if not form:
                form.append(own(*args, **named))
                states_of(name, form[0], call.states)
                return form[0]
            return _like(form[0], call.states)

        return forward

    with ExitStack() as stack:
        for name, block in blocks.items():
            attributes = vars(block)
            own = block.forward
            if "forward" in attributes:
                stack.callback(attributes.update, forward=own)
            else:
                stack.callback(attributes.pop, "forward")
            attributes["forward"] = watch(name, block, own)
        yield


def _call(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Call:
    if args:
        states, args, first = args[0], args[1:], None
    else:
        first = next(iter(named), None)
        states = named.pop(first) if first is not None else None
    if not isinstance(states, Tensor) or not states.is_floating_point():
        raise PruningError(f"the first argument of {name!r} is no tensor of numbers: {_ADVICE}")
    return Call(states, args, named, first)


def states_of(name: str, answer: Any, given: Tensor) -> Tensor:
    """Return the states in a block's answer: it, or the first of a tuple.

    Raises:
        PruningError: they are not of the shape of what the block was given.
    """
    states = answer[0] if isinstance(answer, (tuple, list)) and answer else answer
    if not isinstance(states, Tensor) or states.shape != given.shape:
        got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise PruningError(
            f"{name!r} gives {got} where it was given {tuple(given.shape)}: {_ADVICE}"
        )
    return states


def _like(form: Any, states: Tensor) -> Any:
    if isinstance(form, (tuple, list)):
        return type(form)((states, *form[1:]))
    return states


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Keep no keys and values for later tokens, as ``transformers`` does unless told."""
    with ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", None) is True:
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
        yield


@torch.no_grad()
def ran(
    name: str,
    block: nn.Module,
    values: Mapping[str, Tensor],
    call: Call,
    states: Tensor,
    watching: WeightCalls,
) -> Tensor:
    """Return what a block with these parameters and buffers, by name, makes of states."""
    device = next(iter(values.values())).device
    args, named = call.of(states, device)
    with evaluating(block), torch.no_grad(), watching:
        named_inside = {f"block.{local}": value for local, value in values.items()}
        answer = call_with(named_inside, _Spread(block), (args, named))
    return states_of(name, answer, states)


class _Spread(nn.Module):
    """A module as one that takes its arguments in one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return self.block(*given[0], **given[1])


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
