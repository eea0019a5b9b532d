import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lossprune.cli import main
from lossprune.experiment import RunConfig
from lossprune.experiment.folder import LOG, MASK, RECORD
from lossprune.experiment.log import log_text
from lossprune.experiment.record import EpochRecord, RunRecord, Scores, Start
from lossprune.pruning import Mask


def scores(loss: float, valid_loss: float, error: float, valid_error: float) -> Scores:
    return Scores(loss, error, valid_loss, valid_error, loss, error)


class Maker:
    """Writes folders of runs with the outcomes that a test asks for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers = itertools.count()

    def run(
        self,
        criterion="QM",
        stages=14,
        reg=0.0,
        seed=1111,
        *,
        loss=1.0,
        valid_loss=None,
        error=0.1,
        valid_error=None,
        before=0.25,
        error_before=0.02,
        epochs=2,
        status="finished",
        start="base/arch=MLP,seed={seed}/best_model.pt",
        folder=None,
        extra=None,
        mask=True,
        **settings,
    ) -> Path:
        """Write one pruning run: training loss after pruning, test error after fine-tuning."""
        config = RunConfig(
            arch="MLP",
            criterion=criterion,
            stages=stages,
            reg=reg,
            seed=seed,
            epochs=epochs,
            exponential=settings.pop("exponential", stages > 1),
            start=Path(start.format(seed=seed)),
            **settings,
        )
        valid_loss = loss if valid_loss is None else valid_loss
        valid_error = error if valid_error is None else valid_error
        end = scores(0.1, 0.1, error, valid_error)
        stage = {
            "stage": 1,
            "sparsity": config.sparsity,
            "removed": 3,
            "loss_before": before,
            "loss_after": loss,
            "predicted_change": None if criterion == "MP" else (loss - before) / 2,
            "realised_change": loss - before,
            "seconds": 0.0,
        }
        if config.compensate:
            change = (loss - before) / 4
            stage["compensation"] = {"predicted_change": change, "loss_without": 2 * loss}
        done = epochs if status == "finished" else epochs // 2
        record = RunRecord(
            config={**config.settings, **(extra or {})},
            environment={"torch": "2.13.0", "device": "cpu"},
            start=Start(str(config.start), "0" * 64, f"{seed:064}"),
            status=status,
            message="epoch 1: the loss is not finite" if status == "diverged" else None,
            before_pruning=EpochRecord(0, scores(before, before, error_before, error_before)),
            after_pruning=EpochRecord(0, scores(loss, valid_loss, 0.5, 0.5)),
            best=EpochRecord(done, end),
            last=EpochRecord(done, end),
            stages=(stage,) * stages,
            removed=3,
            prunable=4,
            epochs=tuple(EpochRecord(n, end, 0.5) for n in range(1, done + 1)),
            seconds=1.0,
        )
        path = self.write(record, folder or config.name)
        if mask:
            Mask({"fc1.weight": torch.tensor([[True, False], [False, False]])}).save(path / MASK)
        return path

    def baseline(self, seed=1111, epochs=4, error=0.02) -> Path:
        config = RunConfig(arch="MLP", prune_epoch=-1, seed=seed, epochs=epochs)
        end = EpochRecord(epochs, scores(0.1, 0.1, error, error))
        record = RunRecord(
            config=config.settings,
            environment={},
            start=Start(None, None, f"{seed:064}"),
            status="finished",
            best=end,
            last=end,
            epochs=tuple(replace(end, epoch=n) for n in range(1, epochs + 1)),
        )
        return self.write(record, config.name)

    def write(self, record: RunRecord, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        (path / RECORD).write_text(record.to_json())
        (path / LOG).write_text(log_text(record))
        return path


@pytest.fixture
def maker(tmp_path) -> Maker:
    return Maker(tmp_path / "made")


@pytest.fixture(scope="session")
def sparsity_results(tmp_path_factory) -> Path:
    """Real results of one network at three sparsities: two seeds on the digits, by a sweep."""
    folder = tmp_path_factory.mktemp("sparsities")
    plan = folder / "plan.toml"
    plan.write_text(SPARSITY_PLAN)
    path = folder / "results"
    assert main(["sweep", str(plan), "--path", str(path), "--workers", "1", "--threads", "1"]) == 0
    return path


SPARSITY_PLAN = """
arch = "MLP"
dataset = "digits"
pr = [0.8, 0.9, 0.95]
pm = ["MP", "QM"]
pi = 1
reg = [0.0, 1e-3]
nepochs = 1
seed = [1111, 1112]

[baseline]
nepochs = 8

[[drop]]
pm = "MP"
reg = 1e-3
"""


@pytest.fixture(scope="session")
def digits_results(tmp_path_factory) -> Path:
    """A folder of real results: two seeds on the digits, by the command line."""
    path = tmp_path_factory.mktemp("real") / "results"
    common = ["run", "--arch", "MLP", "--dataset", "digits", "--device", "cpu", "--threads", "1"]
    common += ["--path", str(path)]
    for seed in ("1111", "1112"):
        assert main([*common, "--seed", seed, "--pe", "-1", "--nepochs", "12"]) == 0
        start = next(path.glob(f"*model_0=None*seed={seed}")) / "best_model.pt"
        prune = [*common, "--seed", seed, "--model_0", str(start), "--nepochs", "2", "--exp"]
        assert main(prune) == 0
        for criterion, stages, reg in itertools.product(("LM", "QM"), ("1", "5"), ("0.0", "1e-3")):
            assert main([*prune, "--pm", criterion, "--pi", stages, "--reg", reg]) == 0
    return path
