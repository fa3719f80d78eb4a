"""The text of one record, decoded or refused with a reason.

orjson decodes; what it refuses is looked at again, slowly, to say why. It would take the last of two equal keys in
silence, so :func:`suspects_duplicates` compares the number of ``":`` in the text with the number of keys that came out:
when they agree, and no space stands before a colon, there was no second key. Otherwise the standard library counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import orjson

from .errors import RecordError
from .scanning import deepest

MAX_DEPTH = 64
"""Nesting that no data set has, and that a recursive program after us may not survive."""

UNDECODED = frozenset(
    (
        "utf8",
        "nul_byte",
        "too_deep",
        "nan",
        "surrogate",
        "duplicate_key",
        "syntax",
        "truncated",
        "too_large",
        "trailing",
    )
)
"""Codes of records that could not be decoded."""

_SPACED_KEY = re.compile(rb'"[ \t\r\n]+:')


def decode(text: bytes) -> object:
    """Return the value of ``text``, or a :class:`RecordError` with one of the codes

    ``utf8``, ``nul_byte``, ``too_deep``, ``nan`` (NaN or Infinity), ``surrogate`` (half a surrogate pair),
    ``duplicate_key``, ``syntax``. ``offset`` of the error is the byte within ``text`` where known. The error is
    returned, not raised: it takes the record's place.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _fault(text, error)
    if suspects_duplicates(text, [value]):
        return _counted(text, value)
    return value


def suspects_duplicates(text: bytes, values: Iterable[object]) -> bool:
    """Return False if ``text``, which decodes to ``values``, surely has no object with the same key twice.

    True also for values that are nested too deeply to be counted.
    """
    return text.count(b'":') != _key_count(values) or _SPACED_KEY.search(text) is not None


def _key_count(values: Iterable[object]) -> int:
    """Return the number of keys in all objects of ``values``, -1 if one is nested deeper than :data:`MAX_DEPTH`."""
    count = 0
    level: list[Iterable[Any]] = [values]
    for _ in range(MAX_DEPTH + 1):
        below: list[Iterable[Any]] = []
        for container in level:
            for value in container:
                if value.__class__ is dict:
                    count += len(value)
                    below.append(value.values())
                elif value.__class__ is list:
                    below.append(value)
        if not below:
            return count
        level = below
    return -1


def _counted(text: bytes, value: object) -> object:
    """Return ``value``, or the fault if an object of ``text`` has a key twice or is nested too deeply to tell."""
    if deepest(text) > MAX_DEPTH:
        return RecordError(f"nested deeper than {MAX_DEPTH} levels", code="too_deep")
    try:
        json.loads(text, object_pairs_hook=_pairs)
    except _DuplicateKeyError as error:
        return RecordError(f"the key {str(error)[:80]!r} occurs twice in one object", code="duplicate_key")
    return value


class _DuplicateKeyError(Exception):
    pass


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return fields


class _ConstantError(Exception):
    pass


def _refuse_constant(name: str) -> object:
    raise _ConstantError(name)


def _fault(text: bytes, error: orjson.JSONDecodeError) -> RecordError:
    """Say why orjson refused ``text``."""
    if b"\0" in text:
        return RecordError("a NUL byte", code="nul_byte", offset=text.index(b"\0"))
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return RecordError(f"not UTF-8: {wrong.reason}", code="utf8", offset=wrong.start)
    if deepest(text) > MAX_DEPTH:
        return RecordError(f"nested deeper than {MAX_DEPTH} levels", code="too_deep")
    try:
        json.loads(decoded, parse_constant=_refuse_constant, parse_int=float)
    except _ConstantError as constant:
        return RecordError(f"{constant} is not JSON", code="nan", offset=text.find(str(constant).encode()))
    except json.JSONDecodeError as wrong:
        offset = len(decoded[: wrong.pos].encode())
        return RecordError(f"not valid JSON: {wrong.msg}", code="syntax", offset=offset)
    except ValueError as wrong:
        return RecordError(f"not valid JSON: {wrong}", code="syntax")
    if "surrogate" in error.msg:  # the standard library lets it pass
        return RecordError("the text holds half a surrogate pair", code="surrogate")
    return RecordError(f"not valid JSON: {error.msg}", code="syntax")
