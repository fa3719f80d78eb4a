"""Where a plain file can be cut for several readers, without reading all of it.

The records of a file begin alike (see :mod:`.splitting`). So the last such beginning before every further half
megabyte is looked for, and the stretches between are read elsewhere, at the same time. For an array that is a guess;
who reads a stretch proves it: JSON is self-delimiting, so if a stretch begins with a record and is a list of values,
then another record begins behind it. A stretch that is none is left to :func:`.splitting.array_runs`, with all behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from .splitting import Cursor, Run, decode_lines, decode_run

STRETCH = 1 << 19
"""Bytes of a stretch, about: they stay in a processor's own cache."""

_LOOKED_AT = 1 << 14  # bytes before a cut where the beginning of a record is looked for at first


class Stretch(NamedTuple):
    """Whole records from byte ``start`` on; the next begins at ``end``, and ``gap`` bytes before it are between."""

    start: int
    end: int
    gap: int
    layout: str

    def read(self, path: Path) -> tuple[Run, int] | None:
        """Return the records of the file as a run with number and line 1, and the number of newlines.

        None if the stretch is not what it was taken for.
        """
        with path.open("rb", buffering=0) as file:
            text = os.pread(file.fileno(), self.end - self.start, self.start)
        if len(text) < self.end - self.start:
            return None
        newlines = text.count(b"\n") if b"\n" in text else 0  # to find none is quicker than to count none
        text = text[: len(text) - self.gap]
        try:
            values = decode_lines(text) if self.layout == "lines" else decode_run(text, "array")
        except orjson.JSONDecodeError:
            return None
        start = Cursor(offset=self.start)
        return Run(start, values, text, self.layout, start), newlines


def stretches(file: int, layout: str, cursor: Cursor) -> Iterator[Stretch]:
    """Yield stretches from ``cursor`` on, as far as cuts can be guessed; the end of the file is never within one."""
    mark = b"\n" if layout == "lines" else cursor.opening
    if not mark or cursor.glued:
        return
    # Where in the mark one record ends, and where the next begins.
    last, following = (1, mark.index(b"{")) if layout == "array" else (0, 1)
    size, start = os.fstat(file).st_size, cursor.offset
    while start + STRETCH + len(mark) < size:
        found = _cut(file, mark, start)
        if found < 0:
            return
        yield Stretch(start, found + following, following - last, layout)
        start = found + following


def _cut(file: int, mark: bytes, start: int) -> int:
    """Return the byte of the last ``mark`` within a stretch from ``start`` on, or -1."""
    for size in (_LOOKED_AT, STRETCH):
        begin = max(start, start + STRETCH - size)
        found = os.pread(file, STRETCH - (begin - start), begin).rfind(mark)
        if found >= 0:
            return begin + found
    return -1
