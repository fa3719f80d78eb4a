"""From a log of any size, the few lines that are worth a closer look, in one pass and constant memory.

Every line of a failed run that matters holds one of a few dozen pieces of text. They are looked for in blocks of a
megabyte, which costs a healthy log about what it costs to read it; lines are cut out only around a find.
"""

from __future__ import annotations

import re
from typing import Iterable, Iterator, NamedTuple

from ascend_envcheck.explanation.lines import last_time, readable
from ascend_envcheck.failures import CLUES

BLOCK = 1 << 20  # bytes read at a time
REACH = 2048  # bytes kept on either side of a find: what is beyond says nothing more, and may be a whole progress bar
_LONGEST = 1 << 16  # bytes of a line that are waited for across blocks

# The clues that start with E are looked for together with the codes of CANN: E is rare in a log.
_SIGNALS = tuple(clue.encode() for clue in CLUES if not clue.startswith("E"))
_CODES = re.compile(rb"E(?:[A-Z0-9]\d{3}|RR|ADDR|rr)")


class Suspect(NamedTuple):
    """A line that may matter: its number (by line feeds, from 1), its text, and what stands before it."""

    number: int
    text: str
    before: bytes

    @property
    def time(self) -> str:
        """When it was written, in a form that sorts; that of a line shortly before, or "", where it does not say."""
        return last_time(self.text) or last_time(self.before.decode("ascii", errors="replace"))


class Scan:
    """The lines that may matter, in order; carriage returns end a line, too, but are not counted.

    Args:
        blocks: the log, cut anywhere.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = blocks
        self.lines = 0
        """How many lines were read, once all suspects are taken."""

    def __iter__(self) -> Iterator[Suspect]:
        rest, ended = b"", True
        for block in self._blocks:
            data = rest + block
            ended = data.endswith(b"\n")
            end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if len(data) - end > _LONGEST:
                end = len(data)
            whole, rest = data[:end], data[end:]
            yield from _of_block(whole, self.lines + 1)
            self.lines += whole.count(b"\n")
        yield from _of_block(rest, self.lines + 1)
        self.lines += not ended


def _of_block(data: bytes, number: int) -> Iterator[Suspect]:
    counted = done = 0
    for start, end in sorted(set(_finds(data))):
        start = max(start, done)  # two finds far apart in one long line: each piece once
        if start < end:
            number += data.count(b"\n", counted, start)
            counted, done = start, end
            yield Suspect(number, readable(data[start:end]), data[max(0, start - REACH) : start])


def _finds(data: bytes) -> Iterator[tuple[int, int]]:
    for signal in _SIGNALS:
        at = data.find(signal)
        while at >= 0:
            start, end = _line_around(data, at)
            yield start, end
            at = data.find(signal, end)
    match = _CODES.search(data)
    while match:
        start, end = _line_around(data, match.start())
        yield start, end
        match = _CODES.search(data, max(end, match.end()))


def _line_around(data: bytes, at: int) -> tuple[int, int]:
    low, high = max(0, at - REACH), min(len(data), at + REACH)
    start = max(data.rfind(b"\n", low, at), data.rfind(b"\r", low, at)) + 1 or low
    ends = [end for end in (data.find(b"\n", at, high), data.find(b"\r", at, high)) if end >= 0]
    return start, min(ends, default=high)
