"""A stretch of a byte stream that is held in memory while it is looked at."""

from __future__ import annotations

from collections.abc import Callable

BLOCK = 1 << 18
"""Bytes read at a time: they stay in the processor's cache until they are decoded."""


class Window:
    """Bytes ``[base, base + len(buffer))`` of a stream; ``position`` is the next byte of interest, as an index of
    ``buffer``. ``read(n)`` returns at most n bytes, and none at the end.
    """

    def __init__(self, read: Callable[[int], bytes], base: int = 0) -> None:
        self._read = read
        self.base = base
        self.buffer = b""
        self.position = 0
        self.ended = False

    @property
    def offset(self) -> int:
        """Byte of the stream at ``position``."""
        return self.base + self.position

    def available(self, size: int) -> bool:
        """Read until ``size`` bytes from ``position`` on are held; return whether there were as many."""
        held = len(self.buffer) - self.position
        if held < size and not self.ended:
            pieces = [self.buffer[self.position :]]
            while held < size:
                # A long record doubles what is read, so that joining the pieces stays linear.
                piece = self._read(max(BLOCK, held))
                if not piece:
                    self.ended = True
                    break
                pieces.append(piece)
                held += len(piece)
            self.base += self.position
            self.position = 0
            self.buffer = b"".join(pieces)
        return held >= size

    def skip_blank(self) -> int:
        """Move ``position`` past white space and return how many newlines there were."""
        newlines = 0
        while self.available(1):
            rest = self.buffer[self.position : self.position + BLOCK]
            kept = rest.lstrip(b" \t\r\n")
            skipped = len(rest) - len(kept)
            newlines += rest.count(b"\n", 0, skipped)
            self.position += skipped
            if kept:
                break
        return newlines

    def peek(self) -> bytes:
        """Return the byte at ``position``, or nothing at the end of the stream."""
        return self.buffer[self.position : self.position + 1] if self.available(1) else b""

    def move(self, offset: int) -> int:
        """Move ``position`` to byte ``offset`` of the stream, which is held, and return the newlines on the way."""
        end = offset - self.base
        newlines = self.buffer.count(b"\n", self.position, end)
        self.position = end
        return newlines

    def text(self, start: int, end: int) -> bytes:
        """Return the bytes of the stream from ``start`` to ``end``, which are held."""
        return self.buffer[start - self.base : end - self.base]

    def find(self, what: bytes, reach: int) -> int:
        """Return the byte of the stream where ``what`` stands next within ``reach``, or -1."""
        found = self.buffer.find(what, self.position, self.position + reach)
        return found if found < 0 else self.base + found

    def rfind(self, what: bytes, reach: int) -> int:
        """Return the byte of the stream where ``what`` stands last within ``reach``, or -1."""
        found = self.buffer.rfind(what, self.position, self.position + reach)
        return found if found < 0 else self.base + found
