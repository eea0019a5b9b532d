"""What the data sets' tests share: a real web server, and the folder with real MNIST."""

import os
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_data():
    """The folder that holds MNIST/raw."""
    folder = Path(os.environ.get("LOSSPRUNE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").exists():
        pytest.skip(f"no MNIST/raw in {folder}; LOSSPRUNE_DATA can name another folder")
    return folder


@dataclass
class Served:
    """Files by path, how the server misbehaves, and what was asked of it.

    Attributes:
        files: contents by path, /name.
        cut: for a path, after how many bytes of the file each of the next answers breaks off.
        stall: paths whose answers stop after half of their bytes, for a second.
        broken: for a path, the statuses of the next answers.
        ranges: whether byte ranges are honoured.
        announced: whether the length of an answer is sent.
        requests: (path, Range header) of each request.
        sent: bytes of each answer's body.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    stall: set[str] = field(default_factory=set)
    broken: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    announced: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


@pytest.fixture
def server():
    """A web server on this machine that serves what the test puts into ``files``."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            served.requests.append((self.path, asked))
            if served.broken.get(self.path):
                self.send_error(served.broken[self.path].pop(0))
                return
            if self.path not in served.files:
                self.send_error(404)
                return
            content = served.files[self.path]
            start = 0
            if asked and served.ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            if served.announced:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = served.cut[self.path].pop(0) if served.cut.get(self.path) else len(content)
            if self.path in served.stall:
                self.wfile.write(content[start : len(content) // 2])
                self.wfile.flush()
                time.sleep(1)
                return
            served.sent.append(len(content[start:stop]))  # first: a client is quick to look
            self.wfile.write(content[start:stop])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        served.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        http.shutdown()
        thread.join()
