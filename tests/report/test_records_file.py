import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossprune.pruning import Mask
from lossprune.report.reading import read_results
from lossprune.report.records_file import RecordsFile, write_records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SHORTEST = 2.0**-23  # relative: to single precision, then to its shortest decimal
LOSSES = ("train_loss", "valid_loss", "test_loss")
ERRORS = ("train_error", "valid_error", "test_error")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def data_of(page: bytes) -> dict:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.decode())
    assert text is not None
    return json.loads(text[1])


def details_of(page: bytes) -> dict[str, dict[str, str]]:
    found = re.findall(r'<script id="detail-(\d+)" type="text/plain">(.*?)</script>', page.decode())
    return {run: json.loads(zlib.decompress(base64.b64decode(packed))) for run, packed in found}


def assert_same_report(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """All files are the same to the byte, and the page but for its links and embedded records."""
    assert {name: data for name, data in one.items() if name != "index.html"} == {
        name: data for name, data in other.items() if name != "index.html"
    }
    pages = one["index.html"], other["index.html"]
    data = [data_of(page) for page in pages]
    assert (data[0].pop("root"), data[1].pop("root")) == ("../results", None)
    assert data[0] == data[1]
    around = [re.sub(rb'<script id="d.*?</script>', b"", page) for page in pages]
    assert around[0] == around[1]


@pytest.fixture
def real(command, digits_results, tmp_path) -> Path:
    """Real results at ``results``, reported to ``folder``, with all records in ``all.parquet``."""
    shutil.copytree(digits_results, tmp_path / "results")
    answer = command("report", "results", "--out", "folder", "--records", "all.parquet")
    assert answer.status == 0
    assert answer.out.splitlines()[-1] == "wrote all records into all.parquet"
    return tmp_path


def test_the_report_of_the_file_is_that_of_the_folder(command, real):
    shutil.rmtree(real / "results")
    answer = command("report", "all.parquet", "--out", "file", "--records", "again.parquet")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines()[0] == "20 runs: 20 finished"
    folder, file = contents(real / "folder"), contents(real / "file")
    assert any(name.startswith("figures/layer-sparsity") for name in file)
    assert_same_report(folder, file)
    assert (real / "again.parquet").read_bytes() == (real / "all.parquet").read_bytes()
    of_folder, of_file = details_of(folder["index.html"]), details_of(file["index.html"])
    assert len(of_folder) == len(of_file) == 20
    for run, texts in of_folder.items():
        records = json.loads(texts["record"]), json.loads(of_file[run]["record"])
        assert records[0].pop("sha256") != records[1].pop("sha256")  # of what is rounded
        epochs = [record.pop("epochs") for record in records]
        assert records[0] == records[1]
        for one, other in zip(*epochs, strict=True):
            assert one["epoch"] == other["epoch"]
            assert other["seconds"] == pytest.approx(one["seconds"], rel=SHORTEST)
            for name in LOSSES:
                assert other["scores"][name] == pytest.approx(one["scores"][name], rel=SHORTEST)
            for name in ERRORS:
                assert other["scores"][name] == one["scores"][name]
        logs = [text["log"].splitlines() for text in (texts, of_file[run])]
        assert [len(line) for line in logs[0]] == [len(line) for line in logs[1]]


def test_pandas_alone_reads_what_the_records_say(digits_results, tmp_path):
    write_records(read_results(digits_results), tmp_path / "all.parquet")
    frame = pd.read_parquet(tmp_path / "all.parquet")
    assert len(frame) == 20
    for _, row in frame.iterrows():
        folder = digits_results / row["folder"]
        record = json.loads((folder / "record.json").read_text())
        config = {**row["config"], **{name: json.loads(it) for name, it in row["more_config"]}}
        assert config == record["config"]
        assert row["environment"] == record["environment"]
        assert row["start"] == record["start"]
        assert (row["status"], row["removed"]) == (record["status"], record["removed"])
        for moment in ("before_pruning", "after_pruning", "best", "last"):
            if record[moment] is None:
                assert row[moment] is None
            else:
                scores = record[moment].pop("scores")
                assert row[moment] == {**record[moment], **scores}
        assert row["stages"].tolist() == record["stages"]
        assert row["training"].tolist() == record["training"]
        for name in LOSSES:
            expected = np.float32([epoch["scores"][name] for epoch in record["epochs"]])
            assert [epoch[name] for epoch in row["epochs"]] == expected.tolist()
        for name in ERRORS:
            expected = [epoch["scores"][name] for epoch in record["epochs"]]
            assert [epoch[name] for epoch in row["epochs"]] == expected
        if (folder / "mask.safetensors").exists():
            kept = Mask.load(folder / "mask.safetensors")
            layers = {layer["name"]: layer["sparsity"] for layer in row["layers"]}
            assert list(layers) == list(kept)
            for name, sparsity in layers.items():
                removed = (~kept[name]).sum().item() / kept[name].numel()
                assert sparsity == pytest.approx(removed, abs=1e-7)
        else:
            assert row["layers"] is None


def test_unfinished_diverged_and_unusable_runs_are_in_it(command, maker, tmp_path):
    nan = float("nan")
    maker.baseline()
    maker.run(seed=1, extra={"widening": [1, 2], "reg": 0})
    maker.run(seed=2, status="running", epochs=7)
    maker.run(seed=3, status="diverged", loss=nan, error=nan, mask=False)
    maker.run("MP", 1, seed=4, epochs=0, folder="deep/er")
    (maker.run(seed=5) / "record.json").write_text("{")
    maker.root.rename(tmp_path / "results")
    assert command("report", "results", "--out", "folder", "--records", "all.parquet").status == 0
    answer = command("report", "all.parquet", "--out", "file")
    assert answer.out.splitlines()[0] == "5 runs: 3 finished, 1 running, 1 diverged"
    assert answer.out.splitlines()[1].startswith("left out arch=MLP")
    folder, file = contents(tmp_path / "folder"), contents(tmp_path / "file")
    assert_same_report(folder, file)
    # Every number of these records is a short decimal, so that nothing of them is rounded; that a
    # predicted change was no number, rather than none, a record does not say.
    for run, texts in details_of(folder["index.html"]).items():
        texts["log"] = texts["log"].replace("predicted change nan", "predicted change none")
        assert texts == details_of(file["index.html"])[run]


def test_what_a_compensation_did_is_in_it(maker, tmp_path):
    """A file of a version that knew of none is read as well, as one without."""
    folders = [maker.run(seed=1, compensate=True), maker.run(seed=2)]
    write_records(read_results(maker.root), tmp_path / "all.parquet")
    texts = [
        text
        for _, text in RecordsFile(tmp_path / "all.parquet").texts(
            {folder.name for folder in folders}
        )
    ]
    assert sorted(texts) == sorted((folder / "record.json").read_text() for folder in folders)
    assert sum('"compensation"' in text for text in texts) == 1
    without("compensations")(tmp_path / "all.parquet")
    (plain,) = RecordsFile(tmp_path / "all.parquet").texts({folders[1].name})
    assert plain[1] == (folders[1] / "record.json").read_text()


def test_a_file_compares_as_its_folder_does(command, maker):
    for seed in (1, 2):
        maker.run(seed=seed, loss=1.0, folder=f"a/{seed}")
        maker.run(seed=seed, loss=1.0 + seed / 10, folder=f"b/{seed}")
    a, b = maker.root / "a", maker.root / "b"
    write_records(read_results(a), Path("a.parquet"))
    folders, mixed = command("compare", a, b), command("compare", "a.parquet", b)
    assert mixed.out == folders.out.replace(f"A  {a}:", "A  a.parquet:")
    assert "+0.15000" in mixed.out
    answer = command("compare", a / "1", "a.parquet")
    assert answer.err.startswith(f"error: {a / '1'} is one run and a.parquet is not")


def without(column: str):
    def damage(path: Path) -> None:
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([column]), path)

    return damage


def of_another_type(path: Path) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index("removed")
    words = pa.array(["many"] * len(table))
    changed = table.set_column(place, "removed", words)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def of_another_format(path: Path) -> None:
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"lossprune.format": b"lossprune records 9"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def without_a_setting(path: Path) -> None:
    """Its runs, not the file, are then what cannot be used."""
    table = pq.read_table(path)
    place = table.schema.get_field_index("config")
    config = [{**row, "seed": None} for row in table["config"].to_pylist()]
    changed = table.set_column(
        place, "config", pa.array(config, type=table.schema.field("config").type)
    )
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def flipped(path: Path) -> None:
    """Flip a bit at the end of a column's pages, which is of numbers and not of their header."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "not Parquet": (lambda path: path.write_text("folder,seed\n"), "is damaged or not a Parquet"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or not a Parquet file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or not a Par"),
    "a bit": (flipped, "is damaged or not a Parquet file"),
    "other": (lambda path: pd.DataFrame({"a": [1]}).to_parquet(path), "is a Parquet file of some"),
    "format": (of_another_format, "is a Parquet file of 'lossprune records 9', this reads"),
    "column": (without("epochs"), "lacks the column 'epochs'"),
    "type": (of_another_type, "column 'removed' is string, not int64"),
    "setting": (without_a_setting, "can be used: the record has no setting seed"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_used_is_told_in_one_sentence(command, maker, tmp_path, kind):
    for seed in range(3):
        maker.run(seed=seed)
    write_records(read_results(maker.root), tmp_path / "all.parquet")
    damage, told = DAMAGES[kind]
    damage(tmp_path / "all.parquet")
    answer = command("report", "all.parquet", "--out", "out")
    assert answer.status == 2
    assert re.match(r"error: (none of the 3 records in )?all\.parquet\b", answer.err)
    assert told in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_place_for_the_file_that_cannot_be_is_told(command, maker, tmp_path):
    maker.run()
    (tmp_path / "file").write_text("")
    for place, told in (
        (".", "--records must be a file to write, got the folder ."),
        ("file/all.parquet", "cannot write --records file/all.parquet: "),
    ):
        answer = command("report", maker.root, "--records", place)
        assert answer.status == 2
        assert answer.err.startswith(f"error: {told}")
        assert answer.err.count("\n") == 1


@pytest.mark.full("a report without pyarrow")
def test_without_pyarrow_only_the_file_is_missed(maker, tmp_path):
    maker.run()
    absent = tmp_path / "absent" / "pyarrow"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ImportError('there is none')\n")
    (tmp_path / "all.parquet").write_text("whatever it holds")
    paths = [str(absent.parent), os.environ.get("PYTHONPATH", "")]

    reports = [
        ["made", "--out", "out"],
        ["made", "--out", "no", "--records", "new.parquet"],
        ["all.parquet"],
    ]
    program = "import sys; from lossprune.cli import main; "
    program += f"sys.exit(str([main(['report', *words]) for words in {reports}]))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    *errors, statuses = answer.stderr.splitlines()
    assert statuses == "[0, 2, 2]"
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("error: records in Parquet files need pyarrow: pip install")
    assert not (tmp_path / "no").exists()


def test_many_runs_are_written_and_read_in_groups(maker, tmp_path):
    for seed in range(150):
        maker.run(seed=seed, loss=1 + seed / 7, epochs=seed % 3, stages=1, mask=False)
    folder = read_results(maker.root)
    write_records(folder, tmp_path / "all.parquet")
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 3
    file = read_results(tmp_path / "all.parquet")
    assert file.runs.equals(folder.runs)
    for one, other in zip(folder.histories, file.histories, strict=True):
        np.testing.assert_array_equal(one.stages, other.stages)
        np.testing.assert_array_equal(one.epochs, other.epochs)
