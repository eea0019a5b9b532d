"""JSON in files that may be damaged or forged.  No torch here: records are read in a moment."""

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

_DEEPEST = 64  # nothing that is written here comes near it, and nothing recurses too far over it
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, nested more than 64 deep, or has a name twice in one object.

    >>> parse_json('{"a": [1]}')
    {'a': [1]}
    """
    if isinstance(text, bytes):
        text = text.decode()
    brackets = _BRACKET.findall(_STRING.sub("", text))
    if max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0) > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    return json.loads(text, object_pairs_hook=_once)


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as it is written: with the SHA-256 of what else it holds.

    >>> parse_digested(json.dumps(with_digest({"a": 1})))
    {'a': 1}
    """
    return {**values, "sha256": digest_of(values)}


def parse_digested(text: str | bytes) -> dict[str, Any]:
    """Return an object as it was before :func:`with_digest`; older files have no digest.

    Raises:
        ValueError: as :func:`parse_json`, or it is not as it was written.
    """
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    digest = values.pop("sha256", None)
    if digest is not None and digest != digest_of(values):
        raise ValueError("its contents are not those that were written")
    return values


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an object, in the order of its names."""
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return named
