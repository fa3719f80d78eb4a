"""What a data set consists of, in one pass and in constant memory.

Lengths and sizes are counted in a :class:`Histogram`: numbers below 256 exactly, larger ones to eight binary digits, so
that a percentile is the true one up to 256 and within 0.4 % of it above (half a bucket: 1/256). Counts, sums, smallest
and largest are exact.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecordError, shown
from .opening import OnFormat, byte_bar, opened
from .pictures import PictureFolder
from .sample import Sample

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BITS = 8
_WAITING = 1 << 12


class Histogram:
    """Whole numbers from 0 on, in at most 256 + 128 buckets per power of two."""

    def __init__(self) -> None:
        self.count = self.total = self.largest = 0
        self.smallest = -1
        self._buckets: Counter[int] = Counter()
        self._waiting: list[int] = []

    def add(self, value: int) -> None:
        """Count ``value``."""
        self._waiting.append(value)
        if len(self._waiting) == _WAITING:
            self.settle()

    def settle(self) -> None:
        """Take note of all that was added: many numbers at once take a fraction of the time."""
        values, self._waiting = self._waiting, []
        if not values:
            return
        self.count += len(values)
        self.total += sum(values)
        self.largest = max(self.largest, *values)
        self.smallest = min(values) if self.smallest < 0 else min(self.smallest, *values)
        for value, count in Counter(values).items():
            shift = max(0, value.bit_length() - _BITS)
            self._buckets[value >> shift << shift] += count

    def percentile(self, percent: float) -> int:
        """Return the smallest counted number that ``percent`` % of all do not exceed (0 if there are none)."""
        self.settle()
        rank, seen = percent / 100 * self.count, 0
        for low, count in sorted(self._buckets.items()):
            seen += count
            if seen >= rank:
                middle = low + (1 << max(0, low.bit_length() - _BITS)) // 2
                return min(max(middle, self.smallest), self.largest)
        return 0

    def summary(self) -> Spread:
        """Return what is told of it."""
        self.settle()
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        mean = round(self.total / self.count, 1) if self.count else 0.0
        return Spread(count=self.count, min=max(0, self.smallest), mean=mean, max=self.largest, percentiles=percentiles)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a number is spread: exact count, least, mean and greatest, percentiles to 0.4 %."""

    count: int
    min: int
    mean: float
    max: int
    percentiles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What :func:`stats` found.

    ``records`` were read; ``unreadable`` says for which reasons some are no samples, and those count nowhere else.
    ``characters`` of a turn's text are by role, ``all`` those of a whole record. ``pictures`` (not the distinct ones)
    are by format of their files, ``missing_pictures`` by reason; sizes are in pixels of the file, ``aspect`` is the
    longer side as a percentage of the shorter.
    """

    source: str
    format: str
    records: int
    unreadable: Mapping[str, int]
    with_system: int
    with_tools: int
    turns: Spread
    roles: Mapping[str, int]
    characters: Mapping[str, Spread]
    images_per_record: Spread
    videos: int
    audios: int
    pictures: Mapping[str, int]
    missing_pictures: Mapping[str, int]
    orientations: Mapping[str, int]
    width: Spread
    height: Spread
    aspect: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return asdict(self)

    def describe(self) -> str:
        """Return it as text for people."""
        return "\n".join(_lines(self))


def stats(
    path: str | os.PathLike[str],
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    source_format: str | None = None,
    pictures: bool = True,
    on_format: OnFormat | None = None,
    progress: bool = False,
) -> Statistics:
    """Count what ``path`` holds; headers of pictures (unless ``pictures`` is False) are read under ``dataset_dir``.

    Raises :class:`FormatError`, :class:`ParseError` (no record at all), :class:`FolderError` and ``OSError``.
    """
    file = Path(path)
    folder = PictureFolder(file.parent if dataset_dir is None else Path(dataset_dir)) if pictures else None
    source, fmt = opened(file, source_format, on_format)
    counts = _Counts()
    with byte_bar([source], progress) as on_bytes:
        for run in source.runs(on_bytes=on_bytes):
            for value in run.values:
                counts.records += 1
                try:
                    if isinstance(value, RecordError):
                        raise value
                    counts.add(fmt.parse(value), folder)
                except RecordError as fault:
                    counts.unreadable[fault.code] += 1
    return counts.build(str(file), fmt.name)


@dataclass(kw_only=True)
class _Counts:
    records: int = 0
    with_system: int = 0
    with_tools: int = 0
    videos: int = 0
    audios: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    missing_pictures: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    turns: Histogram = field(default_factory=Histogram)
    characters: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    images_per_record: Histogram = field(default_factory=Histogram)
    width: Histogram = field(default_factory=Histogram)
    height: Histogram = field(default_factory=Histogram)
    aspect: Histogram = field(default_factory=Histogram)

    def add(self, sample: Sample, folder: PictureFolder | None) -> None:
        self.turns.add(len(sample.messages))
        self.with_system += any(message.role == "system" for message in sample.messages[:1])
        self.with_tools += sample.tools is not None
        characters, whole = self.characters, 0
        for role, content, _, _ in sample.messages:
            length = len(content)
            whole += length
            characters[role].add(length)
        characters["all"].add(whole)
        self.images_per_record.add(len(sample.images))
        self.videos += len(sample.videos)
        self.audios += len(sample.audios)
        if folder is not None:
            for path in sample.images:
                self._picture(path, folder)

    def _picture(self, path: str, folder: PictureFolder) -> None:
        picture = folder(path)
        if isinstance(picture, RecordError):
            self.missing_pictures[picture.code] += 1
            return
        kind, width, height = picture
        self.pictures[kind] += 1
        self.width.add(width)
        self.height.add(height)
        self.aspect.add(round(100 * max(width, height) / max(1, min(width, height))))
        self.orientations["wide" if width > height else "tall" if height > width else "square"] += 1

    def build(self, source: str, format_name: str) -> Statistics:
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = value.summary() if isinstance(value, Histogram) else value
        spreads = {role: lengths.summary() for role, lengths in self.characters.items()}
        roles = {role: spread.count for role, spread in spreads.items() if role != "all"}
        for name in ("unreadable", "pictures", "missing_pictures", "orientations"):
            values[name] = dict(values[name].most_common())
        values["characters"] = spreads
        return Statistics(source=source, format=format_name, roles=roles, **values)


def _lines(found: Statistics) -> Iterator[str]:
    usable = found.records - sum(found.unreadable.values())
    yield f"{shown(found.source, 300)} ({found.format}): {found.records} records, {usable} samples"
    for title, counts in (
        ("unreadable", found.unreadable),
        ("turns by role", found.roles),
        ("pictures by format", found.pictures),
        ("pictures not found", found.missing_pictures),
        ("pictures by shape", found.orientations),
        ("others", {"with system turn": found.with_system, "with tools": found.with_tools}),
        ("other media", {"videos": found.videos, "audios": found.audios}),
    ):
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        if told:
            yield f"{title:<20} {told}"
    columns = ("min", *(f"p{percent}" for percent in PERCENTILES), "max")
    yield f"{'':<20} " + " ".join(f"{column:>9}" for column in columns) + f" {'mean':>11}"
    spreads = {
        "turns a record": found.turns,
        **{f"characters, {role}": spread for role, spread in found.characters.items()},
        "pictures a record": found.images_per_record,
        "width": found.width,
        "height": found.height,
        "aspect in %": found.aspect,
    }
    for title, spread in spreads.items():
        if spread.count:
            numbers = (spread.min, *spread.percentiles.values(), spread.max)
            yield f"{title:<20} " + " ".join(f"{number:>9}" for number in numbers) + f" {spread.mean:>11.1f}"
