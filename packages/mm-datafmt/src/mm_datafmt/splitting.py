"""A stream of bytes, split into records and decoded, in constant memory.

Records come in runs: about a quarter of a megabyte of whole records, decoded by one call. Where a run ends is guessed:
records of a file begin alike (``}, {"id":``), so the last such place in reach is taken, and the decoder proves the
guess. JSON is self-delimiting: if the text up to there is a list of values, it is *the* list of values. If it is not,
the records of the run are taken one by one, each end found by :mod:`mm_datafmt.scanning`.

A record that cannot be decoded becomes a :class:`RecordError` in its place, and reading goes on behind it: at the next
place that looks like the beginning of a record, if there is one before the end that the brackets suggest. Nothing
depends on how the stream is cut into blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from .decoding import decode, is_sound, may_repeat_keys
from .errors import RecordError, shown
from .scanning import ValueScanner, value_ends
from .window import BLOCK, Window

RUN = BLOCK
MAX_RECORD = 64 << 20
"""Largest record in bytes that is held in memory; a larger one is passed over with the code ``too_large``."""

_KEPT = 1 << 16
_REACH = 1 << 18  # how far a broken record may be from the next good one
_LONGEST_OPENING = 1 << 10
_OPENING = re.compile(rb'[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"(?:[^"\\]|\\.){,200}"[ \t\r\n]*:')


class Place(NamedTuple):
    """Where a record stands: number and line from 1, first byte, and the text (of a bad one 64 KiB at most)."""

    number: int
    line: int
    offset: int
    text: bytes


class Cursor(NamedTuple):
    """From where to go on: the next record's number, line and byte.

    ``opening`` is what the splitter has learned till there; ``glued`` says that no comma stands before what is there: a
    record, or the end of it all.
    """

    number: int = 1
    line: int = 1
    offset: int = 0
    opening: bytes = b""
    glued: bool = False


class Run(NamedTuple):
    """Whole records that follow each other, the first at ``start``; ``end`` is from where the next run is read.

    A value is decoded JSON, or a :class:`RecordError` for a record that could not be decoded. ``layout`` says what
    stands between the records in ``text``: ``array`` commas, ``lines`` newlines; ``rows`` have no text.
    """

    start: Cursor
    values: list[object]
    text: bytes
    layout: str
    end: Cursor

    def places(self) -> list[Place]:
        """Return where each record stands. Costs a scan of the run, so it is for those that need it."""
        if self.layout == "rows":  # rows of a table: their number is their place
            first = self.start.number
            return [Place(n, n, n, _dumped(value)) for n, value in enumerate(self.values, first)]
        if len(self.values) == 1 and self.layout == "array":
            spans = [(0, len(self.text))]
        else:
            spans = _line_spans(self.text) if self.layout == "lines" else value_ends(self.text)
        places, line, counted = [], self.start.line, 0
        for number, (start, end) in enumerate(spans, self.start.number):
            line += self.text.count(b"\n", counted, start)
            counted = start
            places.append(Place(number, line, self.start.offset + start, self.text[start:end]))
        return places


def _dumped(value: object) -> bytes:
    try:
        return b"" if isinstance(value, RecordError) else orjson.dumps(value)
    except TypeError:  # a table may hold what JSON cannot
        return repr(value)[:_KEPT].encode("utf-8", "replace")


def decode_run(text: bytes, layout: str) -> list[object]:
    """Return the values of a run's text. Raises ``orjson.JSONDecodeError`` if one cannot be decoded.

    For keys that occur twice, and for large integers, they are still to be looked at: :func:`unrepeated`,
    :func:`mm_datafmt.decoding.is_sound`.
    """
    if layout == "array":
        values: list[object] = orjson.loads(b"[%b]" % text)
        return values
    lines = text.split(b"\n")
    try:
        return list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        return [orjson.loads(line) for line in lines if line.strip()]


def decode_lines(text: bytes) -> list[object]:
    """Return the values of lines; one that cannot be decoded gives its fault."""
    try:
        return decode_run(text, "lines")
    except orjson.JSONDecodeError:
        return [decode(line) for line in text.split(b"\n") if line.strip()]


def unrepeated(text: bytes, layout: str, values: list[object]) -> list[object]:
    """Return ``values``, those apart that have a key twice in ``text``, whose faults take their place."""
    return _one_by_one(text, layout) if may_repeat_keys(text, values) else values


def _checked(text: bytes, layout: str, values: list[object]) -> list[object]:
    if may_repeat_keys(text, values) or not is_sound(values):
        return _one_by_one(text, layout)
    return values


def _one_by_one(text: bytes, layout: str) -> list[object]:
    spans = _line_spans(text) if layout == "lines" else value_ends(text)
    return [decode(text[start:end]) for start, end in spans]


def array_runs(window: Window, start: Cursor, *, max_record: int = MAX_RECORD, checked: bool = True) -> Iterator[Run]:
    """Yield the elements of an array; the window stands behind its ``[`` or, to go on, at an element.

    It is left behind the ``]``. A stream that ends before gives a last record with the code ``truncated``. Without
    ``checked`` a run's values are still to be looked at, as those of :func:`decode_run` are.
    """
    line = start.line + window.skip_blank()
    cursor = start._replace(line=line, offset=window.offset)
    if cursor.glued and not window.peek():
        return
    if (cursor.number == 1 or cursor.glued) and window.peek() == b"]":
        window.position += 1
        return
    careful_until = 0
    while True:
        window.available(RUN)
        run = None
        if cursor.opening and not cursor.glued and cursor.offset >= careful_until:
            cut = window.rfind(cursor.opening, RUN) + 1
            run = _guessed(window, cursor, cut, checked) if cut > cursor.offset else None
            careful_until = cut
        run = run or _single(window, cursor, max_record)
        separator, cursor = _behind_separator(window, run.end)
        if separator == b"]" or (not separator and isinstance(run.values[-1], RecordError)):
            yield run._replace(end=cursor._replace(glued=True))
            window.position += len(separator)
            return
        yield run._replace(end=cursor)


def line_runs(window: Window, start: Cursor, *, max_record: int = MAX_RECORD, checked: bool = True) -> Iterator[Run]:
    """Yield the records of JSON lines; the window stands at the beginning of a line. Blank lines are no records."""
    cursor = start._replace(offset=window.offset)
    while window.available(1):
        window.available(RUN)
        end = window.rfind(b"\n", RUN)
        if end < 0:
            end = _end_of_line(window, max_record)
        run = _lines(window, cursor, end, checked) if end >= 0 else _long_line(window, cursor)
        cursor = run.end
        if run.values:
            yield run


def _guessed(window: Window, start: Cursor, end: int, checked: bool) -> Run | None:
    """Return the run that ends before byte ``end``, if the text until there is a list of values."""
    text = window.text(start.offset, end)
    try:
        values = decode_run(text, "array")
    except orjson.JSONDecodeError:
        return None
    if checked:
        values = _checked(text, "array", values)
    return _run(window, start, values, text, end)


def _single(window: Window, start: Cursor, limit: int) -> Run:
    """Return the next record by itself, broken or not."""
    scanner = ValueScanner(window.position)
    end = _scanned(window, scanner, limit)
    guess = _next_opening(window, start.opening) if end < 0 else -1
    if end < 0 and guess < 0:
        return _truncated(window, start) if window.ended else _passed_over(window, start, scanner)
    if end == start.offset and window.peek() not in (b",", b"]"):
        end += 1  # a bracket that closes nothing
    text = window.text(start.offset, end if end >= 0 else guess)
    value = decode(text) if text.strip() else RecordError("a comma without a record", code="syntax")
    if start.glued and not isinstance(value, RecordError):
        value = RecordError("no comma stands before the record", code="syntax", offset=0)
    if not isinstance(value, RecordError):
        run = _run(window, start, [value], text, end)
        learned = _learned(window) if text[-1:] == b"}" else b""
        return run._replace(end=run.end._replace(opening=learned or start.opening))
    guess = _next_opening(window, start.opening)
    if guess >= 0 and (end < 0 or guess < end):
        text, end = window.text(start.offset, guess), guess
    return _run(window, start, [value], text[:_KEPT], end)


def _run(window: Window, start: Cursor, values: list[object], text: bytes, end: int) -> Run:
    line = start.line + window.move(end)
    return Run(start, values, text, "array", Cursor(start.number + len(values), line, end, start.opening))


def _scanned(window: Window, scanner: ValueScanner, limit: int) -> int:
    """Return the byte where the value ends, or -1 if the stream ends or the limit is reached before."""
    while (end := scanner.end_in(window.buffer)) < 0:
        held = len(window.buffer) - window.position
        if window.ended or held > limit:
            return -1
        before = window.base
        window.available(held + 1)
        scanner.position -= window.base - before
    return window.base + end if end - window.position <= limit else -1


def _next_opening(window: Window, opening: bytes) -> int:
    """Return the byte behind the bracket that the next record seems to follow, in whatever spacing, or -1."""
    if not opening:
        return -1
    key = re.escape(opening[opening.index(b'"') :])
    window.available(_REACH)
    match = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*" + key).search(
        window.buffer, window.position, window.position + _REACH
    )
    return window.base + match.start() + 1 if match else -1


def _learned(window: Window) -> bytes:
    """Return how the record behind this object begins, with the end of this one, or nothing."""
    window.available(_LONGEST_OPENING)
    match = _OPENING.match(window.buffer, window.position)
    return b"}" + match[0] if match else b""


def _behind_separator(window: Window, end: Cursor) -> tuple[bytes, Cursor]:
    """Move to the next record, or to the bracket; return what stands before it, or is there, and its place."""
    line = end.line + window.skip_blank()
    separator = window.peek()
    glued = separator not in (b",", b"]", b"")
    if separator == b",":
        window.position += 1
        line += window.skip_blank()
    return separator, end._replace(line=line, offset=window.offset, glued=glued)


def _truncated(window: Window, start: Cursor) -> Run:
    end = window.base + len(window.buffer)
    fault = RecordError(
        f"the file ends at byte {end}, in record {start.number}, before its JSON array is closed: it is cut short "
        f"after {start.number - 1} whole records; copy or download it again",
        code="truncated",
        offset=end - start.offset,
    )
    text = window.text(start.offset, end)
    seen = decode(text) if text else None
    if isinstance(seen, RecordError) and seen.code != "syntax":
        fault = seen  # what is wrong with it is also why its end was not found
    return _run(window, start, [fault], text[:_KEPT], end)


def _passed_over(window: Window, start: Cursor, scanner: ValueScanner) -> Run:
    """Skip the rest of a record that is too large to hold."""
    text, line = window.buffer[window.position : window.position + _KEPT], start.line
    while (end := scanner.end_in(window.buffer)) < 0 and not window.ended:
        line += window.move(window.base + scanner.position)
        before = window.base
        window.available(len(window.buffer) - window.position + 1)
        scanner.position -= window.base - before
    run = _truncated(window, start) if end < 0 else _run(window, start, [_too_large(text)], text, window.base + end)
    return run._replace(text=text, end=run.end._replace(line=run.end.line - start.line + line))


def _too_large(text: bytes) -> RecordError:
    return RecordError(f"the record is larger than the limit; it begins with {shown(text[:40])}", code="too_large")


def _lines(window: Window, start: Cursor, end: int, checked: bool) -> Run:
    """Return the records of the lines until byte ``end``, where a newline or the end of the stream stands."""
    text = window.text(start.offset, end)
    lines = text.split(b"\n")
    values = decode_lines(text)
    if checked and not any(isinstance(value, RecordError) for value in values):
        values = _checked(text, "lines", values)
    if end == window.base + len(window.buffer) and values and isinstance(values[-1], RecordError):
        values[-1] = _cut_line(lines[-1], start.offset + len(text)) or values[-1]
    window.position = min(end + 1 - window.base, len(window.buffer))
    return Run(start, values, text, "lines", Cursor(start.number + len(values), start.line + len(lines), window.offset))


def _cut_line(line: bytes, end: int) -> RecordError | None:
    if not line.strip() or ValueScanner(0).end_in(line) >= 0 or line.lstrip()[:1] not in b"{[":
        return None
    return RecordError(f"the file ends at byte {end}, within this line", code="truncated", offset=len(line))


def _end_of_line(window: Window, limit: int) -> int:
    """Return the byte of the newline that ends a long line, or of the end of the stream, or -1 beyond the limit."""
    while (end := window.find(b"\n", limit)) < 0:
        held = len(window.buffer) - window.position
        if held > limit or window.ended:
            return window.base + len(window.buffer) if held <= limit else -1
        window.available(held + 1)
    return end


def _long_line(window: Window, start: Cursor) -> Run:
    """Skip a line that is too large to hold."""
    text = window.buffer[window.position : window.position + _KEPT].strip() or b" ?"
    while (end := window.find(b"\n", len(window.buffer))) < 0 and not window.ended:
        window.position = len(window.buffer)
        window.available(1)
    window.position = end + 1 - window.base if end >= 0 else len(window.buffer)
    return Run(start, [_too_large(text)], text, "lines", Cursor(start.number + 1, start.line + 1, window.offset))


def _line_spans(text: bytes) -> list[tuple[int, int]]:
    spans, position = [], 0
    for line in text.split(b"\n"):
        if line.strip():
            spans.append((position, position + len(line)))
        position += len(line) + 1
    return spans
