import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lossprune.experiment import RunConfig, run
from lossprune.progress import Silent
from lossprune.pruning import Mask
from tests.compilers import hide_compilers

TIMES = {"seconds"}


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def log_without_times(folder: Path) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [line if line.startswith("#") else line.rsplit("\t", 1)[0] for line in lines]


def record_without_times(folder: Path) -> dict:
    return without_times(json.loads((folder / "record.json").read_text()))


def network(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(
        arch="MLP",
        dataset="digits",
        criterion="QM",
        stages=3,
        exponential=True,
        sparsity=0.9,
        examples=200,
        epochs=4,
        prune_epoch=2,
        threads=1,
        path=tmp_path / "results",
    )


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    """A trained network's best_model.pt."""
    path = tmp_path_factory.mktemp("baseline")
    config = RunConfig(arch="MLP", dataset="digits", prune_epoch=-1, epochs=5, threads=1, path=path)
    run(config)
    return config.folder / "best_model.pt"


def test_a_run_leaves_the_published_files_and_nothing_else(config):
    record = run(config)
    assert sorted(path.name for path in config.folder.iterdir()) == [
        "best_model.pt",
        "last_model.pt",
        "log.txt",
        "mask.safetensors",
        "record.json",
    ]
    assert record.status == "finished"
    assert [row.epoch for row in record.epochs] == [1, 2, 3, 4]


@pytest.mark.parametrize("train", ["dense", "sparse"])
def test_the_same_command_twice_gives_the_same_but_for_times(config, tmp_path, train):
    config = replace(config, train=train)
    other = replace(config, path=tmp_path / "again")
    run(config)
    run(other)
    assert log_without_times(config.folder) == log_without_times(other.folder)
    assert record_without_times(config.folder) == record_without_times(other.folder)
    for name in ("best_model.pt", "last_model.pt"):
        assert (config.folder / name).read_bytes() == (other.folder / name).read_bytes()
    mask = Mask.load(config.folder / "mask.safetensors")
    assert mask == Mask.load(other.folder / "mask.safetensors")


def test_another_seed_gives_another_run(config):
    other = replace(config, seed=1112)
    assert run(config).epochs != run(other).epochs


def test_a_finished_run_is_not_touched(config):
    first = run(config)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(config)}
    folder_time = config.folder.stat().st_mtime_ns
    assert run(config) == first
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(config)} == before
    assert config.folder.stat().st_mtime_ns == folder_time


def files(config: RunConfig) -> list[Path]:
    return sorted(config.folder.iterdir())


def test_pruning_takes_the_best_network_so_far_and_starts_anew(config):
    # With a learning rate this high the last epoch before pruning is not always the best.
    config = replace(config, lr=1.0, epochs=7, prune_epoch=6)
    record = run(config)
    dense, pruned = record.epochs[:6], record.epochs[6:]
    best = min(dense, key=lambda row: row.scores.valid_error)
    assert best.epoch != 6, "this test needs a best network that is not the last"
    assert record.before_pruning == best
    assert record.after_pruning is not None
    assert record.after_pruning.epoch == 6
    candidates = [record.after_pruning, *pruned]
    assert record.best == min(candidates, key=lambda row: row.scores.valid_error)


@pytest.mark.parametrize("train", ["dense", "sparse"])
def test_removed_weights_are_exactly_zero_and_exactly_counted(config, train):
    config = replace(config, train=train)
    record = run(config)
    mask = Mask.load(config.folder / "mask.safetensors")
    assert mask.removed == record.removed == round(0.9 * 50_200) == 45_180
    assert record.prunable == 50_200
    for file in ("best_model.pt", "last_model.pt"):
        weights = network(config.folder / file)
        for name, kept in mask.items():
            assert torch.count_nonzero(weights[name][~kept]) == 0
    last = network(config.folder / "last_model.pt")
    assert all(torch.count_nonzero(last[name][kept]) == kept.sum() for name, kept in mask.items())


def test_the_stages_follow_the_schedule_and_are_recorded(config):
    record = run(config)
    r = 1 - 0.1 ** (1 / 3)
    expected = [round((1 - (1 - r) ** i) * 50_200) for i in (1, 2, 3)]
    assert [stage["removed"] for stage in record.stages] == expected
    for stage in record.stages:
        change = stage["loss_after"] - stage["loss_before"]
        assert stage["realised_change"] == pytest.approx(change)
        assert stage["predicted_change"] is not None


def test_pruning_without_fine_tuning(config, baseline):
    config = replace(config, start=baseline, prune_epoch=0, epochs=0)
    record = run(config)
    assert record.epochs == ()
    assert record.best == record.last == record.after_pruning
    best = network(config.folder / "best_model.pt")
    assert same(best, network(config.folder / "last_model.pt"))
    mask = Mask.load(config.folder / "mask.safetensors")
    for name, weight in network(baseline).items():
        kept = mask[name] if name in mask else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(best[name], weight * kept)


def test_a_baseline_never_prunes(config):
    config = replace(config, prune_epoch=-1)
    record = run(config)
    assert record.before_pruning is None
    assert record.after_pruning is None
    assert record.sparsity == 0
    assert not (config.folder / "mask.safetensors").exists()


def test_the_start_network_is_recorded_by_its_sha256(config, baseline):
    record = run(replace(config, start=baseline, prune_epoch=0, epochs=0))
    assert record.start.path == str(baseline)
    assert record.start.sha256 == hashlib.sha256(baseline.read_bytes()).hexdigest()


def test_the_network_file_says_what_it_holds(config):
    run(config)
    file = torch.load(config.folder / "last_model.pt", weights_only=True)
    assert file["metadata"] == {
        "format": "lossprune network 1",
        "architecture": "MLP",
        "dataset": "digits",
        "shape": [1, 8, 8],
        "classes": [str(digit) for digit in range(10)],
        "epoch": 4,
        "sparsity": 0.9,
    }


def test_the_learning_rate_decays_by_epochs_and_starts_anew_after_pruning(config):
    """dec 1e-9 after one epoch freezes the network; pruning sets it free for one epoch again."""
    config = replace(config, decay=1e-9, epochs=5, prune_epoch=2, l2=0.0)
    losses = [row.scores.train_loss for row in run(config).epochs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert abs(losses[2] - losses[0]) > 0.01
    assert losses[3] == pytest.approx(losses[2], abs=1e-4)
    assert losses[4] == pytest.approx(losses[2], abs=1e-4)


def test_the_way_of_training_is_recorded_and_logged(config):
    automatic = run(config)
    dense = run(replace(config, train="dense"))
    assert [(it["from_epoch"], it["mode"]) for it in automatic.training] == [(3, "sparse")]
    assert [(it["from_epoch"], it["mode"]) for it in dense.training] == [(3, "dense")]
    told = f"# training from epoch 3 (n 2): sparse, {automatic.training[0]['reason']}"
    assert told in (config.folder / "log.txt").read_text().splitlines()
    assert run(replace(config, prune_epoch=-1)).training == ()


def test_both_ways_of_training_give_the_same_curve(config):
    """The run before pruning and its stages are equal; after it, figures differ by rounding."""
    sparse, dense = (run(replace(config, train=train)) for train in ("sparse", "dense"))
    assert sparse.removed == dense.removed
    assert sparse.before_pruning is not None
    assert dense.before_pruning is not None
    assert sparse.before_pruning.scores == dense.before_pruning.scores
    assert sparse.after_pruning is not None
    assert dense.after_pruning is not None
    rows = [(sparse.after_pruning, dense.after_pruning)]
    for one, other in [*rows, *zip(sparse.epochs, dense.epochs, strict=True)]:
        assert one.scores.train_loss == pytest.approx(other.scores.train_loss, rel=1e-5)
        assert one.scores.test_loss == pytest.approx(other.scores.test_loss, rel=1e-5)
        assert one.scores.test_error == pytest.approx(other.scores.test_error, abs=1.5 / 250)


def test_a_run_goes_on_in_the_way_that_it_began(config, monkeypatch):
    """Begun where there is no compiler it stays dense where there is one."""

    class Stop(Silent):
        def advance(self, what: str, done: int, total: int, text: str = "") -> None:
            if (what, done) == ("epoch", 3):
                raise KeyboardInterrupt

    with monkeypatch.context() as machine:
        hide_compilers(machine)
        with pytest.raises(KeyboardInterrupt):
            run(config, Stop())
    record = run(config)
    assert [it["mode"] for it in record.training] == ["dense"]
    assert record.training[0]["reason"].startswith("no C compiler")
    dense = run(replace(config, train="dense"))
    assert dense.epochs == tuple(
        replace(row, seconds=other.seconds)
        for row, other in zip(record.epochs, dense.epochs, strict=True)
    )


def test_sparse_divergence_is_a_record_too(config):
    record = run(replace(config, lr=1e30, prune_epoch=0, train="sparse"))
    assert record.status == "diverged"
    assert record.message == "epoch 1: the training loss is not finite within 13 steps"


def test_divergence_keeps_the_best_network(config):
    config = replace(config, lr=1e30, prune_epoch=-1)
    record = run(config)
    assert record.status == "diverged"
    assert "epoch 1" in (record.message or "")
    assert record.best is not None
    weights = network(config.folder / "best_model.pt")
    assert all(weight.isfinite().all() for weight in weights.values())
    told = (config.folder / "log.txt").read_text().splitlines()[-2]
    assert told.startswith("# diverged: epoch 1")
    assert not (config.folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(("decay", "status"), [(0.5, "finished"), (1e4, "diverged")])
def test_a_run_that_is_seldom_saved_leaves_the_same(config, tmp_path, decay, status):
    """Also one that diverges after some epochs, and leaves the network of the epoch before."""
    config = replace(config, prune_epoch=0, epochs=6, lr=0.05, decay=decay)
    seldom = replace(config, path=tmp_path / "seldom")
    assert run(config).status == status
    run(seldom, checkpoint_seconds=1e9)
    assert 0 < len(record_without_times(config.folder)["epochs"]) <= 6
    assert record_without_times(seldom.folder) == record_without_times(config.folder)
    assert log_without_times(seldom.folder) == log_without_times(config.folder)
    for name in ("best_model.pt", "last_model.pt", "mask.safetensors"):
        one, other = ((it.folder / name).read_bytes() for it in (seldom, config))
        assert one == other, name


def test_threads_and_determinism_are_put_back(config):
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    before = torch.get_num_threads()
    run(replace(config, threads=2))
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_start_network_cannot_continue_a_run(config, baseline, tmp_path):
    """The folder's name says only that there was one."""
    config = replace(config, start=baseline, prune_epoch=0, epochs=1)
    run(config)
    checkpointed = replace(config, epochs=2)
    stop_after_pruning(checkpointed)
    weights = network(baseline)
    weights["fc1.bias"] += 1
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="was begun from another start network"):
        run(replace(checkpointed, start=tmp_path / "other.pt"))


def stop_after_pruning(config: RunConfig) -> None:
    class Stop(Silent):
        def note(self, text: str) -> None:
            if text.startswith("pruned"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, Stop())
