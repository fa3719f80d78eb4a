"""Where a JSON value ends, without decoding it: brackets are counted, strings are skipped.

The scanner takes bytes in pieces of any size and remembers three numbers between them, so a value of any length is
passed over in constant memory. It finds ends, it does not judge: ``{"a" 1]`` has an end, and is for the decoder to
refuse.
"""

from __future__ import annotations

import re

_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SPECIAL = re.compile(rb'["{}\[\],]')


class ValueScanner:
    """Finds the end of one value of an array that is fed piece by piece.

    ``position`` is where to go on in the buffer; bytes before it are not needed any more. ``deepest`` is the deepest
    nesting seen.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self.depth = 0
        self.deepest = 0
        self._in_string = False

    def end_in(self, buffer: bytes) -> int:
        """Return the index of the first byte after the value, or -1 if the buffer ends before it.

        The end of a scalar is the comma or bracket behind it (spaces included), that of a container its last bracket.
        """
        position, size = self.position, len(buffer)
        while position < size:
            if self._in_string:
                match = _REST_OF_STRING.match(buffer, position)
                assert match is not None, "the pattern matches nothing, too"
                position = match.end()
                if position == size or buffer[position] != 0x22:  # cut inside the string, perhaps after a backslash
                    break
                self._in_string = False
                position += 1
                continue
            special = _SPECIAL.search(buffer, position)
            if special is None:
                position = size
                break
            position = special.start()
            kind = buffer[position]
            if kind == 0x22:  # "
                self._in_string = True
            elif kind in b"{[":
                self.depth += 1
                self.deepest = max(self.deepest, self.depth)
            elif kind == 0x2C:  # ,
                if self.depth == 0:
                    return self._found(position)
            else:  # } ]
                if self.depth == 0:
                    return self._found(position)
                self.depth -= 1
                if self.depth == 0:
                    return self._found(position + 1)
            position += 1
        self.position = position
        return -1

    def _found(self, end: int) -> int:
        self.position = end
        return end


def value_ends(text: bytes) -> list[tuple[int, int]]:
    """Return where each value of ``text`` (values with commas between) begins and ends."""
    places = []
    position, size = _after_blank(text, 0), len(text)
    while position < size:
        end = ValueScanner(position).end_in(text)
        end = size if end < 0 else end
        places.append((position, end))
        comma = text.find(b",", end)
        if comma < 0:
            break
        position = _after_blank(text, comma + 1)
    return places


_BLANK = re.compile(rb"[ \t\r\n]*")


def _after_blank(text: bytes, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None, "the pattern matches nothing, too"
    return match.end()


def deepest(text: bytes) -> int:
    """Return how deep the first value of ``text`` nests (a scalar: 0)."""
    scanner = ValueScanner(_after_blank(text, 0))
    scanner.end_in(text)
    return scanner.deepest


KEY = re.compile(rb'[ \t\r\n]*(?:,[ \t\r\n]*)?"((?:[^"\\]|\\.)*)"[ \t\r\n]*:')


def top_keys(text: bytes, position: int) -> list[str]:
    """Return the keys of the object that begins at ``position``, as far as ``text`` reaches."""
    keys = []
    position += 1
    while match := KEY.match(text, position):
        keys.append(match[1].decode("utf-8", "replace"))
        position = ValueScanner(match.end()).end_in(text)
        if position < 0:
            break
    return keys
