"""One run of the published experiment, from its flags to its record.

``RunConfig`` says what to do, ``run`` does it in a folder of its own, ``RunRecord`` is what came of
it.  Only ``run`` needs torch, and it is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lossprune.experiment.config import RunConfig as RunConfig
from lossprune.experiment.folder import FolderBusyError as FolderBusyError
from lossprune.experiment.folder import RunFolder as RunFolder
from lossprune.experiment.record import RunRecord as RunRecord

if TYPE_CHECKING:
    from lossprune.experiment.runner import run as run

__all__ = ["FolderBusyError", "RunConfig", "RunFolder", "RunRecord", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        return import_module("lossprune.experiment.runner").run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
