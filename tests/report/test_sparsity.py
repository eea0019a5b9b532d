"""Networks that were pruned to several sparsities."""

import json
from collections import defaultdict
from statistics import mean

import pytest

from lossprune.report.labels import file_slugs
from lossprune.report.reading import read_results
from lossprune.report.series import by_sparsity
from lossprune.report.tables import all_tables


def only(frame, **values):
    for name, value in values.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def sparsity_tables(path):
    *_, loss, error = all_tables(read_results(path).runs)
    assert (loss.name, error.name) == ("loss-against-sparsity", "error-against-sparsity")
    return loss.frame, error.frame


def test_the_tables_are_what_the_records_say(sparsity_results):
    by_reg = defaultdict(list)
    for path in sparsity_results.glob("*pe=0*pm=QM*/record.json"):
        record = json.loads(path.read_text())
        by_reg[record["config"]["pr"], record["config"]["reg"]].append(record)
    loss, error = sparsity_tables(sparsity_results)
    assert set(loss["network"]) == {"MLP on digits"}
    for sparsity in (0.8, 0.9, 0.95):

        def valid_loss(reg, sparsity=sparsity):
            records = by_reg[sparsity, reg]
            return mean(record["after_pruning"]["scores"]["valid_loss"] for record in records)

        best = min((0.0, 1e-3), key=valid_loss)
        records = by_reg[sparsity, best]

        def expected(moment, score, records=records):
            return pytest.approx(mean(record[moment]["scores"][score] for record in records))

        row = only(loss, criterion="QM", sparsity=sparsity)
        assert (row["reg"], row["among"], row["n"]) == (best, 2, 2)
        assert row["mean"] == expected("after_pruning", "train_loss")
        assert row["dense"] == expected("before_pruning", "train_loss")
        row = only(error, criterion="QM", sparsity=sparsity, tuning="1 epoch")
        assert (row["reg"], row["mean"]) == (best, expected("best", "test_error"))
        assert row["dense"] == expected("before_pruning", "test_error")
        row = only(error, criterion="QM", sparsity=sparsity, tuning="0 epochs")
        assert row["mean"] == expected("after_pruning", "test_error")
    mean_errors = error[(error["criterion"] == "MP") & (error["tuning"] == "0 epochs")]["mean"]
    assert mean_errors.is_monotonic_increasing


def test_reg_is_chosen_at_each_sparsity_whatever_the_test_error_says(maker):
    for sparsity, best in ((0.8, 0.1), (0.9, 0.0)):
        for reg in (0.0, 0.1):
            chosen = reg == best
            valid_loss, error = (0.5, 0.3) if chosen else (0.9, 0.01)
            for seed in (1, 2):
                maker.run(reg=reg, seed=seed, sparsity=sparsity, valid_loss=valid_loss, error=error)
    _, error = sparsity_tables(maker.root)
    tuned = error[error["tuning"] == "2 epochs"]
    assert tuned[["sparsity", "reg", "mean"]].to_numpy().tolist() == [
        [0.8, 0.1, pytest.approx(0.3)],
        [0.9, 0.0, pytest.approx(0.3)],
    ]


def test_unfinished_and_diverged_runs_are_counted_by_sparsity(maker):
    maker.run(sparsity=0.8, seed=1, error=0.1)
    maker.run(sparsity=0.8, seed=2, error=0.9, status="running")
    maker.run(sparsity=0.9, seed=1, error=0.9, status="diverged", loss=float("nan"))
    loss, error = sparsity_tables(maker.root)
    assert loss[["sparsity", "n", "diverged"]].to_numpy().tolist() == [[0.8, 2, 0], [0.9, 0, 1]]
    tuned = error[error["tuning"] == "2 epochs"]
    assert tuned[["n", "unfinished", "diverged"]].to_numpy().tolist() == [[1, 1, 0], [0, 0, 1]]


def test_other_settings_than_the_sparsity_make_another_curve(maker):
    for examples in (500, 1000):
        for sparsity in (0.8, 0.9):
            maker.run(sparsity=sparsity, examples=examples)
    maker.run(sparsity=0.95, start="b/arch=MLP,nepochs=9,seed={seed}/best_model.pt", folder="nine")
    curves = by_sparsity(read_results(maker.root).runs).groupby("network")["sparsity"].unique()
    assert {name: sorted(of) for name, of in curves.items()} == {
        f"MLP on mnist, nex {examples}, from a baseline": [0.8, 0.9] for examples in (500, 1000)
    }


def test_one_sparsity_makes_no_table_of_it(maker):
    maker.run(sparsity=0.8)
    maker.run(sparsity=0.9, examples=500)
    assert len(all_tables(read_results(maker.root).runs)) == 4


def test_names_that_differ_never_share_a_file():
    names = ["mine:mlp on digits", "mine.mlp on digits", "mine mlp on digits", "λ", "a" * 300]
    slugs = file_slugs(names)
    assert len({slug.lower() for slug in slugs.values()}) == len(names)
    assert all(slug.isascii() and len(slug) < 120 for slug in slugs.values())
    assert slugs["mine.mlp on digits"] == "mine.mlp-on-digits"


def test_a_network_of_ones_own_is_reported_with_pdf(command, maker, tmp_path):
    maker.run(sparsity=0.8, epochs=0, mask=False, extra={"arch": "mymodels:build"})
    assert command("report", maker.root, "--out", "out", "--pdf").status == 0
    name = "loss-against-lambda--mymodels-build-on-mnist-80-removed"
    files = {path.suffix: path for path in (tmp_path / "out" / "figures").glob(f"{name}.*")}
    assert set(files) == {".png", ".svg", ".pdf"}
    written = files[".pdf"].read_bytes()
    assert written.startswith(b"%PDF-")
    assert b"CreationDate" not in written  # the same results make the same bytes
    assert b"/FontFile2" in written  # TrueType
