"""Conditions on versions in the manner of Python's packaging: ``>=2.6,<2.9``, ``!=0.29.0``, ``==2.7.*``, ``~=4.49``.

Source of the order: the version specifiers specification of the Python Packaging User Guide (PEP 440), without epochs;
local labels (``+cpu``) are of no account.
"""

from __future__ import annotations

import re
from typing import Tuple

_VERSION = re.compile(
    r"v?(?P<release>\d{1,9}(?:\.\d{1,9}){0,9})"
    r"(?:[-_.]?(?P<pre>alpha|beta|preview|pre|rc|a|b|c)[-_.]?(?P<pre_number>\d{0,9}))?"
    r"(?:-(?P<bare_post>\d{1,9})|[-_.]?(?:post|rev|r)[-_.]?(?P<post>\d{0,9}))?"
    r"(?P<dev_sign>[-_.]?dev[-_.]?(?P<dev>\d{0,9}))?"
    r"(?:\+[a-z0-9._-]*)?\Z",
    re.IGNORECASE | re.ASCII,
)
_CLAUSE = re.compile(r"(===|==|!=|<=|>=|<|>|~=)\s*(\S+)\Z")
_PRE = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "c": 2, "rc": 2, "pre": 2, "preview": 2}
_FINAL = 3
_LAST = 10**9

Key = Tuple[Tuple[int, ...], Tuple[int, int], int, int]


def key(version: str) -> Key | None:
    """By which versions sort: release without zeros at its end, pre-release, post-release, development release."""
    found = _VERSION.match(version.strip())
    if not found:
        return None
    release = [int(part) for part in found["release"].split(".")]
    while release and release[-1] == 0:
        release.pop()
    pre = (_PRE[found["pre"].lower()], int(found["pre_number"] or 0)) if found["pre"] else (_FINAL, 0)
    post = int(found["bare_post"] or found["post"] or 0) if found["bare_post"] or found["post"] is not None else -1
    developing = found["dev_sign"] is not None
    if developing and not found["pre"] and post < 0:
        pre = (-1, 0)  # a development release of a final one is older than its alpha
    return tuple(release), pre, post, int(found["dev"] or 0) if developing else _LAST


def fault(spec: str) -> str:
    """What is wrong with a condition, in words; empty when nothing is."""
    for clause in spec.split(","):
        found = _CLAUSE.match(clause.strip())
        if not found or found[1] == "===":
            return f"{clause.strip()!r} is none of ==V, !=V, <V, <=V, >V, >=V, ~=V"
        wildcard = found[2].endswith(".*") and found[1] in ("==", "!=")
        if not re.match(r"\d+(\.\d+)*\Z", found[2][:-2]) if wildcard else key(found[2]) is None:
            return f"{found[2]!r} is no version that {found[1]} compares with"
        if found[1] == "~=" and len(_release(found[2])) < 2:
            return f"~= needs two numbers or more, {found[2]!r} has one"
    return ""


def meets(version: str, spec: str) -> bool | None:
    """Whether a version meets all clauses of a faultless condition; None when it is no version."""
    if key(version) is None:
        return None
    return all(
        _meets(version, *found.groups()) for found in map(_CLAUSE.match, map(str.strip, spec.split(","))) if found
    )


def _meets(version: str, operator: str, wanted: str) -> bool:
    if operator in ("==", "!=") and wanted.endswith(".*"):
        return _has_prefix(version, _release(wanted[:-2])) is (operator == "==")
    if operator == "~=":
        return _compare(version, ">=", wanted) and _has_prefix(version, _release(wanted)[:-1])
    return _compare(version, operator, wanted)


def _compare(version: str, operator: str, wanted: str) -> bool:
    given, other = key(version), key(wanted)
    if given is None or other is None:
        return False
    if operator in ("<", ">") and given[0] == other[0]:
        # 2.7rc1 is not <2.7, 2.7.post1 is not >2.7, unless the condition itself names such a release.
        of_the_same = other[2] < 0 or given[2] == other[2]
        if operator == "<" and _is_early(given) and not _is_early(other) and of_the_same:
            return False
        if operator == ">" and other[2] < 0 and given[2] >= 0 and not _is_early(other):
            return False
    return {
        "==": given == other,
        "!=": given != other,
        "<": given < other,
        "<=": given <= other,
        ">": given > other,
        ">=": given >= other,
    }[operator]


def _is_early(version: Key) -> bool:
    return version[1] != (_FINAL, 0) or version[3] != _LAST


def _release(version: str) -> tuple[int, ...]:
    found = _VERSION.match(version.strip())
    return tuple(int(part) for part in found["release"].split(".")) if found else ()


def _has_prefix(version: str, prefix: tuple[int, ...]) -> bool:
    release = _release(version)
    return (release + (0,) * len(prefix))[: len(prefix)] == prefix
