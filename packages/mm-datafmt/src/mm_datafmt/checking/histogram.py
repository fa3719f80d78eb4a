"""A histogram of sample lengths: bins, and their picture in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

BINS = 20
_STEPS = (1, 2, 5)


class Bin(NamedTuple):
    """How many samples are at least ``start`` and below ``end`` tokens long; the last bin holds all beyond, too."""

    start: int
    end: int
    samples: int
    beyond: bool = False


def bins_of(counts: Mapping[int, int], *, most: int = BINS) -> list[Bin]:
    """Return equal bins of a round width (1, 2, 5, 10, …) from the shortest to the 99th percentile and all beyond."""
    if not counts:
        return []
    lengths = sorted(counts)
    low, high = lengths[0], _quantile(lengths, counts, 0.99)
    width = next(width for width in _widths() if high // width - low // width < most)
    start = low // width * width
    held = [0] * (high // width - low // width + 1)
    for length, count in counts.items():
        held[min((length - start) // width, len(held) - 1)] += count
    bins = [Bin(start + n * width, start + (n + 1) * width, count) for n, count in enumerate(held)]
    return [*bins[:-1], bins[-1]._replace(beyond=lengths[-1] >= bins[-1].end)]


def _widths() -> Iterator[int]:
    power = 1
    while True:
        yield from (step * power for step in _STEPS)
        power *= 10


def _quantile(lengths: list[int], counts: Mapping[int, int], share: float) -> int:
    needed, seen = share * sum(counts.values()), 0
    for length in lengths:
        seen += counts[length]
        if seen >= needed:
            return length
    return lengths[-1]


def histogram_lines(bins: list[Bin], *, limit: int | None = None, columns: int = 80, plain: bool = False) -> list[str]:
    """Return ``bins`` as lines of bars, at most ``columns`` wide, with a rule where ``limit`` tokens are passed.

    ``plain`` draws in ASCII.
    """
    if not bins:
        return []
    full, names = max(one.samples for one in bins), [_name(one) for one in bins]
    wide, count_wide = max(map(len, names)), len(str(full))
    room = max(10, columns - wide - count_wide - 4)
    lines, marked = [], limit is None
    for one, name in zip(bins, names, strict=True):
        if limit is not None and not marked and one.start > limit:
            lines.append(_mark(limit, columns, plain))
            marked = True
        bar = _bar(one.samples / full * room, plain)
        lines.append(f"{name:>{wide}}  {one.samples:>{count_wide}}  {bar}".rstrip())
        if limit is not None and not marked and (one.beyond or limit < one.end):
            lines.append(_mark(limit, columns, plain))
            marked = True
    return lines


def _name(one: Bin) -> str:
    return f"{one.start}+" if one.beyond else f"{one.start}-{one.end - 1}"


def _mark(limit: int, columns: int, plain: bool) -> str:
    line = "-" if plain else "─"
    return f" seq_length {limit} ".center(min(columns, 60), line)


def _bar(length: float, plain: bool) -> str:
    if plain:
        return "#" * max(round(length), length > 0)
    eighths = max(round(length * 8), length > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
