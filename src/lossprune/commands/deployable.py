"""What can be deployed: the network of a finished run, or one of your own after ``prune``."""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lossprune.channels.calls import Call
from lossprune.channels.costs import inputs_of
from lossprune.commands.evaluation import loss_and_error
from lossprune.commands.output import NETWORK, format_of
from lossprune.commands.pruned_folder import FORMAT as PRUNED
from lossprune.commands.user_data import UsersData, batches_of
from lossprune.commands.user_network import build_network, on_device, users_forward, users_loss
from lossprune.deployment.sparse_file import load_sparse
from lossprune.experiment.config import RunConfig
from lossprune.experiment.environment import environment_of
from lossprune.experiment.folder import BEST, MASK, RECORD, RunFolder
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.experiment.prepare import prepare
from lossprune.experiment.record import RunRecord, RunStatus
from lossprune.flags import declared_flags
from lossprune.json_text import parse_json
from lossprune.pruning import Mask
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.forms import default_forward
from lossprune.torch_state import seeded
from lossprune.training import evaluate


@dataclass(frozen=True)
class Deployable:
    """A pruned network, and what its forms are measured on.

    Attributes:
        title: what the table is of.
        made_from: the settings that it was made with.
        environment: versions and hardware.
        dense: a new network: for its size and times.
        masked: the pruned network.
        mask: of its weights.
        inputs: makes a batch of so many examples.
        accuracy: of a network on the test data; None where there are none.
        before: the accuracy before pruning; None where it is not known.
    """

    title: str
    made_from: Mapping[str, Any]
    environment: Mapping[str, Any]
    dense: nn.Module
    masked: nn.Module
    mask: Mask
    inputs: Callable[[int], Call]
    accuracy: Callable[[nn.Module], float] | None
    before: float | None


@contextlib.contextmanager
def deployable(
    folder: Path, data_path: Path, mirror: str | None, data: str | None
) -> Iterator[Deployable]:
    """Read the folder of a finished run, or the one that ``lossprune prune`` wrote.

    Args:
        folder: of either.
        data_path: the folder of the data sets, for a run.
        mirror: where they are downloaded from, if not from their own places.
        data: the function whose first batch the network of ``lossprune prune`` is timed on, where
            it is another than the record names.

    Raises:
        ValueError, FileNotFoundError: it is neither, or a part of it is missing or does not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    if format_of(folder) == PRUNED:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
        settings = _settings(folder, record, data)
        with seeded(settings["seed"]):
            yield _pruned(folder, settings, data_path, record.get("test"))
    else:
        yield _run(folder, {"data_path": data_path, "mirror": mirror})


def _run(folder: Path, places: Mapping[str, Any]) -> Deployable:
    record = _finished(folder)
    _check_there(folder, BEST, MASK)
    mask = Mask.load(folder / MASK)
    setting = prepare(_config(record, places))
    dense, dataset = setting.network.eval(), setting.dataset
    weights, metadata, _ = read_network(folder / BEST, asked="")
    masked = copy.deepcopy(dense)
    load_weights_(masked, record.config["arch"], folder / BEST, weights, metadata, asked="")

    def inputs(count: int) -> Call:
        images = dataset.test.images
        return Call((dataset.inputs(images[torch.arange(count) % len(images)]),), {})

    before = None  # of a network that was pruned before the run nothing is known
    if record.before_pruning is not None and not record.start.removed:
        before = 1 - record.before_pruning.scores.test_error
    return Deployable(
        f"{record.config['arch']} on {record.config['dataset']}, sparsity {record.sparsity:.5f}",
        dict(record.config),
        dict(setting.environment),
        dense,
        masked,
        mask,
        inputs,
        lambda network: 1 - evaluate(network, dataset, dataset.test).error,
        before,
    )


def _finished(run: Path) -> RunRecord:
    record = RunFolder(run).settled()
    if record is None:
        there = RunFolder(run).record() is not None
        raise ValueError(
            f"the run in {run} is not finished: lossprune run goes on with it"
            if there
            else f"{run} is not the folder of a run or of lossprune prune: it has no {RECORD}"
        )
    if record.status != RunStatus.FINISHED:
        raise ValueError(f"the run in {run} {record.status}: {record.message}")
    if record.after_pruning is None and not record.start.removed:
        raise ValueError(f"the run in {run} did not prune: there is no mask to deploy")
    return record


def _config(record: RunRecord, places: Mapping[str, Any]) -> RunConfig:
    values = {
        flag.field: record.config[name]
        for name, flag in declared_flags(RunConfig).items()
        if name in record.config and flag.field != "start"
    }
    return RunConfig(**values, **places, device="cpu")


_MAYBE = (str, type(None))
_KINDS = {"build": str, "seed": int, "data": _MAYBE, "forward": _MAYBE, "loss": str}


def _settings(folder: Path, record: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """Return the flags of ``lossprune prune`` that deploying needs, as its record tells them."""
    settings = record.get("settings")
    if not isinstance(settings, dict) or not all(
        name in settings and isinstance(settings[name], kind) for name, kind in _KINDS.items()
    ):
        raise ValueError(f"{folder / RECORD} does not tell how lossprune prune was called")
    # Older records do not have all of them.
    settings = {"test": None, "dataset": None, "examples": None, **settings}
    if data is not None:
        settings |= {"data": data}
    if settings["data"] is settings["test"] is settings["dataset"] is None:
        raise ValueError(
            f"{folder} was pruned without data, and a network is deployed for examples of what it "
            "takes: give --data MODULE:FUNCTION, which returns batches"
        )
    return settings


def _pruned(folder: Path, settings: Mapping[str, Any], data_path: Path, scores: Any) -> Deployable:
    _check_there(folder, NETWORK, MASK)
    data = UsersData.of(settings, data_path)
    dense = on_device(build_network(settings["build"], offered=data.offered), "cpu").eval()
    masked = copy.deepcopy(dense)
    mask = load_sparse(folder / NETWORK, masked)
    if mask != Mask.load(folder / MASK):
        raise ValueError(f"{folder / MASK} is not the mask of {folder / NETWORK}")
    call = _first_call(masked, settings, data)
    leaves = tree_leaves((call.inputs, call.named))
    size = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())

    def inputs(count: int) -> Call:
        def taken(tensor: Tensor) -> Tensor:
            whole = tensor.dim() == 0 or len(tensor) != size
            return tensor if whole else tensor[torch.arange(count) % size]

        return Call(*tree_map_only(Tensor, taken, (call.inputs, call.named)))

    return Deployable(
        f"{settings['build']}, {mask.criterion}, sparsity {mask.sparsity:.5f}",
        dict(settings),
        environment_of(torch.device("cpu")),
        dense,
        masked,
        mask,
        inputs,
        *_accuracy(settings, data, scores),
    )


def _accuracy(
    settings: Mapping[str, Any], data: UsersData, scores: Any
) -> tuple[Callable[[nn.Module], float] | None, float | None]:
    """Return what finds a network's accuracy, and what it was before pruning, if that was told."""
    try:
        before = scores["before"]["error"]
    except (TypeError, LookupError):  # it was pruned without --test
        return None, None
    if not isinstance(before, float) or (batches := data.test) is None:
        return None, None
    loss, forward = users_loss(settings["loss"]), users_forward(settings["forward"])

    def accuracy(network: nn.Module) -> float:
        error = loss_and_error(network, batches, loss, forward).error
        return math.nan if error is None else 1 - error

    return accuracy, 1 - before


def _first_call(network: nn.Module, settings: Mapping[str, Any], data: UsersData) -> Call:
    """Return how the network is called for the first batch of the data."""
    forward = users_forward(settings["forward"])
    batches = batches_of(settings["data"], "--data") or data.train or data.test or ()
    batch = next(iter(batches), None)
    named = settings["data"] or settings["dataset"] or settings["test"]
    if batch is None:
        raise ValueError(f"{named} has no batches")
    batch, run = Batch.of(batch, forward).value, forward or default_forward
    with torch.no_grad():
        seen = inputs_of(network, lambda called: run(called, batch), [network])
    call = seen.get(network)
    if call is None or not any(
        isinstance(leaf, Tensor) and leaf.dim() for leaf in tree_leaves((call.inputs, call.named))
    ):
        raise ValueError(f"the network gets no tensor of the batches of {named}")
    if not (call.inputs and call.named):
        return call
    # One example is of either; the names of the first are those of the network's arguments.
    parameters = inspect.signature(network.forward).parameters
    return Call((), {**dict(zip(parameters, call.inputs, strict=False)), **call.named})


def _check_there(folder: Path, *names: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}")
