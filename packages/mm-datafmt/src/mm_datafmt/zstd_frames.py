"""Whether packed data ends where a zstd frame does, told from block headers: who unpacks it does not say.

Layout: RFC 8878, 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_DICTIONARY_ID = (0, 1, 2, 4)  # bytes, by two bits of the frame's descriptor
_CONTENT_SIZE = (0, 2, 4, 8)
_REPEATED = 1  # the type of a block that is one byte


class FrameEnds:
    """Passes on what ``read(n)`` gives; ``whole`` says whether a frame ends with the last byte so far."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._sizes = self._frames()
        self._left = next(self._sizes)  # bytes of the field that is being passed
        self._field = b""
        self.whole = True

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, none at the end."""
        piece = self._read(size)
        at = 0
        while at < len(piece):
            taken = min(self._left, len(piece) - at)
            self._field = (self._field + piece[at : at + min(taken, 16)])[:16]  # no header is longer
            self._left -= taken
            at += taken
            self.whole = False
            while not self._left:
                self._left = next(self._sizes)
        return piece

    def _frames(self) -> Iterator[int]:
        """Yield the size of one field after another; what it was is in ``_field`` then."""
        while True:
            yield from self._fields()
            self.whole = True

    def _taken(self) -> int:
        value, self._field = int.from_bytes(self._field, "little"), b""
        return value

    def _fields(self) -> Iterator[int]:
        yield 4
        if self._taken() in _SKIPPABLE:
            yield 4
            yield self._taken()
            self._taken()
            return
        yield 1
        descriptor = self._taken()
        single = descriptor >> 5 & 1
        yield (1 - single) + _DICTIONARY_ID[descriptor & 3] + (_CONTENT_SIZE[descriptor >> 6] or single)
        self._taken()
        is_last = 0
        while not is_last:
            yield 3
            block = self._taken()
            is_last = block & 1
            yield 1 if block >> 1 & 3 == _REPEATED else block >> 3
            self._taken()
        if descriptor >> 2 & 1:
            yield 4
            self._taken()
