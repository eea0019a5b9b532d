"""Reading plans: TOML files and the command line's ``flag=value`` pairs, checked flag by flag."""

import shlex
import tomllib
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any

from lossprune.flags import AUTO, Flag, did_you_mean, entries
from lossprune.sweep.plan import FLAGS, Choices, Plan

# What is said of a sweep as a whole, by flags of the command.
_ELSEWHERE = ("path", "data_path", "mirror", "debug")


def _bundled() -> dict[str, str]:
    folder = files("lossprune.sweep") / "plans"
    texts = {item.name.removesuffix(".toml"): item for item in folder.iterdir()}
    order = ("mlp-mnist", "vgg11-cifar10", "preactresnet18-cifar10")
    return {name: texts[name].read_text(encoding="utf-8") for name in order}


PLANS = _bundled()
"""The published grids, by name: the text of each plan."""


def describe_plans() -> str:
    """Return what PLAN may be, and the bundled plans with the first line of each."""
    told = {name: text.partition("\n")[0].removeprefix("# ") for name, text in PLANS.items()}
    title = "PLAN is a TOML file of your own, or one of these:"
    return "\n".join([title, "", *entries(told)])


def read_plan(source: str) -> Plan:
    """Read a bundled plan by its name, or a file.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: it is not TOML, or names a flag or value that is not accepted.
    """
    if source in PLANS:
        return parse_plan(PLANS[source], source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"PLAN must be one of {', '.join(PLANS)} or a TOML file, got {source!r}"
            + did_you_mean(source, PLANS)
        )
    try:
        return parse_plan(path.read_text(encoding="utf-8"), path.name.removesuffix(".toml"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a TOML file: it is not text") from None


def parse_plan(text: str, name: str) -> Plan:
    """Return the plan that a TOML text describes; errors as :func:`read_plan`."""
    try:
        content = tomllib.loads(text)
    except ValueError as error:  # also of a number with more digits than Python reads
        raise ValueError(f"plan {name} is not TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"plan {name}: its lists or tables are nested too deeply") from None
    baseline = content.pop("baseline", None)
    drop, keep = (_rules(content.pop(kind, []), kind, name) for kind in ("drop", "keep"))
    _check_sections(content, name)
    axes = {flag: _axis(flag, value, name) for flag, value in content.items()}
    if baseline is not None:
        if not isinstance(baseline, dict):
            raise ValueError(f"plan {name}: baseline must be a table, [baseline]")
        if "model_0" in axes:
            raise ValueError(f"plan {name}: give model_0 or [baseline], not both")
        baseline = {
            flag: check_value(flag, value, f"plan {name} [baseline]")
            for flag, value in baseline.items()
        }
        baseline.setdefault("pe", -1)
    if not axes:
        raise ValueError(
            f"plan {name} names no flag of lossprune run: give it one at least, "
            'such as arch = "MLP"'
        )
    return Plan(name, axes, baseline, drop, keep)


def _check_sections(content: dict[str, Any], name: str) -> None:
    """Refuse tables other than those that a plan may have."""
    for section, value in content.items():
        tables = value if isinstance(value, list) else [value]
        if any(isinstance(table, dict) for table in tables):
            known = {"baseline": "[baseline]", "drop": "[[drop]]", "keep": "[[keep]]"}
            near = get_close_matches(section.lower(), known, n=1)
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            raise ValueError(
                f"plan {name}: unknown section [{section}]: it must be one of "
                f"{', '.join(known.values())}{hint}"
            )


def parse_choices(text: str | None, option: str) -> Choices:
    """Return the pairs of ``pm=QM,pi=14``, each value of its flag's type.

    A value in double quotes may hold commas, as the names of a run's folder do.

    >>> parse_choices("pm=QM,pi=14", "only")
    (('pm', 'QM'), ('pi', 14))
    """
    pairs = []
    for part in _split(text or "", option):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals:
            raise ValueError(f"--{option} must be flag=value,flag=value, got {text!r}")
        flag = name.removeprefix("baseline.") if option == "set" else name
        pairs.append((name, check_value(flag, _typed(flag, value, option), f"--{option}")))
    return tuple(pairs)


def _split(text: str, option: str) -> list[str]:
    """Split at the commas that are not in double quotes, and drop these quotes."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace, lexer.whitespace_split = ",", True
    lexer.quotes, lexer.escape, lexer.commenters = '"', "", ""
    try:
        return list(lexer)
    except ValueError:
        raise ValueError(f"--{option} has a double quote that is not closed: {text!r}") from None


def _typed(flag: str, text: str, option: str) -> Any:
    """Read a value as the flag's type would."""
    kinds = _flag(flag, f"--{option}").kinds
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _rules(rules: Any, kind: str, name: str) -> tuple[dict[str, tuple[Any, ...]], ...]:
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError(f"plan {name}: {kind} must be written [[{kind}]], a table for each rule")
    return tuple({flag: _axis(flag, value, name) for flag, value in rule.items()} for rule in rules)


def _axis(flag: str, value: Any, name: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"plan {name}: {flag} is an empty list")
    return tuple(check_value(flag, one, f"plan {name}") for one in values)


def check_value(flag: str, value: Any, where: str) -> Any:
    """Return the value as the type of its flag, or raise a ValueError that says what it must be."""
    kinds = _flag(flag, where).kinds
    numeric = int in kinds or float in kinds
    if value == "None" and NoneType in kinds:  # as on the command line: TOML has no word for it
        return None
    if isinstance(value, bool) or bool in kinds:
        if isinstance(value, bool) and bool in kinds:
            return value
    elif isinstance(value, str) and numeric:
        if str in kinds and value == AUTO:
            return value
    elif isinstance(value, (int, float)) and float in kinds:
        return float(value)
    elif isinstance(value, str) and Path in kinds:
        return Path(value)
    elif isinstance(value, tuple(kinds)):
        return value
    names = _KIND_NAMES | ({str: f'"{AUTO}"'} if numeric else {})
    accepted = " or ".join(names[kind] for kind in kinds)
    raise ValueError(f"{where}: {flag} must be {accepted}, got {value!r}")


_KIND_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    NoneType: "None",
}


def _flag(name: str, where: str) -> Flag:
    if name in _ELSEWHERE:
        raise ValueError(f"{where}: {name} is a flag of the sweep itself: give --{name}")
    if name not in FLAGS:
        raise ValueError(
            f"{where}: unknown flag {name!r}"
            + (did_you_mean(name, FLAGS) or "; see lossprune run --help")
        )
    return FLAGS[name]
