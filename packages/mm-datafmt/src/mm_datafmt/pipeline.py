"""Passes that write nothing: read a file's samples, check them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .checking.passing import check
from .errors import RecordError
from .formats import find_format
from .inputs import open_input
from .opening import opened, raise_if_undecoded
from .report import place
from .sample import Sample
from .splitting import Place

__all__ = ["check", "read", "read_each"]


def read(path: str | os.PathLike[str], *, format: str | None = None) -> Iterator[Sample]:
    """Yield the samples of ``path`` as they are, in constant memory; only the format's layout is checked.

    ``format`` is a name of :data:`FORMATS`; None takes it from the first records. Raises :class:`FormatError`,
    :class:`ParseError`, :class:`RecordError` at the first record that does not fit, and ``OSError``.
    """
    if format is not None:
        find_format(format)
    return _read(Path(path), format)


def _read(path: Path, format: str | None) -> Iterator[Sample]:
    source, chosen = opened(path, format)
    for run in source.runs():
        for index, value in enumerate(run.values):
            raise_if_undecoded(run, index, str(path))
            try:
                yield chosen.parse(value)
            except RecordError as fault:
                where = run.places()[index]
                raise _placed(fault, where, f"{path}: {place(where.number, where.line)}: ") from None


def read_each(
    path: str | os.PathLike[str], *, parse: Callable[[object], Sample] | None = None
) -> Iterator[Sample | RecordError]:
    """Yield what stands in the place of each record: its sample, or why it has none; no record stops the reading.

    ``parse`` makes a sample of decoded JSON, or raises :class:`RecordError`; None: as the format that the first records
    tell. A fault that is yielded says where its ``record`` stands: its number, ``line`` and ``offset``. Raises
    :class:`FormatError`, :class:`ParseError` if the file as a whole cannot be read, and ``OSError``.
    """
    if parse is None:
        source, chosen = opened(Path(path), None)
        parse = chosen.parse
    else:
        source = open_input(Path(path))
    for run in source.runs():
        places: list[Place] | None = None
        for index, value in enumerate(run.values):
            found = _parsed(value, parse)
            if isinstance(found, RecordError):
                places = places or run.places()
                found = _placed(found, places[index])
            yield found


def _parsed(value: object, parse: Callable[[object], Sample]) -> Sample | RecordError:
    if isinstance(value, RecordError):
        return value
    try:
        return parse(value)
    except RecordError as fault:
        return fault


def _placed(fault: RecordError, where: Place, prefix: str = "") -> RecordError:
    offset = where.offset + (fault.offset or 0)
    return RecordError(f"{prefix}{fault}", code=fault.code, record=where.number, line=where.line, offset=offset)
