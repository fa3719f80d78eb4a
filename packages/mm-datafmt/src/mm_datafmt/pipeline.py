"""Two passes that write nothing: read a file's samples, check them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .checking.passing import check
from .errors import RecordError
from .formats import find_format
from .opening import opened, raise_if_undecoded
from .report import place
from .sample import Sample

__all__ = ["check", "read"]


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
                raise RecordError(
                    f"{path}: {place(where.number, where.line)}: {fault}",
                    code=fault.code,
                    record=where.number,
                    line=where.line,
                    offset=where.offset,
                ) from None
