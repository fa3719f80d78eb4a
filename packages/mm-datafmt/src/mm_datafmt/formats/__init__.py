"""The formats: one class each, two functions a class (``parse``, ``emit``), one table.

A new format is a subclass of :class:`Format` and one entry in :data:`FORMATS`. :func:`detect_format` asks them all
about the first records of a file; the one that is sure of most of them is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ..errors import FormatError, shown
from .alpaca import Alpaca
from .base import Format
from .coco import COCO_FORMATS, Coco
from .llava import Llava
from .messages import Messages
from .openai import OpenAi
from .sharegpt import ShareGpt

__all__ = ["FORMATS", "Coco", "Format", "detect_format", "find_format"]

FORMATS: Mapping[str, Format] = MappingProxyType(
    {f.name: f for f in (ShareGpt(), Llava(), OpenAi(), Messages(), Alpaca(), *COCO_FORMATS)}
)


def find_format(name: str) -> Format:
    """Return the format called ``name``, or raise :class:`FormatError` with the names there are."""
    if name not in FORMATS:
        raise FormatError(f"unknown format {shown(name)}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(records: Iterable[object]) -> Format:
    """Return the format of a file from its first records, or raise :class:`FormatError`."""
    first = list(records)
    seen = [record for record in first if isinstance(record, dict)]
    if not any({"conversations", "messages"} <= record.keys() for record in seen):
        votes = [(fmt, [fmt.detects(record) for record in seen]) for fmt in FORMATS.values()]
        found, vote = max(votes, key=lambda entry: (entry[1].count(2), entry[1].count(1)))
        if any(vote):
            return found
    legal = "; ".join(f"{fmt.name} has {fmt.signs}" for fmt in FORMATS.values())
    given = f"has the fields {shown(list(seen[0])[:12])}" if seen else f"is {shown(first[0] if first else None)}"
    raise FormatError(f"cannot tell the format: the first record {given}, but {legal}; name one with --from")
