import io
import math
import shlex

import pandas as pd
import pytest
import torch

from lossprune.experiment import RunConfig
from lossprune.experiment.folder import MASK
from lossprune.flags import parse
from lossprune.pruning import Mask
from lossprune.report.choice import BEST, BEST_TUNED, ZERO, best_reg_after_pruning
from lossprune.report.page_data import page_data
from lossprune.report.reading import read_results
from lossprune.report.series import layers, stage_changes, training_curves
from lossprune.report.settings import command_of
from lossprune.report.table import to_csv, to_latex, to_markdown
from lossprune.report.tables import all_tables


def tables(maker):
    pruning, tuning, pairs, *_ = all_tables(read_results(maker.root).runs)
    return pruning, tuning, pairs


def only(frame, **values):
    for name, value in values.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def chosen(maker):
    return best_reg_after_pruning(read_results(maker.root).runs)["reg"].tolist()


def test_the_best_reg_is_chosen_on_validation_whatever_test_and_training_say(maker):
    for seed in (1, 2):
        maker.run(reg=0.0, seed=seed, loss=0.5, valid_loss=0.9, error=0.01)
        maker.run(reg=0.1, seed=seed, loss=0.7, valid_loss=0.8, error=0.30)
    assert chosen(maker) == [0.1]
    pruning, tuning, _ = tables(maker)
    assert only(pruning.frame, choice=BEST)["mean"] == pytest.approx(0.7 - 0.25)
    assert only(pruning.frame, choice=ZERO)["mean"] == pytest.approx(0.5 - 0.25)
    assert only(tuning.frame, choice=BEST)["mean"] == pytest.approx(0.30)
    assert only(tuning.frame, choice=BEST_TUNED)["reg"] == 0.0


def test_best_by_error_looks_at_validation_error(maker):
    maker.run(reg=0.0, error=0.05, valid_error=0.20)
    maker.run(reg=0.1, error=0.25, valid_error=0.10)
    _, tuning, _ = tables(maker)
    row = only(tuning.frame, choice=BEST_TUNED)
    assert (row["reg"], row["mean"]) == (0.1, 0.25)


def test_of_equal_ones_the_smallest(maker):
    for reg in (0.1, 1e-3, 1.0):
        maker.run(reg=reg, valid_loss=0.5)
    assert chosen(maker) == [1e-3]


def test_a_reg_measured_on_fewer_seeds_does_not_compete(maker):
    for seed in (1, 2):
        maker.run(reg=0.0, seed=seed, valid_loss=0.9)
    maker.run(reg=0.1, seed=1, valid_loss=0.1)
    assert chosen(maker) == [0.0]


def test_a_reg_that_diverged_on_one_seed_loses(maker):
    for seed in (1, 2):
        maker.run(reg=0.0, seed=seed, valid_loss=0.9)
    maker.run(reg=0.1, seed=1, valid_loss=0.1)
    maker.run(reg=0.1, seed=2, loss=math.nan, status="diverged")
    assert chosen(maker) == [0.0]


def test_a_pruning_evaluated_alone_and_before_tuning_is_one_measurement(maker):
    for seed, loss in ((1, 1.0), (2, 1.5)):
        maker.run(seed=seed, loss=loss, epochs=0)
        maker.run(seed=seed, loss=loss, epochs=4, error=0.1)
    pruning, tuning, _ = tables(maker)
    row = only(pruning.frame, choice=BEST)
    assert (row["n"], row["mean"]) == (2, 1.0)
    assert row["std"] == pytest.approx(math.sqrt(0.125))
    assert only(tuning.frame, choice=BEST)["tuning"] == "4 epochs"


def test_of_the_same_pruning_the_longest_trained_gives_the_curve(maker):
    maker.run(epochs=0, folder="a")
    maker.run(epochs=4, folder="b")
    maker.run(epochs=2, folder="c")
    assert training_curves(read_results(maker.root))["epoch"].tolist() == [1, 2, 3, 4]


def test_unfinished_and_diverged_runs_are_counted_and_not_averaged(maker):
    maker.run(seed=1, error=0.1, error_before=0.04)
    maker.run(seed=2, error=0.9, status="running")
    maker.run(seed=3, error=0.9, status="diverged")
    pruning, tuning, _ = tables(maker)
    assert only(pruning.frame, choice=BEST)["n"] == 3  # their pruning is done
    row = only(tuning.frame, choice=BEST)
    assert (row["n"], row["unfinished"], row["diverged"]) == (1, 1, 1)
    assert (row["mean"], row["gap"]) == pytest.approx((0.1, 0.06))
    assert math.isnan(row["low"])


def test_a_loss_that_is_not_finite_is_counted_as_diverged(maker):
    maker.run(seed=1, loss=1.0)
    maker.run(seed=2, loss=math.nan, status="diverged")
    row = only(tables(maker)[0].frame, choice=ZERO)
    assert (row["n"], row["diverged"], row["mean"]) == (1, 1, 0.75)


def test_a_reg_that_was_not_run_has_no_seeds(maker):
    maker.run(reg=0.1)
    row = only(tables(maker)[0].frame, choice=ZERO)
    assert row["n"] == 0
    assert math.isnan(row["mean"])


def test_differences_are_taken_seed_by_seed(maker):
    # The seeds differ by far more than the criteria do: only the pairs show it.
    for seed, level in ((1, 1.0), (2, 2.0), (3, 3.0)):
        maker.run("LM", seed=seed, loss=level)
        maker.run("QM", seed=seed, loss=level - 0.1 - 0.01 * seed)
    maker.run("QM", seed=4, loss=9.0)  # has no partner
    row = only(tables(maker)[2].frame, measure="loss change", choice=BEST)
    assert (row["first"], row["second"], row["between"]) == ("QM π 14", "LM π 14", "criteria")
    assert row["n"] == 3
    assert row["mean"] == pytest.approx(-0.12)
    half = 4.3026527 * 0.01 / math.sqrt(3)
    assert (row["low"], row["high"]) == pytest.approx((-0.12 - half, -0.12 + half))


def test_the_best_penalty_is_compared_with_none_seed_by_seed(maker):
    for seed, level in ((1, 1.0), (2, 5.0), (3, 9.0)):
        maker.run(reg=0.0, seed=seed, loss=level, error=level / 100)
        maker.run(reg=0.1, seed=seed, loss=level - 0.5, error=level / 100 + 0.01)
    pairs = tables(maker)[2].frame
    loss = only(pairs, measure="loss change", between="λ")
    assert (loss["first"], loss["second"]) == ("QM π 14 best λ", "QM π 14 λ = 0")
    assert (loss["mean"], loss["std"]) == (pytest.approx(-0.5), pytest.approx(0.0))
    error = only(pairs, measure="test error", between="λ", first="QM π 14 best λ")
    assert error["mean"] == pytest.approx(0.01)


def test_the_rank_correlation_is_over_all_runs_of_a_tuning_and_by_stages(maker):
    places = [(1.0, 0.04), (2.0, 0.03), (3.0, 0.02), (4.0, 0.05), (5.0, 0.06)]
    for seed, (loss, error) in enumerate(places):
        maker.run(seed=seed, loss=loss, error=error)
        maker.run(stages=1, seed=seed, loss=10 + loss, error=-error)
        maker.run(seed=seed, reg=0.1, epochs=0, loss=loss, error=0.9)
    frame = all_tables(read_results(maker.root).runs)[3].frame
    assert list(frame["tuning"].unique()) == ["2 epochs"]
    several, one = pd.DataFrame(places), pd.DataFrame([(10 + x, -y) for x, y in places])
    for among, points in (
        ("all runs", pd.concat([several, one])), ("π = 1", one), ("π > 1", several)
    ):  # fmt: skip
        row = only(frame, among=among)
        assert row["n"] == len(points)
        assert row["rho"] == pytest.approx(points.rank().corr().loc[0, 1])


def test_which_methods_are_compared(maker):
    for criterion, stages in (("MP", 1), ("LM", 1), ("LM", 14), ("QM", 14)):
        maker.run(criterion, stages)
    frame = tables(maker)[2].frame
    frame = frame[(frame["measure"] == "loss change") & (frame["choice"] == BEST)]
    assert list(zip(frame["between"], frame["first"], frame["second"], strict=True)) == [
        ("criteria", "LM π 1", "MP π 1"),
        ("criteria", "LM π 14", "MP π 1"),
        ("criteria", "QM π 14", "MP π 1"),
        ("criteria", "QM π 14", "LM π 14"),
        ("stages", "LM π 14", "LM π 1"),
    ]


def test_what_may_not_share_a_table_does_not(maker):
    maker.run(sparsity=0.9)
    maker.run(sparsity=0.95)
    maker.run(sparsity=0.95, examples=500)
    maker.run(sparsity=0.95, extra={"later_flag": "x"}, folder="later")
    maker.run(sparsity=0.95, start="b/arch=MLP,nepochs=9,seed={seed}/best_model.pt", folder="nine")
    networks = set(read_results(maker.root).runs["network"])
    assert len(networks) == 5
    assert all(name.startswith("MLP on mnist, 9") for name in networks)


def test_where_weights_move_it_is_another_line_of_the_same_table(maker):
    for seed in (1, 2):
        maker.run("MP", 1, seed=seed, recalibrate="end")
        maker.run("QM", seed=seed, loss=2.0)
        maker.run("QM", seed=seed, loss=1.5, compensate=True)
        maker.run("QM", seed=seed, loss=1.25, compensate=True, finish=3)
    results = read_results(maker.root)
    assert results.runs["network"].unique().tolist() == ["MLP on mnist, 95.6 % removed"]
    frame = tables(maker)[0].frame.query("choice == @BEST")
    assert frame[["criterion", "n", "mean"]].to_numpy().tolist() == [
        ["MP+recalibrate=end", 2, 0.75],
        ["QM", 2, 1.75],
        ["QM+compensate", 2, 1.25],
        ["QM+compensate+finish=3", 2, 1.0],
    ]
    changes = stage_changes(results).groupby("criterion")["predicted_change"].first()
    assert changes["QM"] == pytest.approx(1.75 / 2)
    assert changes["QM+compensate"] == pytest.approx(1.25 / 4)
    for row in results.runs.to_dict("records"):
        config = parse(RunConfig, shlex.split(command_of(row, "results"))[2:])
        assert config.name == row["folder"]


def test_where_other_weights_compete_it_is_another_line_of_the_same_table(maker):
    asked = [{}, {"scope": "layer"}, {"exclude": "first and last"}, {"parameters": "fc1,fc2"}]
    for loss, changes in enumerate(asked, start=1):
        for seed in (1, 2):
            maker.run("QM", seed=seed, loss=loss, **changes)
    results = read_results(maker.root)
    assert results.runs["network"].nunique() == 1
    pruning, _, pairs = tables(maker)
    names = ["QM", "QM+exclude=first and last", "QM+parameters=fc1,fc2", "QM+scope=layer"]
    means = pruning.frame.query("choice == @BEST")[["criterion", "n", "mean"]]
    assert means.to_numpy().tolist() == [
        [name, 2, loss - 0.25] for name, loss in zip(names, (1, 3, 4, 2), strict=True)
    ]
    data = page_data(results, (pairs,), [])
    rows = [row for row in data["tables"][0]["rows"] if row["cells"][3] == "criteria"]
    compared = {criterion for row in rows for criterion in row["criterion"]}
    assert compared == set(names)
    assert {count for row in rows for count in row["stages"]} == {14}
    for row in results.runs.to_dict("records"):
        config = parse(RunConfig, shlex.split(command_of(row, "results"))[2:])
        assert config.name == row["folder"]


def test_results_that_ask_for_no_later_flag_have_no_column_of_it(maker):
    maker.run("QM", 14, 0.01)
    columns = set(read_results(maker.root).runs.columns)
    assert {"compensate", "finish", "recalibrate"} <= columns
    assert not {"scope", "pattern", "parameters", "exclude", "average", "most_removed"} & columns
    assert not [name for name in columns if name.startswith("found_")]
    assert "automatic-choices" not in [table.name for table in tables(maker)]


def test_a_layer_keeps_its_place_where_runs_leave_others_out(maker):
    for exclude, names in (("fc1", ("fc2", "fc3")), ("none", ("fc1", "fc2", "fc3"))):
        folder = maker.run("QM", 1, exclude=exclude)
        Mask({f"{name}.weight": torch.ones(2, 2, dtype=torch.bool) for name in names}).save(
            folder / MASK
        )
    places = layers(read_results(maker.root))[["layer", "position"]].drop_duplicates()
    assert dict(places.to_numpy().tolist()) == {
        "fc1.weight": 0,
        "fc2.weight": 1,
        "fc3.weight": 2,
    }


def test_small_seeds_are_not_found_in_other_settings(maker):
    start = "base/arch=MLP,dec=1.0,lr=0.01,nepochs=12,pi=1,seed={seed}/best_model.pt"
    for seed in (0, 1, 2, 12):
        maker.run(seed=seed, start=start)
    assert set(read_results(maker.root).runs["network"]) == {"MLP on mnist, 95.6 % removed"}


def test_seeds_linear_schedules_and_one_cut_share_a_network(maker):
    for seed in (1111, 1112):
        maker.run("QM", 1, seed=seed, exponential=True)
        maker.run("MP", 1, seed=seed, exponential=False)
        maker.run("QM", 14, seed=seed, exponential=False)
        maker.run("QM", 14, seed=seed, exponential=True)
    runs = read_results(maker.root).runs
    assert runs["network"].unique().tolist() == ["MLP on mnist, 95.6 % removed"]
    frame = tables(maker)[0].frame.query("choice == @BEST")
    assert frame[["criterion", "stages", "schedule", "n"]].to_numpy().tolist() == [
        ["MP", 1, "", 2],
        ["QM", 1, "", 2],
        ["QM", 14, "exponential", 2],
        ["QM", 14, "linear", 2],
    ]


def test_the_formats(maker):
    maker.run("MP", 1, seed=1, loss=1 / 3, error=1 / 7)
    maker.run("MP", 1, seed=2, loss=2 / 3, error=1 / 7)
    pruning, tuning, pairs = tables(maker)
    csv = to_csv(pruning).splitlines()
    assert csv[0] == (
        "network,criterion,stages,schedule,choice,reg,n,diverged,mean,std,low,high,loss_after"
    )
    read = pd.read_csv(io.StringIO(to_csv(pruning)))
    assert read["std"].tolist() == pruning.frame["std"].tolist()  # to the last bit
    markdown = to_markdown(tuning)
    assert "## MLP on mnist, 95.6 % removed" in markdown
    assert (
        "| MP | 1 |  | 2 epochs | best λ | 0 | 2 | 0 | 0 | 14.29 % | 0.00 % "
        "| 14.29 % * | 14.29 % * | +12.29 |" in markdown
    )
    assert "lowest mean validation loss right after pruning" in markdown
    latex = to_latex(pruning)
    assert r"95.6 \% removed" in latex
    # The two seeds, 1/3 − 1/4 and 2/3 − 1/4: of two there is no interval.
    row = r"MP & 1 &  & best $\lambda$ & 0 & 2 & 0 & +0.2500 & 0.2357 & +0.0833 * & +0.4167 *"
    assert row in latex
    assert "* Two seeds have no interval" in latex
    assert read["low"].isna().all()
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 1
    assert "Nothing to show yet." in to_markdown(pairs)


def test_baselines_alone_make_empty_tables(maker):
    maker.baseline()
    for table in tables(maker):
        assert table.frame.empty
        assert "Nothing to show yet." in to_markdown(table)
