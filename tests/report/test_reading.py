import itertools
import json

import pytest

from lossprune.experiment.record import RunRecord
from lossprune.report.reading import read_results


def test_every_record_below_a_folder_is_read(maker):
    maker.run(seed=1, folder="a/b/one")
    maker.run(seed=2, folder="two", epochs=6)
    maker.baseline()
    results = read_results(maker.root)
    assert sorted(results.runs["seed"]) == [1, 2, 1111]
    assert results.runs["folder"].tolist()[0] == "a/b/one"
    last = results.histories[results.runs.index[results.runs["folder"] == "two"][0]]
    assert last.stages.shape == (14, 3)
    assert last.epochs[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_one_run_is_a_folder_of_results_too(maker):
    path = maker.run(loss=1.5)
    runs = read_results(path).runs
    assert runs["folder"].tolist() == ["."]
    assert runs["loss_change"].tolist() == [1.25]


DAMAGES = {
    "cut": (lambda text: text[:100], "is not a record of a run"),
    "empty": (lambda text: "", "is not a record of a run"),
    "list": (lambda text: "[]", "it holds no fields"),
    "digest": (
        lambda text: RunRecord.from_json(text).to_json().replace('"seed": 2', '"seed": 3'),
        "its contents are not those that were written",
    ),
    "no config": (lambda text: json.dumps({"start": {}}), "is not a record of a run"),
    "no seed": (lambda text: text.replace('"seed"', '"sead"'), "has no setting seed"),
    "word": (lambda text: text.replace('"pi": 14', '"pi": "many"'), "setting pi is 'many'"),
    "flag": (lambda text: text.replace('"exp": true', '"exp": 1'), "setting exp is 1"),
    "score": (lambda text: text.replace('"train_loss": 1.0', '"train_loss": "x"'), "could not"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_record_that_cannot_be_used_is_left_out_and_named(maker, kind):
    maker.run(seed=1)
    bad = maker.run(seed=2, folder="bad") / "record.json"
    damage, reason = DAMAGES[kind]
    record = json.loads(bad.read_text())
    del record["sha256"]  # as of an older version, or written by hand
    text = json.dumps(record, indent=1)
    assert damage(text) != text
    bad.write_text(damage(text))
    results = read_results(maker.root)
    assert results.runs["seed"].tolist() == [1]
    assert [item.path for item in results.left_out] == ["bad"]
    assert reason in results.left_out[0].reason


def test_nothing_to_report_is_said_in_one_sentence(command, tmp_path):
    for where, told in (("nowhere", "no folder of results at nowhere"), (".", "no record.json in")):
        answer = command("report", where)
        assert answer.status == 2
        assert answer.err.startswith(f"error: {told}")
        assert answer.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full("many records")
def test_many_records_are_read_by_several_processes_as_by_one(maker, monkeypatch):
    for seed in range(510):
        maker.run(seed=seed, loss=1 + seed / 7, epochs=0, stages=1, mask=False)
    monkeypatch.setattr("lossprune.report.source.count_cores", lambda: 2)
    several = read_results(maker.root)
    monkeypatch.setattr("lossprune.report.source.count_cores", lambda: 1)
    one = read_results(maker.root)
    assert len(one.runs) == 510
    assert several.runs.equals(one.runs)


ODD_TEXTS = ("\ud800", "$\\frac{", "x" * 100_000, "\x1b[31m[/red]\n|")


def test_a_record_with_any_text_is_reported_or_left_out_by_name(maker, command):
    """By every command, and into every kind of file."""
    for seed in (1111, 1112):
        maker.run(seed=seed, stages=1)
    places = ("arch", "message", "path", "device", "status")
    for place, (number, text) in itertools.product(places, enumerate(ODD_TEXTS)):
        file = maker.run(seed=1113, stages=1, folder=f"odd-{place}-{number}") / "record.json"
        record = json.loads(file.read_text())
        del record["sha256"]  # as of an older version
        parts = {
            "arch": record["config"],
            "path": record["start"],
            "device": record["environment"],
        }
        parts.get(place, record)[place] = text
        file.write_text(json.dumps(record))
    report = command("report", maker.root, "--records", "all.parquet")
    assert (report.status, report.err) == (0, "")
    left_out = {item.path for item in read_results(maker.root).left_out}
    settings = {f"odd-arch-{number}" for number in (0, 2, 3)}  # the other is a name
    assert left_out == settings | {f"odd-status-{number}" for number in range(4)}
    status = command("status", maker.root)
    assert (status.status, status.err) == (0, "")
    for line in (*report.out.splitlines(), *status.out.splitlines()):
        assert line.isprintable()
        assert len(line) < 1100
