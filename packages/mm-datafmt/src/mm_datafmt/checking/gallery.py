"""The few records of a file that a report shows: some by chance, the longest, the first bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import NamedTuple

from ..errors import RecordError
from ..sample import Sample
from ..sources import record_key

SHOWN = 8
_TURNS, _CHARACTERS, _IMAGES = 8, 600, 4


class Exhibit(NamedTuple):
    """A record cut down to what fits on a page."""

    number: int
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    length: int | None
    faults: tuple[tuple[str, str], ...]
    left_out: str


@dataclass(kw_only=True)
class Gallery:
    """Keeps :data:`SHOWN` exhibits of each kind while records go by; the same ones each time."""

    _by_chance: list[tuple[int, Exhibit]] = field(default_factory=list)
    _longest: list[tuple[int, int, Exhibit]] = field(default_factory=list)
    bad: list[Exhibit] = field(default_factory=list)

    def see(self, number: int, sample: Sample, faults: list[RecordError], length: int | None) -> None:
        """Take a look at a record."""
        if faults:
            if len(self.bad) < SHOWN:
                self.bad.append(exhibit_of(number, sample, faults, length))
            return
        key = -record_key(0, 0, number)
        if len(self._by_chance) < SHOWN or key > self._by_chance[0][0]:
            _keep(self._by_chance, (key, exhibit_of(number, sample, faults, length)))
        if length is not None and (len(self._longest) < SHOWN or (length, -number) > self._longest[0][:2]):
            _keep(self._longest, (length, -number, exhibit_of(number, sample, faults, length)))

    @property
    def by_chance(self) -> list[Exhibit]:
        """Good records, in the order of the file."""
        return sorted(one[-1] for one in self._by_chance)

    @property
    def longest(self) -> list[Exhibit]:
        """Good records with most tokens, the longest first."""
        return [one[-1] for one in sorted(self._longest, reverse=True)]


def _keep(heap: list, item: tuple) -> None:  # type: ignore[type-arg]
    if len(heap) < SHOWN:
        heappush(heap, item)
    else:
        heappushpop(heap, item)


def exhibit_of(number: int, sample: Sample, faults: Sequence[RecordError], length: int | None) -> Exhibit:
    """Return ``sample`` cut down."""
    turns = tuple((turn.role, _cut(turn.content)) for turn in sample.messages[:_TURNS])
    left = [
        f"{count - shown} more {what}"
        for what, count, shown in (
            ("turns", len(sample.messages), _TURNS),
            ("images", len(sample.images), _IMAGES),
            ("videos", len(sample.videos), 0),
            ("audio files", len(sample.audios), 0),
        )
        if count > shown
    ]
    reasons = tuple((fault.code, str(fault)) for fault in faults[:_TURNS])
    return Exhibit(number, turns, sample.images[:_IMAGES], length, reasons, ", ".join(left))


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"
