"""Gathers what the suspect lines of one or more logs say, one entry a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Iterator

from ascend_envcheck.explanation.lines import LOUD, QUIET, is_raised, looks_faulty, loudness, rank_of
from ascend_envcheck.explanation.result import Explanation, Found, Place
from ascend_envcheck.explanation.scan import Suspect
from ascend_envcheck.failures import GENERIC, INFO, ROOT, TIERS, WRAPPER, Failure, match

_SHOWN = 300  # characters of a line
_DIGITS = re.compile(r"\d+")


@dataclass
class _Entry:
    found: Found
    place: tuple[int, int]  # number of the log, number of the line
    seen_in: int  # the log in which it was seen last
    loud: bool  # said by more than information and warnings


class Reading:
    """What was found so far; its size is bounded by the table of failures.

    Args:
        unknown: how many unexplained lines to keep.
    """

    def __init__(self, unknown: int) -> None:
        self._entries: dict[str, _Entry] = {}
        self._unknown: dict[str, tuple[tuple[int, int], Place]] = {}
        self._last_raised: tuple[tuple[int, int], Place] | None = None
        self._keep = unknown
        self._lines = 0
        self._file, self._name = -1, ""

    def open(self, name: str) -> None:
        """Begin the next log."""
        self._file += 1
        self._name = name

    def close(self, lines: int) -> None:
        """End the log, which had so many lines."""
        self._lines += lines

    def see(self, suspect: Suspect) -> None:
        """Take a line in."""
        failure = match(suspect.text)
        if failure is not None:
            self._explained(suspect, failure)
        elif looks_faulty(suspect.text):
            self._unexplained(suspect)

    def result(self) -> Explanation:
        """What all lines together say."""
        entries = list(self._entries.values())
        if not self._unknown and not any(entry.loud for entry in entries):
            for entry in entries:  # warnings in a run without errors
                entry.found = replace(entry.found, tier=INFO)
        by_time = self._file > 0 and all(entry.found.first.time for entry in entries if entry.found.tier == ROOT)
        ordered = [entry.found for entry in sorted(entries, key=lambda entry: _order(entry, by_time))]
        unknown = dict(self._unknown.values())
        if self._last_raised is not None:
            unknown.setdefault(*self._last_raised)
        places = tuple(place for _, place in sorted(unknown.items(), key=lambda item: item[0]))
        return Explanation(tuple(self._folded(ordered, by_time)), places, self._lines)

    def _explained(self, suspect: Suspect, failure: Failure) -> None:
        tier = _tier_here(failure, suspect.text)
        entry = self._entries.get(failure.id)
        if entry is None or TIERS.index(tier) < TIERS.index(entry.found.tier):
            count = entry.found.count + 1 if entry else 1
            found = Found(failure, tier, self._place(suspect), count)
            loud = tier != INFO and loudness(suspect.text) == LOUD
            self._entries[failure.id] = _Entry(found, (self._file, suspect.number), self._file, loud)
            return
        entry.found = replace(entry.found, count=entry.found.count + 1)
        if entry.seen_in != self._file:
            self._perhaps_earlier(entry, suspect, tier)

    def _perhaps_earlier(self, entry: _Entry, suspect: Suspect, tier: str) -> None:
        entry.seen_in = self._file
        place = self._place(suspect)
        if tier == entry.found.tier and place.time and place.time < entry.found.first.time:
            entry.found = replace(entry.found, first=place)
            entry.place = (self._file, suspect.number)

    def _unexplained(self, suspect: Suspect) -> None:
        at = (self._file, suspect.number)
        if is_raised(suspect.text):
            self._last_raised = (at, self._place(suspect))
        if len(self._unknown) < self._keep - 1:
            shape = _DIGITS.sub("0", suspect.text[:_SHOWN])
            if shape not in self._unknown:
                self._unknown[shape] = (at, self._place(suspect))

    def _place(self, suspect: Suspect) -> Place:
        text = suspect.text.strip()
        shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
        return Place(self._name, suspect.number, rank_of(suspect.text), suspect.time, shown)

    def _folded(self, ordered: list[Found], by_time: bool) -> Iterator[Found]:
        """Each wrapper with the last root said before it, else the first one of all."""
        roots = [found for found in ordered if found.tier == ROOT]
        for found in ordered:
            if found.tier == WRAPPER and roots:
                at = self._moment(found, by_time)
                before = [root for root in roots if self._moment(root, by_time) <= at]
                found = replace(found, follows=(before[-1] if before else roots[0]).failure.id)
            yield found

    def _moment(self, found: Found, by_time: bool) -> tuple[str, tuple[int, int]]:
        return found.first.time if by_time else "", self._entries[found.failure.id].place


def _order(entry: _Entry, by_time: bool) -> tuple[int, str, tuple[int, int]]:
    return TIERS.index(entry.found.tier), entry.found.first.time if by_time else "", entry.place


def _tier_here(failure: Failure, text: str) -> str:
    """What is only told, or only warned of, is no cause."""
    loud = loudness(text)
    if loud == LOUD or failure.tier == INFO:
        return failure.tier
    if loud == QUIET:
        return INFO
    return GENERIC if failure.tier == ROOT else failure.tier
