"""A small WebDriver client: headless Chromium through chromedriver, over HTTP on loopback."""

import base64
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def missing() -> str | None:
    """Return which program is not here, or None."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        return "no Chromium here (Debian: apt-get install chromium)"
    if not shutil.which("chromedriver"):
        return "no chromedriver here (Debian: apt-get install chromium-driver)"
    return None


class Browser:
    """An open browser window."""

    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = requests.post(f"{self._base}{path}", json=body, timeout=60).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{answer['error']}: {answer['message']}")
        return answer

    def open(self, page: Path) -> None:
        """Load a file and wait until it says that it is drawn."""
        self._post("/url", {"url": page.resolve().as_uri()})
        self.wait("return document.documentElement.dataset.ready !== undefined")

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: object) -> None:
        """Wait until the script returns something true."""
        wrapped = (
            "const [done, ...rest] = [arguments[arguments.length - 1], ...arguments];"
            f"const test = function () {{ {script} }};"
            "const poll = () => test(...rest) ? done(true) : setTimeout(poll, 20); poll();"
        )
        self._post("/execute/async", {"script": wrapped, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click an element as a person would: scrolled into view, and only if it is on top."""
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{next(iter(found.values()))}/click", {})

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """Be a screen of this many pixels."""
        self._cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def scheme(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._cdp("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as PNG."""
        answer = self._cdp("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def console(self) -> list[str]:
        """Return errors and warnings that the console has got since the last call."""
        entries = self._post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def _cdp(self, name: str, **parameters: object) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def quit(self) -> None:
        """Close the window."""
        requests.delete(self._base, timeout=60)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start chromedriver and a browser with a profile of its own; stop both at the end."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert driver is not None
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            address = f"http://127.0.0.1:{_port(process)}"
            options = {
                "binary": binary,
                "args": [*_FLAGS, f"--user-data-dir={profile}/profile"],
            }
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = requests.post(
                f"{address}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60
            ).json()["value"]
            window = Browser(address, answer["sessionId"])
            try:
                yield window
            finally:
                window.quit()
        finally:
            process.terminate()
            process.wait(timeout=10)


def _port(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"started successfully on port (\d+)", line)
        if found:
            return int(found.group(1))
    raise AssertionError("chromedriver did not start")
