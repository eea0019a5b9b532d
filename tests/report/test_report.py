import csv
import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest

from lossprune.report.follow_up import write_plans
from lossprune.report.page import write_page
from lossprune.report.page_data import as_json, embedded_details
from lossprune.report.reading import read_results
from lossprune.report.settings import command_of
from lossprune.report.source import layer_sparsity
from lossprune.report.tables import all_tables

FIGURES = {
    "loss-against-lambda",
    "error-against-stages",
    "predicted-against-realised",
    "loss-change-against-error-gap",
    "layer-sparsity",
    "training-curves",
}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_real_results_folder_is_reported_whole(command, digits_results, tmp_path):
    answer = command("report", digits_results, "--out", "out")
    assert answer.status == 0
    assert answer.err == ""
    assert answer.out.splitlines()[0] == "20 runs: 20 finished"
    files = digests(tmp_path / "out")
    slug = "mlp-on-digits-95.6-removed"
    assert set(files) == {
        "index.html",
        "best.toml",
        "tables/runs.csv",
        *(
            f"tables/{name}.{suffix}"
            for name in (
                "loss-change",
                "error-after-fine-tuning",
                "paired-differences",
                "rank-correlation",
            )
            for suffix in ("csv", "md", "tex")
        ),
        *(f"figures/{name}--{slug}.{suffix}" for name in FIGURES for suffix in ("png", "svg")),
    }
    with (tmp_path / "out" / "tables" / "loss-change.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5  # best and 0: MP, LM and QM at π 1 and 5
    assert {row["n"] for row in rows} == {"2"}
    again = command("report", digits_results, "--out", "again")
    assert again.status == 0
    differing = {
        name for name, digest in digests(tmp_path / "again").items() if files[name] != digest
    }
    assert differing == set(), "the same results make the same bytes"


def test_the_plan_of_the_best_penalties_is_what_a_sweep_does(command, maker, tmp_path):
    for seed in (1111, 1112):
        path = maker.baseline(seed, epochs=7)
        start = f"results/{path.name}/best_model.pt"
        maker.run("MP", 1, 0.0, seed, epochs=0, start=start)
        for stages, best in ((1, 0.1), (14, 0.0)):
            for reg in (0.0, 0.1):
                # The training loss prefers the other one: it must not be what chooses.
                loss = 1.0 if reg == best else 2.0
                maker.run(
                    "QM", stages, reg, seed, epochs=0, loss=3 - loss, valid_loss=loss,
                    start=start, exponential=True,
                )  # fmt: skip
    assert command("report", maker.root, "--out", "out").status == 0
    plan = tmp_path / "out" / "best.toml"
    settings = "nepochs=3,baseline.nepochs=7"
    assert settings.replace("=3", "=20") in plan.read_text()
    answer = command("sweep", plan, "--set", settings, "--dry-run")
    assert answer.out.splitlines()[-1] == "8 runs: 2 baselines, 6 prunings"
    runs = [line for line in answer.out.splitlines() if line.startswith("results/")]
    flags = [dict(part.split("=") for part in Path(run).name.split(",")) for run in runs]
    chosen = {(run["pi"], run["pm"], run["reg"]) for run in flags if run["pe"] == "0"}
    assert chosen == {("1", "MP", "0.0"), ("1", "QM", "0.1"), ("14", "QM", "0.0")}
    assert {Path(run).name for run in runs if "pe=-1" in run} == {
        path.name for path in maker.root.iterdir() if "pe=-1" in path.name
    }


def test_several_networks_have_plans_of_their_own_and_unknown_starts_none(maker, tmp_path):
    start = f"results/{maker.baseline(1111).name}/best_model.pt"
    maker.run("QM", 1, 0.0, start=start, examples=1000)
    maker.run("QM", 1, 0.0, start=start, examples=500)
    maker.run("QM", 1, 0.0, examples=100)
    plans = write_plans(read_results(maker.root).runs, tmp_path)
    assert [plan.name for plan in plans] == ["best-1.toml", "best-2.toml"]
    assert ["nex = 1000\n" in plan.read_text() for plan in plans] == [True, False]


def test_one_plan_is_of_all_sparsities_of_a_network(command, maker, tmp_path):
    start = f"results/{maker.baseline(1111).name}/best_model.pt"
    for sparsity, best in ((0.8, 0.1), (0.9, 0.0)):
        for reg in (0.0, 0.1):
            loss = 1.0 if reg == best else 2.0
            maker.run("QM", 1, reg, sparsity=sparsity, valid_loss=loss, start=start)
    (plan,) = write_plans(read_results(maker.root).runs, tmp_path)
    assert "# MLP on mnist: of each criterion and π at each sparsity the λ" in plan.read_text()
    lines = command("sweep", plan, "--dry-run").out.splitlines()
    assert lines[-1] == "3 runs: 1 baseline, 2 prunings"
    folders = [Path(line).name for line in lines if line.startswith("results/")]
    flags = [dict(part.split("=") for part in folder.split(",")) for folder in folders]
    chosen = {(run["pr"], run["reg"]) for run in flags if run["pe"] == "0"}
    assert chosen == {("0.8", "0.1"), ("0.9", "0.0")}


def test_a_plan_tells_with_and_without_compensation_apart(command, maker, tmp_path):
    start = f"results/{maker.baseline(1111).name}/best_model.pt"
    for moved, best in (({}, 0.1), ({"compensate": True, "finish": 2, "exclude": "fc3"}, 0.0)):
        for reg in (0.0, 0.1):
            maker.run("QM", 5, reg, valid_loss=1.0 if reg == best else 2.0, start=start, **moved)
    (plan,) = write_plans(read_results(maker.root).runs, tmp_path)
    lines = command("sweep", plan, "--dry-run").out.splitlines()
    assert lines[-1] == "3 runs: 1 baseline, 2 prunings"
    folders = [Path(line).name for line in lines if line.startswith("results/")]
    flags = [dict(part.split("=") for part in folder.split(",")) for folder in folders]
    named = ("reg", "compensate", "finish", "exclude")
    chosen = {tuple(run.get(name) for name in named) for run in flags[1:]}
    assert chosen == {("0.1", None, None, None), ("0.0", "True", "2", "fc3")}


def test_the_table_is_what_the_records_say(digits_results):
    changes = []
    for path in digits_results.glob("*pi=5,pm=QM*reg=0.0,*/record.json"):
        record = json.loads(path.read_text())
        before, after = (record[f"{when}_pruning"]["scores"] for when in ("before", "after"))
        changes.append(after["train_loss"] - before["train_loss"])
    frame = all_tables(read_results(digits_results).runs)[0].frame
    row = frame.query("criterion == 'QM' and stages == 5 and choice == 'λ = 0'").iloc[0]
    assert len(changes) == row["n"] == 2
    assert row["mean"] == pytest.approx(sum(changes) / 2, rel=1e-12)
    assert row["std"] == pytest.approx(abs(changes[0] - changes[1]) / 2**0.5, rel=1e-9)


def test_the_command_of_a_run_is_that_run(command, digits_results):
    for row in read_results(digits_results).runs.to_dict("records"):
        words = shlex.split(command_of(row, str(digits_results)))
        assert words[0] == "lossprune"
        answer = command(*words[1:])
        assert (answer.status, answer.out) == (0, "Experiment already exists!\n"), words


def test_layer_sparsity_is_that_of_the_mask(maker):
    path = maker.run()
    assert layer_sparsity(path) == {"fc1.weight": 0.75}
    (path / "mask.safetensors").write_bytes(b"damaged")
    assert layer_sparsity(path) is None
    assert layer_sparsity(path / "nowhere") is None


def test_partly_finished_and_damaged_results_are_reported(command, maker, tmp_path):
    maker.baseline()
    maker.run(seed=1)
    maker.run(seed=2, status="running")
    maker.run(seed=3, status="diverged", loss=float("nan"), mask=False)
    (maker.run(seed=4) / "record.json").write_text("{")
    answer = command("report", maker.root, "--out", "out")
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert lines[0] == "4 runs: 2 finished, 1 running, 1 diverged"
    assert lines[1].startswith("left out arch=MLP")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 left out: their records cannot be used" in page


def test_the_page_needs_nothing_from_anywhere(maker, tmp_path):
    maker.run()
    results = read_results(maker.root)
    page = write_page(results, all_tables(results.runs), tmp_path, [], 1e6).read_text()
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert outside == []
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


def test_what_stands_in_records_cannot_break_out_of_the_page(maker):
    evil = "</script><script>alert(1)</script>\u2028"
    text = as_json({"message": evil})
    assert "<" not in text
    assert json.loads(text)["message"] == evil


def test_logs_and_records_are_embedded_up_to_the_budget(maker):
    for seed in range(5):
        maker.run(seed=seed)
    results = read_results(maker.root)
    everything = embedded_details(results, 1e9)
    assert list(everything) == [0, 1, 2, 3, 4]
    two = sum(len(everything[run]) for run in (0, 1))
    assert list(embedded_details(results, two)) == [0, 1]
    assert embedded_details(results, 0) == {}


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_wrong_budget_is_told(command, maker, value, tmp_path):
    maker.run()
    answer = command("report", maker.root, f"--embed_mb={value}")
    assert answer.status == 2
    assert answer.err.startswith("error: --embed_mb must be a number from 0 to 1,000, got ")
    assert not (tmp_path / "report").exists()


def test_a_place_that_cannot_be_written_is_told(command, maker, tmp_path):
    maker.run()
    (tmp_path / "file").write_text("")
    answer = command("report", maker.root, "--out", "file/report")
    assert answer.status == 2
    assert answer.err == "error: cannot write --out file/report: Not a directory\n"
