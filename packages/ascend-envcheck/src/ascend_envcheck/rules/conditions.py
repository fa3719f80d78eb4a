"""The conditions of a JSON pack: a small closed language over a snapshot.

::

    {"distribution": "diffusers", "version": ">=0.31,!=0.32.0"}    installed, and of such a version
    {"distribution": "diffusers", "installed": false}
    {"variable": "HCCL_BUFFSIZE", "matches": "^[0-9]+$"}           set, and the value has the pattern somewhere
    {"variable": "HCCL_BUFFSIZE", "is_set": true}
    {"path": "/usr/local/Ascend/nnal", "exists": true}
    {"command": "npu-smi info", "matches": "Alarm|Critical"}       what it printed has the pattern somewhere
    {"all": [...]}   {"any": [...]}   {"not": {...}}

A condition is true, false, or unknown where the snapshot does not tell; all, any and not treat unknown as SQL does.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Iterable, Mapping, Sequence

from ascend_envcheck.probes.python import DISTRIBUTIONS, variables
from ascend_envcheck.probes.redact import MASKED
from ascend_envcheck.rules import version_spec
from ascend_envcheck.snapshot import NOT_RUN, Snapshot

Condition = Callable[[Snapshot], "bool | None"]

TESTS: Mapping[str, Mapping[str, str]] = {
    "distribution": {"version": "version", "installed": "bool"},
    "variable": {"matches": "regex", "is_set": "bool"},
    "path": {"exists": "bool"},
    "command": {"matches": "regex"},
}
"""What a condition may speak of, the tests that each has, and what a test is compared with."""

MANY, ONE = ("all", "any"), "not"
_DEEPEST = 32


class ConditionError(ValueError):
    """A condition that is none; the message names the place."""


def condition(data: Any, where: str, depth: int = 0) -> Condition:
    """The condition that a JSON value spells.

    Raises:
        ConditionError: it spells none.
    """
    if depth > _DEEPEST:
        raise ConditionError(f"{where}: more than {_DEEPEST} conditions inside each other")
    if not isinstance(data, dict):
        raise ConditionError(f"{where}: {_LEGAL}")
    if len(data) == 1 and set(data) <= {*MANY, ONE}:
        ((word, inner),) = data.items()
        return _combined(word, inner, f"{where}.{word}", depth + 1)
    subject = next((key for key in data if key in TESTS), None)
    if subject is None or len(data) != 2:
        raise ConditionError(f"{where}: {_LEGAL}")
    test = next(key for key in data if key != subject)
    if test not in TESTS[subject]:
        raise ConditionError(
            f"{where}.{test}: {subject} is tested by {' or '.join(TESTS[subject])}, and by one of them"
        )
    name = data[subject]
    if not isinstance(name, str) or not name:
        raise ConditionError(f"{where}.{subject}: must be a name")
    expected = _EXPECTED[TESTS[subject][test]](data[test], f"{where}.{test}")
    return _LEAVES[subject](name, test, expected)


_LEGAL = (
    "must be an object with a test, as "
    + ", ".join(f'{{"{subject}": …, "{"|".join(tests)}": …}}' for subject, tests in TESTS.items())
    + ', or {"all": […]}, {"any": […]}, {"not": {…}}'
)


def _combined(word: str, inner: Any, where: str, depth: int) -> Condition:
    if word == ONE:
        negated = condition(inner, where, depth)
        return lambda snapshot: _not(negated(snapshot))
    if not isinstance(inner, list) or not inner:
        raise ConditionError(f"{where}: must be a list of conditions, one or more")
    parts = [condition(item, f"{where}[{number}]", depth) for number, item in enumerate(inner)]
    decisive = word == "any"
    return lambda snapshot: _first(decisive, (part(snapshot) for part in parts))


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _first(decisive: bool, values: Iterable[bool | None]) -> bool | None:
    """The decisive value where one has it, else unknown where one is, else the other."""
    seen = list(values)
    return decisive if decisive in seen else None if None in seen else not decisive


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConditionError(f"{where}: must be true or false")
    return value


def _pattern(value: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ConditionError(f"{where}: must be a regular expression of Python: {error}") from error


def _version(value: Any, where: str) -> str:
    trouble = version_spec.fault(value) if isinstance(value, str) else "must be text"
    if trouble:
        raise ConditionError(f"{where}: {trouble}")
    return str(value)


_EXPECTED: Mapping[str, Callable[[Any, str], Any]] = {"bool": _boolean, "regex": _pattern, "version": _version}


def _distribution(name: str, test: str, expected: Any) -> Condition:
    wanted = _normal(name)
    recorded = wanted in map(_normal, DISTRIBUTIONS)

    def judge(snapshot: Snapshot) -> bool | None:
        version = next((d.version for n, d in snapshot.distributions.items() if _normal(n) == wanted), None)
        if version is None and not recorded:
            return None
        if test == "installed":
            return (version is not None) is bool(expected)
        return False if version is None else version_spec.meets(version, expected)

    return judge


def _variable(name: str, test: str, expected: Any) -> Condition:
    def judge(snapshot: Snapshot) -> bool | None:
        value = snapshot.variables.get(name)
        if value is None and name not in variables({name: ""}):
            return None
        if test == "is_set":
            return (value is not None) is bool(expected)
        if value == MASKED:
            return None
        return value is not None and expected.search(value) is not None

    return judge


def _path(name: str, test: str, expected: Any) -> Condition:
    folder, _, last = name.rstrip("/").rpartition("/")

    def judge(snapshot: Snapshot) -> bool | None:
        seen: Sequence[Mapping[str, Any]] = (snapshot.paths, snapshot.files, snapshot.folders, snapshot.devices)
        if any(name.rstrip("/") in each for each in seen):
            return bool(expected)
        names = snapshot.folders.get(folder)
        return None if names is None else (last in names) is bool(expected)

    return judge


def _command(name: str, test: str, expected: Any) -> Condition:
    def judge(snapshot: Snapshot) -> bool | None:
        answer = snapshot.command(name)
        return None if answer.outcome == NOT_RUN else expected.search(answer.output) is not None

    return judge


_LEAVES: Mapping[str, Callable[[str, str, Any], Condition]] = {
    "distribution": _distribution,
    "variable": _variable,
    "path": _path,
    "command": _command,
}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
