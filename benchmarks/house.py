"""The size and shape of the code, of a commit and of this tree side by side.

``python -m benchmarks.house COMMIT`` counts lines, modules and the longest functions, how often the
settings of a pruning are written, how often a stage of QM builds a network and calls the user's,
and through how many modules a run's sparsity passes as a number.  The last two are counted while
each tree runs, by the same program.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.equality import checkout
from benchmarks.equality_runs import ROOT, environment

LONG_MODULE, LONG_FUNCTION = 300, 50
SETTINGS = """
    criterion sparsity data examples stages schedule reg parameters exclude scope pattern loss
    forward estimator memory seed sharded
"""
MANY = 8  # of these names, the criterion among them, list the settings of a pruning

STAGES_PROGRAM = """
import json, torch
import lossprune
from torch import nn
from lossprune.pruning.curvature import network
built = []
kind = network.PrunableNetwork if hasattr(network, "PrunableNetwork") else network.Network
before = kind.__init__
def counted(self, *args, **kwargs):
    built.append(self)
    before(self, *args, **kwargs)
kind.__init__ = counted
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
calls = []
model.register_forward_hook(lambda *_: calls.append(1))
batches = [(torch.randn(50, 20), torch.randint(10, (50,))) for _ in range(2)]
told = {}
for criterion in ("QM", "EF-OBD", "GraSP"):
    built.clear(), calls.clear()
    lossprune.prune(model, criterion, sparsity=0.9, data=batches, stages=14)
    told[criterion] = [len(built), len(calls)]
print(json.dumps(told))
"""

SPARSITY_PROGRAM = """
import json, sys, tempfile
from lossprune.cli import main
sparsity, modules = 0.7654321, set()
def watch(frame, event, _):
    name = frame.f_globals.get("__name__", "")
    if event == "return" and name.startswith("lossprune"):
        values = frame.f_locals.values()
        if any(type(value) is float and value == sparsity for value in values):
            modules.add(name)
with tempfile.TemporaryDirectory() as folder:
    arguments = ["run", "--arch", "MLP", "--dataset", "digits", "--pm", "MP", "--pi", "2",
                 "--nepochs", "1", "--threads", "1", "--path", folder, "--pr", str(sparsity)]
    sys.setprofile(watch)
    status = main(arguments)
    sys.setprofile(None)
assert status == 0
print(json.dumps(sorted(modules)), file=sys.__stderr__)
"""


@dataclass(frozen=True)
class Function:
    """A function: where it is, and the lines of its body without the docstring."""

    where: str
    lines: int


def python_files(tree: Path) -> list[Path]:
    return sorted((tree / "src" / "lossprune").rglob("*.py"))


def functions(tree: Path) -> Iterator[Function]:
    for path in python_files(tree):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore
                yield Function(f"{path.name}:{node.name}", lines)


def settings_written(tree: Path) -> int:
    """Count the places in pruning/ that list a pruning's settings by name."""
    places = 0
    for path in python_files(tree):
        if "pruning" in path.parts:
            for node in ast.walk(ast.parse(path.read_text())):
                for names in lists_at(node):
                    places += "criterion" in names and len(names & set(SETTINGS.split())) >= MANY
    return places


def lists_at(node: ast.AST) -> Iterator[set[str]]:
    """Give names listed together: parameters, attributes assigned, fields, or arguments."""
    if isinstance(node, ast.FunctionDef):
        yield {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        assignments = (line for line in node.body if isinstance(line, ast.Assign))
        targets = (target for line in assignments for target in line.targets)
        yield {target.attr for target in targets if isinstance(target, ast.Attribute)}
    elif isinstance(node, ast.ClassDef):
        fields = (line for line in node.body if isinstance(line, ast.AnnAssign))
        yield {line.target.id for line in fields if isinstance(line.target, ast.Name)}
    elif isinstance(node, ast.Call):
        given = {argument.id for argument in node.args if isinstance(argument, ast.Name)}
        yield given | {keyword.arg for keyword in node.keywords if keyword.arg}


def counted(tree: Path, program: str, folder: Path) -> object:
    """Return the last line that a program says, as JSON, with the tree's own lossprune."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(tree, folder),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    said = done.stderr if program is SPARSITY_PROGRAM else done.stdout
    return json.loads(said.strip().splitlines()[-1])


def measured(tree: Path, folder: Path) -> dict[str, str]:
    """Return what is known of a tree, by what it is called in the table."""
    lines = {path: len(path.read_text().splitlines()) for path in python_files(tree)}
    bodies = sorted(functions(tree), key=lambda function: -function.lines)
    stages = counted(tree, STAGES_PROGRAM, folder)
    assert isinstance(stages, dict)
    modules = counted(tree, SPARSITY_PROGRAM, folder)
    assert isinstance(modules, list)
    return {
        "lines of Python in src": f"{sum(lines.values()):,}",
        "modules": str(len(lines)),
        f"modules over {LONG_MODULE} lines": str(sum(n > LONG_MODULE for n in lines.values())),
        "longest function body": f"{bodies[0].lines} ({bodies[0].where})",
        f"functions over {LONG_FUNCTION}": str(sum(f.lines > LONG_FUNCTION for f in bodies)),
        "a pruning's settings are written": str(settings_written(tree)),
        **{
            f"networks built, calls: 14 stages of {name}": f"{built}, {calls}"
            for name, (built, calls) in stages.items()
        },
        "modules that hold --pr": f"{len(modules)}",
        **{f"  {number}": name for number, name in enumerate(modules, start=1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("commit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lossprune-house-") as place:
        folder = Path(place).resolve()
        (folder / "work").mkdir()
        with checkout(arguments.commit, folder / "tree") as tree:
            before, now = (measured(one, folder / "work") for one in (tree, ROOT))
    print(f"{'':<44}{arguments.commit:<44}this tree")
    for name in dict.fromkeys((*before, *now)):
        print(f"{name:<44}{before.get(name, ''):<44}{now.get(name, '')}")


if __name__ == "__main__":
    main()
