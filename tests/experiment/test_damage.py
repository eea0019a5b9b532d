"""Files of a run that are not as they were written: refused in one sentence, or without effect."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.faults import Stopping, cases, count
from lossprune import Mask
from lossprune.experiment import RunConfig, RunRecord, run, store
from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD
from lossprune.experiment.group import run_together
from lossprune.experiment.network_file import network_bytes, read_network
from lossprune.json_text import parse_digested, parse_json, with_digest


def test_changed_bytes_are_refused_or_without_effect(tmp_path):
    """``python -m benchmarks.faults`` changes 200 of each file, of a run interrupted anywhere."""
    for case in cases(tmp_path):
        if case.name in ("interrupted before pruning", "interrupted while pruning"):
            continue
        counts = count(case, 5 if case.name.startswith("interrupted") else 20, 0, tmp_path)
        # Where the last network is the best one, the checkpoint holds it.
        expected = {LOG: {"same"}, BEST: {"same", "refused"}}.get(case.file, {"refused"})
        assert set(counts) <= expected, (case.name, case.file, counts)


@pytest.fixture
def interrupted(tmp_path, monkeypatch) -> RunConfig:
    """A run stopped while it is fine-tuned, its best network of an earlier epoch."""
    # However slow the disk is, the best network is in its file after every epoch.
    monkeypatch.setattr(store, "_CHEAP_SECONDS", 1e6)
    config = RunConfig(
        arch="MLP",
        dataset="digits",
        criterion="MP",
        sparsity=0.9,
        prune_epoch=1,
        epochs=9,
        lr=0.5,
        train="dense",
        threads=1,
        path=tmp_path / "run",
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, Stopping("epoch", 8))
    record = RunRecord.from_json((config.folder / RECORD).read_text())
    assert record.best is not None
    assert record.best.epoch < 7
    return config


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 16
    path.write_bytes(contents)


def test_a_damaged_checkpoint_is_named_with_what_is_left(interrupted, tmp_path):
    whole = replace(interrupted, path=tmp_path / "whole")
    run(whole)
    flip(interrupted.folder / CHECKPOINT)
    said = (
        r"checkpoint\.pt is damaged: its contents are not those that were written; remove it to "
        r"begin this run again"
    )
    with pytest.raises(ValueError, match=said + r" \(best_model\.pt beside it, of epoch \d, can"):
        run(interrupted)
    flip(interrupted.folder / BEST)
    with pytest.raises(ValueError, match=said + "$"):
        run(interrupted)
    (interrupted.folder / CHECKPOINT).unlink()
    run(interrupted)
    for name in (BEST, LAST, MASK):
        assert (interrupted.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("name", [BEST, MASK])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_what_a_run_needs_beside_its_checkpoint_is_checked(interrupted, name, how):
    (flip if how == "flipped" else Path.unlink)(interrupted.folder / name)
    told = "damaged" if how == "flipped" else "is missing"
    with pytest.raises(ValueError, match=rf"{name}.*{told}.*; remove checkpoint\.pt beside it to"):
        run(interrupted)


def test_a_run_goes_on_without_its_damaged_record(interrupted):
    flip(interrupted.folder / RECORD)
    with pytest.raises(ValueError, match=r"record\.json .*; remove it, and the run goes on from"):
        run(interrupted)
    (interrupted.folder / RECORD).unlink()
    assert len(run(interrupted).epochs) == 9


def test_files_of_older_versions_have_no_digests_and_are_read(interrupted, tmp_path):
    whole, folder = replace(interrupted, path=tmp_path / "whole"), interrupted.folder
    run(whole)
    for name in (CHECKPOINT, BEST):
        torch.save(torch.load(folder / name, weights_only=True), folder / name)
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    (folder / RECORD).write_text(json.dumps(record))
    run(interrupted)
    for name in (BEST, LAST, MASK):
        found, expected = (
            Mask.load(it / name) if name == MASK else torch.load(it / name, weights_only=True)
            for it in (folder, whole.folder)
        )
        assert str(found) == str(expected)


def test_a_damaged_run_of_a_group_stops_no_other(tmp_path):
    config = RunConfig(
        arch="MLP", dataset="digits", prune_epoch=-1, epochs=2, threads=1, path=tmp_path
    )
    configs = [replace(config, seed=seed) for seed in (1, 2, 3)]
    for each in configs:
        with pytest.raises(KeyboardInterrupt):
            run(each, Stopping("epoch", 2))
    flip(configs[0].folder / RECORD)
    flip(configs[1].folder / CHECKPOINT)
    first, second, third = run_together(configs)
    assert RECORD in str(first)
    assert CHECKPOINT in str(second)
    assert isinstance(third, RunRecord)
    assert third.status == "finished"


def test_a_network_with_a_digest_is_an_ordinary_archive(tmp_path):
    weights = {"weight": torch.randn(30, 20)}
    contents = network_bytes(weights, {"epoch": 3})
    assert network_bytes(weights, {"epoch": 3}) == contents
    (tmp_path / "n.pt").write_bytes(contents)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "n.pt", weights_only=True, mmap=mapped)
        assert torch.equal(loaded["state_dict"]["weight"], weights["weight"])
    with zipfile.ZipFile(tmp_path / "n.pt") as archive:
        assert archive.testzip() is None
    old = io.BytesIO()
    torch.save(loaded, old)
    (tmp_path / "old.pt").write_bytes(old.getvalue())
    assert torch.equal(read_network(tmp_path / "old.pt")[0]["weight"], weights["weight"])


def test_every_changed_byte_of_a_network_is_noticed(tmp_path):
    contents = network_bytes({"weight": torch.randn(3, 2)}, {"epoch": 3})
    for place in range(len(contents)):
        changed = bytearray(contents)
        changed[place] ^= 1 << place % 8
        (tmp_path / "n.pt").write_bytes(changed)
        with pytest.raises(ValueError, match=r"n\.pt is damaged"):
            read_network(tmp_path / "n.pt")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 10**5, "nested more than 64 deep"),
        ('{"a":' * 10**5, "nested more than 64 deep"),
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('["' + "[" * 60, "Unterminated string"),
        (b"\xff", "can't decode"),
    ],
)
def test_json_of_strangers_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        parse_json(text)


def test_brackets_in_texts_are_not_nested():
    assert parse_json('{"a": "' + "[{" * 100 + '\\""}') == {"a": "[{" * 100 + '"'}


def test_an_object_is_as_it_was_written_or_of_an_older_version():
    written = json.dumps(with_digest({"a": [1, 2.5], "b": None}))
    assert parse_digested(written) == parse_digested('{"a": [1, 2.5], "b": null}')
    with pytest.raises(ValueError, match="not those that were written"):
        parse_digested(written.replace("2.5", "3.5"))
    with pytest.raises(ValueError, match="not an object"):
        parse_digested("[]")
