"""The records of a file, one after another: a JSON array or JSON lines, in memory for one record at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ParseError, shown

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16
_MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One decoded record: ``number`` counts from 1, ``line`` is known for JSON lines only."""

    number: int
    line: int | None
    value: object


def read_records(path: Path, *, on_bytes: Callable[[int], object] | None = None) -> Iterator[Record]:
    """Yield the records of ``path``, which may also be a pipe.

    A file that begins with ``[`` is one JSON array, one that begins with ``{`` is JSON lines. ``on_bytes`` is called
    with the size of each piece that was read. Raises :class:`ParseError` where the file stops being valid, and
    ``OSError`` where it cannot be read.
    """
    tell = on_bytes or (lambda size: None)
    with path.open("rb") as file:
        skipped = _skip_blank(file)
        tell(skipped)
        first = file.peek(1)[:1]
        if first == b"[":
            yield from _read_array(path, file, skipped, tell)
        elif first == b"{":
            yield from _read_lines(path, file, skipped, tell)
        elif not first:
            raise ParseError(f"{path}: the file is empty; expected a JSON array or JSON lines")
        else:
            raise ParseError(
                f"{path}: expected a JSON array ('[') or JSON lines ('{{') in UTF-8, "
                f"but the file begins with {first!r} at byte {skipped}",
                offset=skipped,
            )


def _skip_blank(file: Any) -> int:
    skipped = len(file.read(3)) if file.peek(3).startswith(_BOM) else 0
    while file.peek(1)[:1] in (b" ", b"\t", b"\n", b"\r"):
        file.read(1)
        skipped += 1
    return skipped


def _read_array(path: Path, file: BinaryIO, start: int, tell: Callable[[int], object]) -> Iterator[Record]:
    import ijson

    builder = _ArrayBuilder()
    parser = ijson.basic_parse_coro(builder, use_float=True)
    number, offset = 0, start
    while True:
        chunk = file.read(_CHUNK)
        failure: Exception | None = None
        try:
            parser.send(chunk) if chunk else parser.close()
        except (ijson.JSONError, _TooDeepError) as error:
            failure = error
        for value in builder.take():
            number += 1
            yield Record(number=number, line=None, value=value)
        if failure is not None and chunk:
            raise _invalid(path, number + 1, _failing_byte(path, start, offset), failure)
        if failure is not None:
            raise _cut_short(path, number, offset)
        if not chunk:
            return
        offset += len(chunk)
        tell(len(chunk))


class _TooDeepError(Exception):
    """Nesting that no data set has; without a limit it would cost memory without bound."""


class _ArrayBuilder:
    """Receives the parser's events and collects the elements of the outermost array, whole ones only."""

    def __init__(self) -> None:
        self._whole: list[object] = []
        self._open: list[Any] = []
        self._keys: list[str] = []

    def send(self, item: tuple[str, Any]) -> None:
        """Take one event."""
        event, value = item
        if event == "map_key":
            self._keys[-1] = value
        elif event in ("start_map", "start_array"):
            self._start({} if event == "start_map" else [])
        elif event in ("end_map", "end_array"):
            self._keys.pop()
            closed = self._open.pop()
            if self._open:
                self._attach(closed)
        else:
            self._attach(value)

    def take(self) -> list[object]:
        """Return the elements that became whole since the last call."""
        whole = self._whole[:]
        self._whole.clear()
        return whole

    def _start(self, container: Any) -> None:
        if len(self._open) >= _MAX_DEPTH:
            raise _TooDeepError(f"nested deeper than {_MAX_DEPTH} levels")
        self._open.append(container if self._open else self._whole)
        self._keys.append("")

    def _attach(self, value: object) -> None:
        parent = self._open[-1]
        if isinstance(parent, dict):
            parent[self._keys[-1]] = value
        else:
            parent.append(value)


class _Discard:
    """Receives the parser's events and forgets them, but minds the depth as :class:`_ArrayBuilder` does."""

    def __init__(self) -> None:
        self._depth = 0

    def send(self, item: tuple[str, Any]) -> None:
        """Take one event."""
        event = item[0]
        self._depth += event.startswith("start_") - event.startswith("end_")
        if self._depth > _MAX_DEPTH:
            raise _TooDeepError


def _failing_byte(path: Path, start: int, chunk_start: int) -> int | None:
    """Parse again up to the piece that failed, then byte by byte: the parser itself does not say where it stopped."""
    import ijson

    if not path.is_file():
        return None
    parser = ijson.basic_parse_coro(_Discard(), use_float=True)
    with path.open("rb") as file:
        offset = file.seek(start)
        try:
            while chunk := file.read(_CHUNK if offset < chunk_start else 1):
                parser.send(chunk)
                offset += len(chunk)
        except (ijson.JSONError, _TooDeepError):
            return offset
    return None


def _read_lines(path: Path, file: BinaryIO, start: int, tell: Callable[[int], object]) -> Iterator[Record]:
    number, offset = 0, start
    first = _line_of(path, start)
    for line, text in enumerate(file, first):
        if text.strip():
            number += 1
            yield Record(number=number, line=line, value=_decode(path, text, number, line, offset))
        offset += len(text)
        tell(len(text))


def _line_of(path: Path, start: int) -> int:
    """Return the number of the line at byte ``start``; a pipe cannot be read twice and counts from its first record."""
    if not start or not path.is_file():
        return 1
    with path.open("rb") as file:
        return 1 + file.read(start).count(b"\n")


def _decode(path: Path, text: bytes, number: int, line: int, offset: int) -> object:
    try:
        return json.loads(text.rstrip().decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        where, reason = error.start, f"not UTF-8: {error.reason}"
    except json.JSONDecodeError as error:
        where, reason = len(error.doc[: error.pos].encode("utf-8")), error.msg
    except RecursionError:
        where, reason = 0, "nested too deeply"
    except ValueError as error:
        where, reason = 0, str(error)
    raise ParseError(
        f"{path}: record {number} (line {line}) is not valid JSON at byte {offset + where}: {reason}; "
        "JSON lines hold one whole record on each line",
        record=number,
        offset=offset + where,
    )


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _invalid(path: Path, number: int, offset: int | None, failure: Exception) -> ParseError:
    where = "" if offset is None else f" at byte {offset}"
    reason = str(failure).removeprefix("b'").splitlines()[0].split("\\n")[0].strip()
    return ParseError(
        f"{path}: record {number} is not valid JSON{where}: {shown(reason)}",
        record=number,
        offset=offset,
    )


def _cut_short(path: Path, whole: int, offset: int) -> ParseError:
    return ParseError(
        f"{path}: the file ends at byte {offset}, in record {whole + 1}, before its JSON array is closed: "
        f"it is cut short after {whole} whole records; copy or download it again",
        record=whole + 1,
        offset=offset,
    )
