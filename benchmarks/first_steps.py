"""How long a stranger needs from a network and data of one's own to ONNX, from the shell alone.

``python -m benchmarks.first_steps`` builds a wheel of this checkout, installs it with its extras
for deployment and ONNX into an environment of its own, writes the files that docs/deployment.md
shows under "From training to ONNX" into an empty folder, runs its commands there as they stand, and
prints the seconds of each.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADING = "### From training to ONNX"


def blocks() -> list[str]:
    """The blocks of code below the heading, up to the next one."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    text = text[text.index(HEADING) + len(HEADING) :]
    return re.findall(r"^```\w*\n(.*?)^```$", text[: text.index("\n### ")], flags=re.M | re.S)


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    return time.perf_counter() - began


def install(folder: Path) -> Path:
    """Make an environment with a wheel of this checkout; return the folder of its programs."""
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / "bin"
    pip = [str(programs / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    pinned = ROOT / "constraints.txt"
    subprocess.run([*pip, "install", "-c", pinned, f"{wheel}[deploy,onnx]"], check=True)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, help="folder of an installed lossprune instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        began = time.perf_counter()
        programs = given.programs or install(folder)
        if given.programs is None:
            print(f"installed from a wheel in {time.perf_counter() - began:.0f} s", flush=True)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        (folder / "mine").mkdir()
        rows = []
        for block in blocks():
            if named := re.match(r"# (\w+\.py)\n", block):
                (folder / "mine" / named[1]).write_text(block)
                continue
            for command in re.sub(r"\\\n\s*", "", block).splitlines():
                words = ["bash", "-c", command]
                rows.append((timed(words, folder / "mine", environment), command))
        for seconds, command in rows:
            print(f"{seconds:7.1f} s  {command}")
        print(f"{sum(seconds for seconds, _ in rows):7.1f} s  in {len(rows)} commands")
        size = (folder / "mine" / "deployed" / "network.onnx").stat().st_size
        print(f"network.onnx: {size:,} bytes")


if __name__ == "__main__":
    main()
