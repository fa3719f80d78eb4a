"""Tensors cut along a later dimension: every row of a source is dealt out to several targets as it is read.

The system takes a list of places for one reading (``preadv``), so no byte is moved a second time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mm_convert.plans import BYTES, ZEROS, Plan, Ref, Segment

MOST_PARTS = os.sysconf("SC_IOV_MAX")  # of one reading
PART_BYTES = 200  # what Python takes for the place of a part


class Span(NamedTuple):
    """Bytes of a source's row, and where they go in that of a target; nowhere if there is none."""

    start: int
    stop: int
    target: Ref | None
    to: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way through a source, row by row.

    Attributes:
        source: the tensor.
        width: bytes of a row.
        spans: the whole row, in order.
    """

    source: Ref
    width: int
    spans: tuple[Span, ...]

    @property
    def gap(self) -> int:
        """Bytes of the longest span that goes nowhere."""
        return max((span.stop - span.start for span in self.spans if span.target is None), default=0)

    def parts(
        self, made: Mapping[Ref, memoryview], widths: Mapping[Ref, int], skipped: memoryview, rows: int
    ) -> list[memoryview]:
        """The places of so many rows, in order.

        Args:
            made: rows of each target.
            widths: bytes of a row of each.
            skipped: room for what goes nowhere.
            rows: how many.
        """
        found: list[memoryview] = []
        for row in range(rows):
            for start, stop, target, to in self.spans:
                at, room = (0, skipped) if target is None else (row * widths[target] + to, made[target])
                found.append(room[at : at + stop - start])
        return found


def readings(plan: Plan, targets: Collection[Ref], rows: int) -> list[Reading]:
    """How targets are read that are cut from the same rows: each source once, and again for what is in several.

    Args:
        plan: the plan.
        targets: the targets.
        rows: how many rows each of them has.
    """
    by_source: dict[Ref, list[Span]] = {}
    for target in targets:
        for segment in plan.writes[target]:
            start, to, length = next(runs(plan, segment)) if segment.source.section != ZEROS else (0, 0, 0)
            if length:
                by_source.setdefault(segment.source, []).append(Span(start, start + length, target, to))
    found: list[Reading] = []
    for source, spans in by_source.items():
        width = plan.sources[source].nbytes // rows
        left = sorted(spans, key=lambda span: span.start)
        while left:
            once, left = _once(left, width)
            found.append(Reading(source=source, width=width, spans=tuple(once)))
    return found


def rows_at_once(rows: int, widths: Collection[int], read: Sequence[Reading], chunk: int) -> int:
    """Rows of one step: of at most `chunk` bytes of each tensor, in as many parts as the system takes.

    Args:
        rows: rows there are.
        widths: bytes of a row of each target.
        read: how they are read.
        chunk: bytes.
    """
    widest = max(1, *widths, *(reading.width for reading in read))
    parts = max((len(reading.spans) for reading in read), default=1)
    return max(1, min(rows, chunk // widest, MOST_PARTS // parts))


def dealt_bytes(plan: Plan, targets: Collection[Ref], rows: int, chunk: int) -> int:
    """What a worker holds at once to make these targets."""
    read = readings(plan, targets, rows)
    widths = [plan.targets[ref].nbytes // rows for ref in targets]
    step = rows_at_once(rows, widths, read, chunk)
    places = step * sum(len(reading.spans) for reading in read)
    return step * sum(widths) + max((reading.gap for reading in read), default=0) + PART_BYTES * places


def runs(plan: Plan, segment: Segment) -> Iterator[tuple[int, int, int]]:
    """A segment as runs of bytes: (offset in the source, offset in the target, length)."""
    source, target = plan.sources[segment.source], plan.targets[segment.target]
    below = prod(source.shape[segment.dim + 1 :]) * BYTES[source.dtype]
    for row in range(prod(source.shape[: segment.dim])):
        at, to = row * source.shape[segment.dim], row * target.shape[segment.dim]
        yield (at + segment.source_start) * below, (to + segment.target_start) * below, segment.length * below


def _once(spans: Sequence[Span], width: int) -> tuple[list[Span], list[Span]]:
    """Spans that follow one another, what lies between them included, and those that have to wait."""
    taken: list[Span] = []
    waiting: list[Span] = []
    position = 0
    for span in spans:
        if span.start < position:
            waiting.append(span)
            continue
        taken += [Span(position, span.start, None, 0)] if span.start > position else []
        taken.append(span)
        position = span.stop
    taken += [Span(position, width, None, 0)] if position < width else []
    return taken, waiting
