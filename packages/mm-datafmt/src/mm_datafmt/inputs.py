"""One input file as runs of records, whatever it is: an array, JSON lines, compressed, parquet, COCO.

:func:`open_input` looks at the name and the first bytes and says what the file is; :meth:`Input.runs` reads it from the
beginning or from a :class:`Cursor`, the ``end`` of an earlier run.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from .errors import MissingPackageError, ParseError, RecordError
from .scanning import top_keys
from .splitting import MAX_RECORD, Cursor, Run, array_runs, line_runs
from .window import BLOCK, Window
from .zstd_frames import FrameEnds

_BOM = b"\xef\xbb\xbf"
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_COCO_OTHERS = {"info", "licenses", "categories"}


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file of records.

    ``kind`` is ``array``, ``lines``, ``parquet`` or ``coco``; ``packing`` is ``gzip``, ``zstd`` or empty. ``seekable``
    says whether one may go back in it: then an interrupted conversion can go on, and records can be shuffled in place.
    ``max_record`` is the largest record in bytes that is looked at; ``joined`` says what is joined of a COCO file;
    ``checked`` whether keys that occur twice and large integers are looked for here.
    ``stream`` and ``head`` are a pipe and what has been read of it.
    """

    path: Path
    kind: str
    packing: str = ""
    seekable: bool = True
    max_record: int = MAX_RECORD
    joined: str = ""
    checked: bool = True
    stream: io.BufferedReader | None = None
    head: bytes = b""

    @property
    def can_be_cut(self) -> bool:
        """Whether parts of the file can be read by themselves."""
        return self.seekable and not self.packing and self.kind in ("array", "lines")

    def runs(self, start: Cursor | None = None, *, on_bytes: Callable[[int], object] | None = None) -> Iterator[Run]:
        """Yield the runs from ``start`` on; ``on_bytes`` is told the size of each piece read from the file.

        Raises :class:`ParseError` where the file has no records at all, and ``OSError``.
        """
        if self.kind == "parquet":
            from .parquet import parquet_runs

            yield from parquet_runs(self.path, start or Cursor())
            return
        if self.kind == "coco":
            from .coco_file import coco_runs

            yield from coco_runs(self, start or Cursor(), on_bytes)
            return
        if start is not None and self.can_be_cut:
            with self.path.open("rb") as file:
                file.seek(start.offset)
                if on_bytes is not None:
                    on_bytes(start.offset)
                yield from self._runs_behind_head(Window(_counted(file.read, on_bytes), start.offset), start)
            return
        with self.open(on_bytes) as window:
            yield from self.runs_of(window, start)

    def runs_of(self, window: Window, start: Cursor | None) -> Iterator[Run]:
        """Yield the runs in a window that stands at the beginning of the file."""
        line = skip_head(window)
        cursor = Cursor(line=line, offset=window.offset)
        if self.kind == "array":
            window.position += 1
        if start is not None:
            _skip_to(window, start.offset)
            cursor = start
        yield from self._runs_behind_head(window, cursor)

    def _runs_behind_head(self, window: Window, cursor: Cursor) -> Iterator[Run]:
        if self.kind == "lines":
            yield from line_runs(window, cursor, max_record=self.max_record, checked=self.checked)
            return
        for run in array_runs(window, cursor, max_record=self.max_record, checked=self.checked):
            cursor = run.end
            yield run
        line = cursor.line + window.skip_blank()
        if window.available(1):
            fault = RecordError("something follows the end of the array", code="trailing", offset=0)
            begin = Cursor(cursor.number, line, window.offset, glued=True)
            window.available(1 << 10)
            rest = window.text(window.offset, window.base + len(window.buffer))[: 1 << 10]
            while window.available(1):  # to the end, from where there is nothing to go on to
                window.position = len(window.buffer)
            yield Run(begin, [fault], rest, "array", begin._replace(number=cursor.number + 1, offset=window.offset))

    @contextmanager
    def open(self, on_bytes: Callable[[int], object] | None = None) -> Iterator[Window]:
        """Give a window on the unpacked bytes from the beginning on."""
        if self.stream is not None:
            with self.stream:
                yield Window(_counted(_after(self.head, self.stream.read1), on_bytes))
            return
        with self.path.open("rb") as file:
            yield Window(_unpacked(_counted(file.read, on_bytes), self.packing, self.path))


def open_input(path: Path, *, max_record: int = MAX_RECORD) -> Input:
    """Look at ``path`` and return what it is. A pipe is read once, so its beginning is kept.

    Raises :class:`ParseError` if it is nothing that can be read, and ``OSError``.
    """
    stream = path.open("rb")
    if not path.is_file():
        try:
            head = stream.read1(BLOCK)
            kind = _kind(Window(io.BytesIO(head).read), path)
        except BaseException:
            stream.close()
            raise
        return Input(path=path, kind=kind, seekable=False, max_record=max_record, stream=stream, head=head)
    with stream:
        head = stream.read(BLOCK)
        if head.startswith(_PARQUET):
            return Input(path=path, kind="parquet", max_record=max_record)
        packing = "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else ""
        kind = _kind(Window(_unpacked(_after(head, stream.read), packing, path)), path)
        return Input(path=path, kind=kind, packing=packing, max_record=max_record)


def first_runs(source: Input) -> Iterator[Run]:
    """Yield the first runs without using up a pipe, of which only the beginning that is kept is looked at."""
    if source.seekable:
        return source.runs()
    return source.runs_of(Window(io.BytesIO(source.head).read), None)


def _kind(window: Window, path: Path) -> str:
    skip_head(window)
    window.available(BLOCK)
    first = window.peek()
    if first == b"[":
        return "array"
    if first == b"{":
        keys = top_keys(window.buffer, window.position)
        if "annotations" in keys or ("images" in keys and _COCO_OTHERS & set(keys)):
            return "coco"
        return "lines"
    if not first:
        raise ParseError(f"{path}: the file is empty; expected a JSON array or JSON lines")
    raise ParseError(
        f"{path}: expected a JSON array ('[') or JSON lines ('{{') in UTF-8, "
        f"but the file begins with {first!r} at byte {window.offset}",
        offset=window.offset,
    )


def skip_head(window: Window) -> int:
    """Move past the byte order mark and white space; return the line that is reached."""
    if window.available(3) and window.buffer.startswith(_BOM):
        window.position += 3
    return 1 + window.skip_blank()


def _skip_to(window: Window, offset: int) -> None:
    while window.offset < offset:
        window.available(1)
        window.position = min(offset - window.base, len(window.buffer))
        if window.ended and window.position == len(window.buffer):
            return


def _counted(read: Callable[[int], bytes], on_bytes: Callable[[int], object] | None) -> Callable[[int], bytes]:
    if on_bytes is None:
        return read
    tell = on_bytes

    def counted(size: int) -> bytes:
        piece = read(size)
        tell(len(piece))
        return piece

    return counted


def _after(head: bytes, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    first = io.BytesIO(head)
    return lambda size: first.read(size) or read(size)


class _Reader(io.RawIOBase):
    """A file object of a ``read`` function, for libraries that want one."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast("bytearray", buffer))
        piece = self._read(len(view))
        view[: len(piece)] = piece
        return len(piece)


def _unpacked(read: Callable[[int], bytes], packing: str, path: Path) -> Callable[[int], bytes]:
    if not packing:
        return read
    if packing == "gzip":
        return _named_faults(gzip.GzipFile(fileobj=_Reader(read)).read, path, (EOFError, gzip.BadGzipFile))
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError(f"{path} is packed with zstd: pip install 'mm-datafmt[zst]'") from None
    frames = FrameEnds(read)
    reader = zstandard.ZstdDecompressor().stream_reader(
        cast("IO[bytes]", _Reader(frames.read)), read_across_frames=True
    )

    def unpacked(size: int) -> bytes:
        piece = reader.read(size)
        if not piece and not frames.whole:
            raise EOFError("it ends before a frame does")
        return piece

    return _named_faults(unpacked, path, (zstandard.ZstdError, EOFError))


def _named_faults(
    read: Callable[[int], bytes], path: Path, faults: tuple[type[Exception], ...]
) -> Callable[[int], bytes]:
    def named(size: int) -> bytes:
        try:
            return read(size)
        except faults as error:
            raise ParseError(f"{path}: cannot be unpacked: {error}; copy or download it again") from error

    return named
