"""The text of one record, decoded or refused with a reason.

orjson decodes; what it refuses is looked at again, slowly, to say why. Two things it would pass over in silence: of two
equal keys it takes the last, and an integer of more than 64 bits it makes a float. :func:`may_repeat_keys` and
:func:`is_sound` rule both out cheaply; where they cannot, the standard library decodes again.
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

_COLON = re.compile(rb"\\u003[aA]")
_BEYOND_64_BITS = float(1 << 63)


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
    if may_repeat_keys(text, value) or not is_sound((value,)):
        return _exactly(text)
    return value


def encode(value: object) -> bytes:
    """Return ``value`` as JSON on one line, UTF-8; integers may have any number of digits.

    Raises ``TypeError`` (or its subclass ``orjson.JSONEncodeError``) for what JSON cannot hold.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # half a surrogate pair is a ValueError, too
            raise TypeError(str(error)) from None


def may_repeat_keys(text: bytes, value: object) -> bool:
    """Return False if ``text``, which decodes to ``value``, surely has no object with the same key twice.

    A colon stands behind each key, and else only within strings. Hence a text has as many as its value written anew,
    if nothing of it was dropped and no string hides one behind an escape.
    """
    if _COLON.search(text):
        return True
    try:
        return text.count(b":") != orjson.dumps(value).count(b":")
    except orjson.JSONEncodeError:  # nested too deeply
        return True


def is_sound(values: Iterable[object]) -> bool:
    """Return whether all ``values`` nest at most :data:`MAX_DEPTH` deep and no float may have been a large integer."""
    level: list[Iterable[Any]] = [values]
    for _ in range(MAX_DEPTH + 1):
        below: list[Iterable[Any]] = []
        for container in level:
            for value in container:
                kind = value.__class__
                if kind is dict:
                    below.append(value.values())
                elif kind is list:
                    below.append(value)
                elif kind is float and abs(value) >= _BEYOND_64_BITS:
                    return False
        if not below:
            return True
        level = below
    return False


def _exactly(text: bytes) -> object:
    """Return the value of ``text`` with integers as they are, or the fault of a key twice or too deep nesting."""
    if deepest(text) > MAX_DEPTH:
        return RecordError(f"nested deeper than {MAX_DEPTH} levels", code="too_deep")
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except _DuplicateKeyError as error:
        return RecordError(f"the key {str(error)[:80]!r} occurs twice in one object", code="duplicate_key")


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
