"""Downloads from a real server that breaks off, stalls, lies and refuses."""

import hashlib
import logging
import subprocess
import sys
import time

import pytest

from lossprune.data.download import fetch
from lossprune.data.transfer import Patience, RemoteFile

GOOD = bytes(range(256)) * 2000
HASTY = Patience(timeout=20, attempts=3, pause=0.01)
IMPATIENT = Patience(timeout=0.3, attempts=3, pause=0.01)


def verify(path):
    if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(GOOD).digest():
        raise ValueError("its contents are wrong")


def remote(*mirrors):
    return RemoteFile("file.gz", mirrors, verify)


def get(file, folder, **options):
    return fetch(file, folder, **({"patience": HASTY} | options))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    monkeypatch.delenv("LOSSPRUNE_MIRROR", raising=False)


def test_a_file_is_downloaded_once(server, tmp_path):
    server.files["/file.gz"] = GOOD
    folder = tmp_path / "new" / "folder"
    assert get(remote(server.url), folder) == folder / "file.gz"
    assert get(remote(server.url), folder).read_bytes() == GOOD
    assert server.requests == [("/file.gz", None)]
    assert left_in(folder) == ["file.gz"]


def test_a_broken_off_answer_is_resumed_where_it_stopped(server, tmp_path):
    server.files["/file.gz"] = GOOD
    server.cut["/file.gz"] = [100_000, 300_000]
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=300000-"]
    assert server.sent == [100_000, 200_000, 212_000]
    assert left_in(tmp_path) == ["file.gz"]


def test_a_later_call_resumes_what_an_earlier_one_left(server, tmp_path):
    server.files["/file.gz"] = GOOD
    server.cut["/file.gz"] = [100_000, 100_001, 100_002]
    with pytest.raises(OSError, match="broke off after 100002 of 512000 bytes"):
        get(remote(server.url), tmp_path)
    assert not (tmp_path / "file.gz").exists()
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert sum(server.sent) == len(GOOD)


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.files["/file.gz"] = GOOD
    server.ranges = False
    server.cut["/file.gz"] = [100_000]
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert server.sent == [100_000, 512_000]


def test_a_stalled_answer_is_given_up_and_resumed_elsewhere_or_later(server, tmp_path):
    server.files |= {"/slow/file.gz": GOOD, "/fast/file.gz": GOOD}
    server.stall.add("/slow/file.gz")
    file = remote(f"{server.url}/slow", f"{server.url}/fast")
    assert get(file, tmp_path, patience=IMPATIENT).read_bytes() == GOOD
    assert server.requests[-1] == ("/fast/file.gz", None)
    assert left_in(tmp_path) == ["file.gz"]  # Nor a part of the first address's.
    with pytest.raises(OSError, match=r"/slow/file.gz \(no answer in time\)"):
        get(remote(f"{server.url}/slow"), tmp_path / "other", patience=IMPATIENT)
    assert not (tmp_path / "other" / "file.gz").exists()


def test_a_truncated_file_is_refused_and_not_kept(server, tmp_path):
    server.files["/file.gz"] = GOOD[:1000]
    with pytest.raises(OSError, match=r"/file.gz \(its contents are wrong\)"):
        get(remote(server.url), tmp_path)
    assert left_in(tmp_path) == []


def test_an_answer_cut_short_without_its_length_announced_is_refused(server, tmp_path):
    server.files["/file.gz"] = GOOD
    server.announced = False
    server.cut["/file.gz"] = [1000]
    with pytest.raises(OSError, match="its contents are wrong"):
        get(remote(server.url), tmp_path)
    assert left_in(tmp_path) == []


def test_a_wrong_file_is_refused_and_the_next_mirror_asked(server, tmp_path):
    server.files |= {"/a/file.gz": b"<html>login</html>", "/b/file.gz": GOOD}
    file = remote(f"{server.url}/a", f"{server.url}/b/")
    assert get(file, tmp_path).read_bytes() == GOOD
    assert [path for path, _ in server.requests] == ["/a/file.gz", "/b/file.gz"]
    assert left_in(tmp_path) == ["file.gz"]


def test_a_file_that_changed_between_two_halves_is_fetched_anew(server, tmp_path):
    server.files["/file.gz"] = b"x" * len(GOOD)
    server.cut["/file.gz"] = [1000, 1001, 1002]
    with pytest.raises(OSError, match="broke off after"):
        get(remote(server.url), tmp_path)
    server.files["/file.gz"] = GOOD
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert [asked for _, asked in server.requests[-2:]] == ["bytes=1002-", None]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    server.files["/file.gz"] = GOOD + b"more"
    server.cut["/file.gz"] = [len(GOOD) + 1] * 3
    with pytest.raises(OSError, match="broke off after"):
        get(remote(server.url), tmp_path)
    server.files["/file.gz"] = GOOD
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD


def test_what_is_not_found_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(OSError, match=r"^cannot download file\.gz, tried") as caught:
        get(remote(f"{server.url}/a", f"{server.url}/b"), tmp_path)
    message = str(caught.value)
    assert f"{server.url}/a/file.gz (status 404)" in message
    assert f"{server.url}/b/file.gz (status 404)" in message
    assert f"put it into {tmp_path}" in message
    assert "--mirror or LOSSPRUNE_MIRROR" in message
    assert len(server.requests) == 2


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.files["/file.gz"] = GOOD
    server.broken["/file.gz"] = [503, 429]
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert len(server.requests) == 3


def test_no_server_at_all_is_told(tmp_path):
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/file.gz \(no connection\)"):
        get(remote("http://127.0.0.1:9"), tmp_path / "data" / "raw")
    assert list(tmp_path.iterdir()) == []


def test_a_named_mirror_replaces_the_others(server, tmp_path, monkeypatch):
    server.files |= {"/flag/file.gz": GOOD, "/variable/file.gz": GOOD}
    monkeypatch.setenv("LOSSPRUNE_MIRROR", f"{server.url}/variable")
    get(remote("http://127.0.0.1:9"), tmp_path / "1")
    get(remote("http://127.0.0.1:9"), tmp_path / "2", mirror=f"{server.url}/flag/")
    assert [path for path, _ in server.requests] == ["/variable/file.gz", "/flag/file.gz"]


@pytest.mark.parametrize("mirror", ["ftp://host/x", "/a/folder", "http://"])
def test_a_mirror_must_be_a_web_address(tmp_path, mirror):
    with pytest.raises(ValueError, match=rf"mirror \(--mirror, LOSSPRUNE_MIRROR\).*'{mirror}'"):
        get(remote(), tmp_path, mirror=mirror)


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "raw"
    with pytest.raises(OSError, match=rf"^cannot download file.gz into {folder}: Not a dir"):
        get(remote(server.url), folder)


FETCH = """
import hashlib, sys
from pathlib import Path
from lossprune.data.download import fetch
from lossprune.data.transfer import RemoteFile

def verify(path):
    if hashlib.sha256(path.read_bytes()).hexdigest() != sys.argv[3]:
        raise ValueError("its contents are wrong")

print("ready", flush=True)
sys.stdin.readline()
fetch(RemoteFile("file.gz", (sys.argv[1],), verify), Path(sys.argv[2]))
"""


@pytest.fixture
def start(server, tmp_path):
    """Start a process that fetches the file once it is sent a line."""
    started = []

    def start():
        digest = hashlib.sha256(GOOD).hexdigest()
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, server.url, tmp_path, digest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_of_many_processes_one_downloads(server, tmp_path, start):
    server.files["/file.gz"] = GOOD
    processes = [start() for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert server.requests == [("/file.gz", None)]
    assert (tmp_path / "file.gz").read_bytes() == GOOD


def test_a_killed_download_goes_on_where_it_was(server, tmp_path, start):
    server.files["/file.gz"] = GOOD
    server.stall.add("/file.gz")
    process = start()
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while sum(path.stat().st_size for path in tmp_path.rglob("*.part")) < len(GOOD) // 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "file.gz").exists()
    server.stall.clear()
    assert get(remote(server.url), tmp_path).read_bytes() == GOOD
    assert left_in(tmp_path) == ["file.gz"]
    assert server.requests[-1] == ("/file.gz", f"bytes={len(GOOD) // 2}-")


def test_nothing_is_printed_where_nobody_looks_and_a_bar_where_asked(server, tmp_path, capfd):
    server.files["/file.gz"] = GOOD
    get(remote(server.url), tmp_path / "1")
    assert capfd.readouterr() == ("", "")
    get(remote(server.url), tmp_path / "2", progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "file.gz" in printed.err
    assert "512.0/512.0 kB" in printed.err
    assert logging.getLogger("pooch").level != logging.WARNING
