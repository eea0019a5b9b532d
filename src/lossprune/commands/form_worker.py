"""The forms of the network that ``lossprune deploy`` compares with other engines, in a process.

``python -m lossprune.commands.form_worker FOLDER THREADS`` reads what ``deploy`` was asked in
``FOLDER/request.json``, and answers as ``lossprune.deployment.engines.worker`` does; the name of
a network is that of the form, a colon and the batch size.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lossprune
from lossprune.channels.compaction import compact
from lossprune.commands.deployable import Deployable, deployable
from lossprune.deployment.engines.worker import Run, only_answers, serve
from lossprune.deployment.fastest import deploy
from lossprune.deployment.sparse_file import load_sparse
from lossprune.user_code import blaming_users_code

REQUEST = "request.json"


def main() -> None:
    """Serve all forms."""
    answers = only_answers()
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    asked = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    places = (Path(asked["run"]), Path(asked["data_path"]), asked["mirror"], asked["data"])
    with blaming_users_code(), deployable(*places) as source:
        load_sparse(asked["network"], source.masked)

        def problem(name: str) -> tuple[Callable[[], Run], None]:
            form, _, batch = name.partition(":")
            call = source.inputs(int(batch))
            make = FORMS[form]

            def prepare() -> Run:
                network = make(source, call.example, asked["remeasure"])
                return lambda: network(*call.inputs, **call.named)

            return prepare, None

        serve(problem, threads, lossprune.__version__, answers)


def _dense(source: Deployable, example: Any, remeasure: bool) -> nn.Module:
    return copy.deepcopy(source.dense)  # so that its memory counts


def _masked(source: Deployable, example: Any, remeasure: bool) -> nn.Module:
    return copy.deepcopy(source.masked)


def _compacted(source: Deployable, example: Any, remeasure: bool) -> nn.Module:
    return compact(source.masked, source.mask, example).model


def _deployed(source: Deployable, example: Any, remeasure: bool) -> nn.Module:
    return deploy(source.masked, source.mask, example, remeasure=remeasure)


FORMS = {
    "dense": _dense,
    "masked": _masked,
    "compacted": _compacted,
    "deployed": _deployed,
}

if __name__ == "__main__":
    main()
