import multiprocessing
import os
import socket
from contextlib import contextmanager

import pytest

from lossprune.experiment.folder import FolderBusyError, RunFolder


def hold(path, pipe):
    with RunFolder(path).locked():
        pipe.send("held")
        pipe.recv()


@contextmanager
def another_process_holding(path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(path, theirs))
    process.start()
    assert ours.poll(30)
    try:
        yield process
    finally:
        ours.send("let go")
        process.join(30)


def test_the_second_process_is_told_who_holds_the_folder(tmp_path):
    with another_process_holding(tmp_path) as process:
        with pytest.raises(FolderBusyError) as error, RunFolder(tmp_path).locked():
            pass
        words = f"is in use by process {process.pid} on {socket.gethostname()} since 20"
        assert words in str(error.value)
    with RunFolder(tmp_path).locked():
        assert str(os.getpid()) in (tmp_path / ".holder.json").read_text()


def test_a_killed_process_blocks_nobody(tmp_path):
    with another_process_holding(tmp_path) as process:
        process.kill()
        process.join(30)
        assert (tmp_path / ".holder.json").exists()
        with RunFolder(tmp_path).locked():
            pass


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("log.txt", b"old")

    def fail(part):
        part.write_bytes(b"half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"no space left to write .*log\.txt"):
        folder.save("log.txt", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert (tmp_path / "log.txt").read_bytes() == b"old"


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    (tmp_path / ".checkpoint.pt.part").write_bytes(b"half")
    with RunFolder(tmp_path).locked():
        assert not (tmp_path / ".checkpoint.pt.part").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="file/run"), folder.locked():
        pass
    with pytest.raises(ValueError, match="a part of it is not a folder"):
        folder.settled()


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / "record.json").write_text('{"title": "another program\'s"}')
    with pytest.raises(ValueError, match="is not a record of a run"):
        RunFolder(tmp_path).settled()
