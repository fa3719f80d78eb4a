"""Decoded values become encoded records of the target format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .decoding import decode, encode, is_sound
from .errors import RecordError
from .formats import Format
from .judging import Judge
from .plain import PlainPath, Written
from .splitting import Place, Run, unrepeated


class Bad(NamedTuple):
    """A record with faults: where it stands, the faults, and whether it was mended."""

    place: Place
    faults: list[RecordError]
    mended: bool


class Outcome(NamedTuple):
    """What became of ``read`` values of a run of that ``layout``.

    ``written`` records, encoded and joined in ``data``; the bad ones; how many records had a field without a place, by
    field.
    """

    layout: str
    read: int
    written: int
    data: bytes
    bad: list[Bad]
    lost: Counter[str]


class Emitter:
    """Judges the values of each source and encodes the samples as ``target`` writes them.

    ``between`` stands between encoded records, which hold no newline.
    """

    def __init__(self, judges: Sequence[Judge], target: Format, between: bytes) -> None:
        self._judges = judges
        self._target = target
        self.between = between
        self._plain = [PlainPath.between(judge, target) for judge in judges]

    def __call__(self, source: int, run: Run, most: int | None = None) -> Outcome:
        """Return what becomes of a run of input number ``source``, till ``most`` records are written."""
        values, may_be_unsound = run.values, run.layout != "rows"
        if may_be_unsound and not any(value.__class__ is RecordError for value in values):
            values = unrepeated(run.text, run.layout, values)
        judge, plain = self._judges[source], self._plain[source]
        records: list[bytes] = []
        places: list[Place] = []
        bad: list[Bad] = []
        lost: Counter[tuple[str, ...]] = Counter()
        read = 0
        for value in values:
            if len(records) == most:
                break
            written = None if plain is None else plain(value)
            if written is None:
                if may_be_unsound and not is_sound((value,)):
                    places = places or run.places()
                    value = decode(places[read].text)
                written, faults = self._the_long_way(judge, value)
                if faults:
                    places = places or run.places()
                    bad.append(Bad(places[read], faults, written is not None))
            if written is not None:
                records.append(written[0])
                lost[written[1]] += 1
            read += 1
        return Outcome(run.layout, read, len(records), self.between.join(records), bad, _by_field(lost))

    def _the_long_way(self, judge: Judge, value: object) -> tuple[Written | None, list[RecordError]]:
        """Return what is written, and all faults."""
        sample, faults = judge(value)
        if sample is None:
            return None, faults
        try:
            record = encode(self._target.emit(sample))
        except RecordError as fault:
            return None, [*faults, fault.with_traceback(None)]
        except TypeError as error:  # nested too deeply, or half a surrogate pair in a field of the record
            return None, [*faults, RecordError(f"cannot be written: {error}", code="not_carried")]
        return (record, tuple(self._target.lost(sample))), faults


def _by_field(layouts: Counter[tuple[str, ...]]) -> Counter[str]:
    fields: Counter[str] = Counter()
    for names, count in layouts.items():
        for name in names:
            fields[name] += count
    return fields
