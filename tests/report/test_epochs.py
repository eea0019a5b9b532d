"""A report of the first epochs of longer runs."""

from dataclasses import replace

import pandas as pd
import pytest

from lossprune.cli import main
from lossprune.experiment import RunConfig, run
from lossprune.experiment.record import RunRecord


@pytest.fixture(scope="module")
def digits_runs(tmp_path_factory):
    """The same pruning fine-tuned for five epochs, and for three."""
    path = tmp_path_factory.mktemp("results")
    config = RunConfig(
        arch="MLP", dataset="digits", criterion="MP", sparsity=0.9, epochs=5, lr=0.1, path=path
    )
    return run(config), run(replace(config, epochs=3)), path


def without_times(record: RunRecord) -> dict:
    plain = record.to_dict()
    plain["seconds"] = None
    for row in (*plain["epochs"], *plain["stages"], plain["best"], plain["last"]):
        row["seconds"] = None
    return plain


def test_the_first_epochs_of_a_run_are_those_of_a_shorter_one(digits_runs):
    longer, shorter, _ = digits_runs
    assert without_times(longer.until(3)) == without_times(shorter)
    assert longer.until(3).seconds < longer.seconds
    assert longer.until(5) is longer
    assert longer.until(6) is longer


def test_an_interrupted_or_diverged_run_counts_as_far_as_it_came(digits_runs):
    longer, shorter, _ = digits_runs
    stopped = replace(longer, status="running", epochs=longer.epochs[:4])
    assert without_times(stopped.until(3)) == without_times(shorter)
    assert stopped.until(4).status == "finished"
    diverged = replace(longer, status="diverged", message="epoch 6: a loss is not finite")
    assert without_times(diverged.until(3)) == without_times(shorter)


def test_the_report_takes_longer_runs_as_shorter_ones(digits_runs, tmp_path, capsys):
    path, out = digits_runs[-1], tmp_path / "report"
    assert main(["report", str(path), "--out", str(out), "--epochs", "2"]) == 0
    runs = pd.read_csv(out / "tables" / "runs.csv")
    assert list(runs["epochs"]) == list(runs["trained_epochs"]) == [2, 2]
    assert runs["best_valid_error"].nunique() == 1
    assert main(["report", str(path), "--out", str(out), "--epochs", "0"]) == 2
    assert "--epochs must be a whole number from 1 to 1,000,000, got 0" in capsys.readouterr().err
