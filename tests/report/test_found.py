"""Reports of runs that find λ, stages and sparsity on their way."""

import json
import shlex
import tomllib
from dataclasses import replace

import pytest
from torch import nn

from lossprune.experiment import RunConfig
from lossprune.experiment.folder import RECORD
from lossprune.experiment.record import RunRecord
from lossprune.experiment.runner import run
from lossprune.flags import parse
from lossprune.report.figures import drawn_figures
from lossprune.report.follow_up import write_plans
from lossprune.report.page import write_page
from lossprune.report.page_data import as_json, page_data
from lossprune.report.reading import read_results
from lossprune.report.records_file import write_records
from lossprune.report.settings import MAY_BE_FOUND, command_of
from lossprune.report.table import to_csv, with_words
from lossprune.report.tables import all_tables
from lossprune.sweep.plan_file import parse_plan
from tests.report.browser import browser, missing

ARCH = f"{__name__}:small"
FAMILY = f"{ARCH} on digits"
BUDGET = f"{FAMILY}, to a budget"
BASE = RunConfig(arch=ARCH, dataset="digits", epochs=4, prune_epoch=-1, lr=0.5, threads=1)
TO_80 = {"stages": 3, "sparsity": 0.8, "exponential": True}
LIMIT = {"stages": "auto", "max_error_increase": 8.0, "tolerance": 1.0}
ASKED = (
    TO_80,
    {**TO_80, "reg": "auto"},
    {"stages": "auto", "tolerance": 1.0, "sparsity": 0.8},
    {**LIMIT, "reg": 1e-3},
    {**LIMIT, "reg": "auto"},
    {**LIMIT, "reg": "auto", "sparsity": 0.6},
    {"multiply_adds": 0.3},
    {"multiply_adds": 0.3, "reg": "auto"},
)


def small(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("found") / "results"
    for seed in (1, 2):
        dense = replace(BASE, seed=seed, path=path)
        run(dense)
        start = dense.folder / "best_model.pt"
        pruning = replace(dense, start=start, criterion="QM", examples=100, epochs=0, prune_epoch=0)
        for asked in ASKED:
            run(replace(pruning, **asked) if "sparsity" in asked else open_ended(pruning, asked))
    return path


def open_ended(config: RunConfig, asked: dict) -> RunConfig:
    return replace(config, sparsity=None, **asked)


def records_in(path) -> dict[str, RunRecord]:
    files = path.glob(f"*/{RECORD}")
    return {file.parent.name: RunRecord.from_json(file.read_text()) for file in files}


def test_the_table_is_what_the_records_say(path):
    results = read_results(path)
    (table,) = [table for table in all_tables(results.runs) if table.name == "automatic-choices"]
    expected = []
    for record in records_in(path).values():
        asked, stages = record.config, record.stages
        found = asked["reg"] == "auto" or asked["pi"] == "auto" or "max_error_increase" in asked
        if not stages or not found:
            continue
        regs = [stage["reg"] for stage in stages if "reg" in stage]
        back = [len(stage["taken_back"]) for stage in stages if "taken_back" in stage]
        before, after = record.before_pruning.scores, record.after_pruning.scores
        expected.append(
            (
                *(asked["seed"], -1 if asked["pi"] == "auto" else asked["pi"]),
                *(len(stages), sum(back) if back else None),
                *(min(regs, default=None), max(regs, default=None)),
                *(100 * len(stages), record.removed / record.prunable),
                after.valid_loss - before.valid_loss,
                after.valid_error - before.valid_error,
            )
        )
    columns = ["seed", "stages", "found_stages", "found_taken_back", "found_reg_low"]
    columns += ["found_reg_high", "found_examples", "achieved_sparsity", "loss_rise", "error_rise"]
    frame = table.frame[columns].astype(object).where(table.frame[columns].notna(), None)
    rows = list(frame.itertuples(index=False, name=None))
    assert len(rows) == 2 * 6
    assert sorted(rows, key=str) == sorted(expected, key=str)
    budgets = table.frame[table.frame["network"] == BUDGET]
    assert set(budgets["criterion"]) == {
        "QM+tolerance=1.0+max_error_increase=8.0",
        "QM+tolerance=1.0+max_error_increase=8.0+pr=0.6",
    }
    assert (budgets["error_rise"] <= 0.08 + 1e-9).all()


def test_of_prunings_to_a_budget_the_best_penalty_removes_most(path):
    runs = read_results(path).runs
    name = "QM+tolerance=1.0+max_error_increase=8.0"
    own = runs[(runs["network"] == BUDGET) & (runs["criterion"] == name)]
    most = own.groupby("reg")["achieved_sparsity"].mean().idxmax()
    loss_change = all_tables(runs)[0]
    rows = loss_change.frame.query("choice == 'best λ' and criterion == @name")
    assert rows["reg"].tolist() == [most]
    assert "to a budget the best λ is the one that removes most" in loss_change.caption


def test_the_curve_and_the_penalties_are_drawn_where_there_are_any(path):
    results = read_results(path)
    figures = {name.partition("--")[::2]: figure for name, figure in drawn_figures(results)}
    curves = [key for key in figures if key[0] == "validation-against-sparsity"]
    assert [slug.endswith("to-a-budget") for _, slug in curves] == [True]
    shown = results.runs[(results.runs["network"] == BUDGET)]
    records = records_in(path)
    loss, error = figures[curves[0]].axes
    lines = [line for line in loss.lines if len(line.get_xdata()) > 2]
    lengths = []
    for folder in shown["folder"]:
        points = {
            point["removed"]: (100 * (1 - point["sparsity"]), point["loss"])
            for stage in records[folder].stages
            for point in stage["points"]
        }
        flat = [value for removed in sorted(points) for value in points[removed]]
        lengths += [
            len(line.get_xydata())
            for line in lines
            if line.get_xydata().ravel().tolist() == pytest.approx(flat, rel=1e-5)
        ]
    assert len(lengths) == len(lines) > 2
    assert error.get_title() == "validation error, %"
    regs = {slug: figure for (name, slug), figure in figures.items() if name == "lambda-of-stages"}
    assert len(regs) == 3
    (to_80,) = [figure for slug, figure in regs.items() if slug.endswith("80-removed")]
    drawn = {len(line.get_ydata()) for axes in to_80.axes for line in axes.lines}
    assert drawn <= {3}


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_page_draws_them_too(path, tmp_path):
    results = read_results(path)
    write_page(results, all_tables(results.runs), tmp_path, [], 0)
    drawn = {}
    with browser() as window:
        window.open(tmp_path / "index.html")
        networks = window.run("return DATA.networks.map((network) => network.removed)")
        for place, removed in enumerate(networks):
            window.run("turnTo(arguments[0])", place)
            drawn[removed] = window.run(
                """return Object.fromEntries([...document.querySelectorAll("#charts .figure")].map(
                (figure) => [figure.querySelector("h3").textContent.split(",")[0],
                [...figure.querySelectorAll("circle")].map((dot) => [+dot.r.baseVal.value,
                dot.cx.baseVal.value, dot.cy.baseVal.value, dot.textContent])]))"""
            )
        assert window.console() == []
    title = "Loss and error on validation data on the way to a budget"
    assert [removed for removed in networks if title in drawn[removed]] == ["to a budget"]
    budgets = results.runs[results.runs["network"] == BUDGET]
    most = budgets.groupby("criterion")["achieved_sparsity"].idxmax()
    ends = [text for r, *_, text in drawn["to a budget"][title] if r == 4]
    for row in budgets.loc[most].to_dict("records"):  # the best of their criteria are drawn
        stages = records_in(path)[row["folder"]].stages
        judged = {p["removed"]: p for stage in stages for p in stage["points"]}
        point = judged[stages[-1]["removed"]]
        words = [f"validation loss {point['loss']:.4g}", f"error, % {100 * point['error']:.4g}"]
        assert all(any(word in text for text in ends) for word in words)
    drawn_regs = drawn["80 % removed"]["λ of the stages"]
    records = [r for r in records_in(path).values() if r.config.get("pr") == 0.8]
    chosen = [stage["reg"] for r in records for stage in r.stages if "reg" in stage]
    assert len(drawn_regs) == len(chosen) == 6
    heights = [-y for *_, y, _ in sorted(drawn_regs, key=lambda dot: reg_in(dot[3]))]
    assert heights == sorted(heights)
    told = sorted(reg_in(text) for *_, text in drawn_regs)
    assert told == pytest.approx(sorted(chosen), rel=1e-3)


def reg_in(text: str) -> float:
    return float(text.partition(": λ ")[2].split()[0])


def test_commands_words_and_records_of_such_runs(path, tmp_path):
    results = read_results(path)
    for row in results.runs.to_dict("records"):
        config = parse(RunConfig, shlex.split(command_of(row, "results"))[2:])
        assert config.name == row["folder"]
    words = with_words(results.runs, MAY_BE_FOUND)
    assert set(words["reg"]) == {0.0, 0.001, "auto"}
    assert set(words["stages"]) == {1, 3, "auto"}
    choices = to_csv(all_tables(results.runs)[-1])
    assert ",auto,auto,1," in choices
    (plan,) = [file.read_text() for file in write_plans(results.runs, tmp_path)]
    assert tomllib.loads(plan)["pi"] == ["auto", 3]
    assert len(parse_plan(plan, "best").expand()) == 2 + 2 * 2
    data = json.loads(as_json(page_data(results, all_tables(results.runs), [])))
    assert [network["sparsity"] for network in data["networks"]] == [None, 0.8, None]
    assert [network["removed"] for network in data["networks"]] == [
        *("30 % of multiply-adds left", "80 % removed", "to a budget"),
    ]
    assert [-1.0, "auto"] in data["regs"]


def test_what_was_found_is_in_the_file_of_records(path, tmp_path):
    pytest.importorskip("pyarrow")
    file = tmp_path / "records.parquet"
    write_records(read_results(path), file)
    read = dict(read_results(file).source.read(lambda record: record))
    assert {name: record.stages for name, record in read.items()} == {
        name: record.stages for name, record in records_in(path).items()
    }
