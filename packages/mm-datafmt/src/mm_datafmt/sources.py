"""Several inputs, their weights, and the order in which their records are taken.

:func:`in_sequence` reads one input after another. :func:`mixed` shuffles or mixes: it goes over the inputs once for an
index (16 bytes a record), decides the order from that, and fetches the records from where they stand. Either yields
steps, each with the place from which an interrupted conversion goes on.

The order of a shuffle depends on the seed and on each record's input and number, on nothing else: records are sorted by
a keyed hash (BLAKE2b). Weights are shares: with ``a=0.7 b=0.3`` as many records are taken as there are until one of the
two would have to repeat itself, and every stretch of the output holds them in that proportion.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from .decoding import decode
from .errors import FormatError, RecordError, shown
from .inputs import Input
from .splitting import Cursor, Run

_BUCKETS = 256


@dataclass(frozen=True)
class Source:
    """An input file and, if inputs are mixed, its share."""

    path: Path
    weight: float | None = None

    @classmethod
    def named(cls, text: str) -> Source:
        """Return the source that ``PATH`` or ``PATH=WEIGHT`` names; a file whose very name is ``text`` comes first.

        Raises :class:`FormatError` for a weight that is no positive number.
        """
        path, equals, weight = text.rpartition("=")
        if not equals or not path or Path(text).exists():
            return cls(Path(text))
        try:
            value = float(weight)
        except ValueError:
            return cls(Path(text))
        if not 0 < value < float("inf"):
            raise FormatError(f"the weight of {shown(path)} is {weight}; it must be a positive number")
        return cls(Path(path), value)


class Step(NamedTuple):
    """A run of input number ``source``, and the state from which to go on behind it."""

    source: int
    run: Run
    state: list[Any]


def in_sequence(
    inputs: Sequence[Input], state: Sequence[Any] | None, on_bytes: Callable[[int], object] | None
) -> Iterator[Step]:
    """Yield the runs of all inputs in turn, from ``state`` on."""
    first, cursor = (0, None) if state is None else (state[0], cursor_of(state[1]))
    for number in range(first, len(inputs)):
        for run in inputs[number].runs(cursor, on_bytes=on_bytes):
            yield Step(number, run, state_of(number, run.end))
        cursor = None


def state_of(source: int, cursor: Cursor) -> list[Any]:
    """Return the state from which to go on at ``cursor`` in input number ``source``, as plain JSON types."""
    return [source, [*cursor[:3], cursor.opening.decode("latin-1"), cursor.glued]]


def cursor_of(state: Sequence[Any]) -> Cursor:
    """Return the cursor within such a state."""
    number, line, offset, opening, glued = state
    return Cursor(number, line, offset, opening.encode("latin-1"), glued)


class Index:
    """Where every record of several seekable, unpacked inputs stands."""

    def __init__(self, inputs: Sequence[Input], on_bytes: Callable[[int], object] | None = None) -> None:
        self._inputs = inputs
        self._offsets, self._sizes, self._lines = array("Q"), array("I"), array("I")
        self._faults: dict[int, RecordError] = {}
        self.starts = [0]
        for source in inputs:
            for run in source.runs(on_bytes=on_bytes):
                self._add(run)
            self.starts.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self._offsets)

    def _add(self, run: Run) -> None:
        for place, value in zip(run.places(), run.values, strict=True):
            if isinstance(value, RecordError):
                self._faults[len(self._offsets)] = value
            self._offsets.append(place.offset)
            self._sizes.append(len(place.text))
            self._lines.append(place.line)

    def source_of(self, record: int) -> int:
        """Return the number of the input that holds record ``record``, counted over all inputs from 0."""
        return bisect_right(self.starts, record) - 1

    def fetch(self, files: Sequence[int], record: int) -> Run:
        """Return record ``record`` as a run of one, read through the open ``files`` (descriptors)."""
        source, offset = self.source_of(record), self._offsets[record]
        text = os.pread(files[source], self._sizes[record], offset)
        number = record - self.starts[source] + 1
        start = Cursor(number, self._lines[record], offset)
        value = self._faults.get(record) or decode(text)
        return Run(start, [value], text, "array", start)


def mixed(
    inputs: Sequence[Input],
    weights: Sequence[float] | None,
    seed: int | None,
    state: Sequence[Any] | None,
    on_bytes: Callable[[int], object] | None,
) -> Iterator[Step]:
    """Yield single records in mixed order: shuffled if there is a ``seed``, in proportion if there are ``weights``."""
    index = Index(inputs, on_bytes)
    done = 0 if state is None else state[0]
    files = [os.open(source.path, os.O_RDONLY) for source in inputs]
    try:
        for position, record in enumerate(_order(index, weights, seed)):
            if position >= done:
                yield Step(index.source_of(record), index.fetch(files, record), [position + 1])
    finally:
        for file in files:
            os.close(file)


def _order(index: Index, weights: Sequence[float] | None, seed: int | None) -> Iterator[int]:
    if weights is None:
        assert seed is not None, "without weights and without a seed, inputs are read in sequence"
        return _shuffled(index, range(len(index)), seed)
    parts = [range(start, end) for start, end in zip(index.starts, index.starts[1:], strict=False)]
    orders = [iter(part) if seed is None else _shuffled(index, part, seed) for part in parts]
    return _in_proportion(orders, weights)


def _in_proportion(orders: Sequence[Iterator[int]], weights: Sequence[float]) -> Iterator[int]:
    """Take from whichever is furthest behind its share, until that one has no more."""
    total = sum(weights)
    taken = [0] * len(orders)
    for count in range(1 << 62):
        behind = [weight / total * (count + 1) - n for weight, n in zip(weights, taken, strict=True)]
        source = behind.index(max(behind))
        record = next(orders[source], None)
        if record is None:
            return
        taken[source] += 1
        yield record


def _shuffled(index: Index, records: range, seed: int) -> Iterator[int]:
    """Yield ``records`` in the order of their keys, sorted a bucket at a time to save memory."""
    buckets = [array("Q") for _ in range(_BUCKETS)]
    for record in records:
        source = index.source_of(record)
        key = record_key(seed, source, record - index.starts[source])
        buckets[key >> 56].extend((key, record))
    for bucket in buckets:
        yield from (record for _, record in sorted(zip(bucket[::2], bucket[1::2], strict=True)))


def record_key(seed: int, source: int, number: int) -> int:
    """Return 64 bits that depend on these three numbers alone."""
    data = b"%d %d %d" % (seed, source, number)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
