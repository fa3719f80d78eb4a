"""The files of one conversion: records, validation records, bad ones; all of them appear, or none."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import orjson

from .decoding import decode, encode
from .errors import RecordError
from .sources import record_key
from .splitting import Place
from .writer import RecordFile, part_of, require_writable

_VALIDATION = -1  # where a source's number stands in other keys


def validation_path(target: Path) -> Path:
    """Return where the validation records of ``target`` go: ``train.json`` → ``train.val.json``."""
    return target.with_suffix(f".val{target.suffix}")


def bad_path(target: Path) -> Path:
    """Return where the rejected and repaired records of ``target`` go: ``train.json`` → ``train.bad.jsonl``."""
    return target.with_suffix(".bad.jsonl")


def bad_entry(place: Place, faults: Sequence[RecordError], source: str, *, repaired: bool) -> bytes:
    """Return the line of a bad record: where it stands, the reasons, and the record (as text if it is not JSON)."""
    value = decode(place.text)
    try:
        held: dict[str, object] = {"value": orjson.Fragment(encode(value))}
    except TypeError:
        held = {"text": place.text.decode("utf-8", "replace")}
    entry = {
        "source": source,
        "record": place.number,
        "line": place.line,
        "offset": place.offset,
        "code": faults[0].code,
        "action": "repaired" if repaired else "rejected",
        "problems": [{"code": fault.code, "message": str(fault)} for fault in faults],
        **held,
    }
    return orjson.dumps(entry)


class Outputs:
    """Takes encoded records and bad ones, and shares the former out.

    Of every ``1 / val_ratio`` records in a row one, chosen by ``seed``, is for validation.
    """

    def __init__(
        self, target: Path, *, val_ratio: float, seed: int, keep_bad: bool, overwrite: bool, sizes: Sequence[int] | None
    ) -> None:
        self._ratio, self._seed = val_ratio, seed
        names = _names(target, val_ratio, keep_bad)
        for name in names:
            require_writable(name, overwrite=overwrite)
        held = sizes or [0] * len(names)
        self.files = [RecordFile(name, size=size, overwrite=overwrite) for name, size in zip(names, held, strict=True)]
        self._bad = self.files[-1] if keep_bad else None

    def open(self) -> None:
        """Begin the files, or go on with them: call it where :meth:`close` is sure to follow."""
        for file in self.files:
            file.open()

    def write(self, records: bytes, count: int, written: int) -> int:
        """Append ``count`` joined records, of which ``written`` came before; return how many were for validation."""
        if not self._ratio or not count:
            self.files[0].write(records)
            return 0
        between = self.files[0].between
        chosen = [is_validation(number, self._ratio, self._seed) for number in range(written, written + count)]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for record, is_chosen in zip(records.split(between), chosen, strict=True):
            parts[is_chosen].append(record)
        for file, part in zip(self.files, parts, strict=False):
            file.write(between.join(part))
        return sum(chosen)

    def write_bad(self, place: Place, faults: Sequence[RecordError], source: str, *, repaired: bool) -> None:
        """Note a rejected or repaired record with its reasons."""
        if self._bad is None:
            return
        self._bad.write(bad_entry(place, faults, source, repaired=repaired))

    def flush(self) -> list[int]:
        """Let the disk have everything, and return the sizes."""
        for file in self.files:
            file.flush()
        return [file.size for file in self.files]

    def complete(self) -> list[int]:
        """Write the ends of all files, and return the sizes before."""
        for file in self.files:
            file.complete()
        return [file.size for file in self.files]

    def appear(self) -> None:
        """Give all files their names, the main one last. A file of bad records appears only if there are any."""
        for file in reversed(self.files):
            if file is self._bad and not file.size:
                file.remove()
                file.target.unlink(missing_ok=True)  # of an earlier run that is being overwritten
            else:
                file.appear()

    def close(self, *, keep: bool) -> None:
        """Stop; ``keep`` what was written for another attempt, or leave nothing."""
        for file in self.files:
            file.close() if keep else file.remove()


def appear_after_all(target: Path, *, val_ratio: float, keep_bad: bool, sizes: Sequence[int], overwrite: bool) -> None:
    """Do what is left of :meth:`Outputs.appear` after it was killed."""
    names = _names(target, val_ratio, keep_bad)
    for number, (name, size) in reversed(list(enumerate(zip(names, sizes, strict=True)))):
        part = part_of(name)
        if not part.exists():
            continue
        if keep_bad and number == len(names) - 1 and not size:
            part.unlink()
            name.unlink(missing_ok=True)
        else:
            require_writable(name, overwrite=overwrite)
            part.replace(name)


def _names(target: Path, val_ratio: float, keep_bad: bool) -> list[Path]:
    return [target] + [validation_path(target)] * (val_ratio > 0) + [bad_path(target)] * keep_bad


def is_validation(number: int, ratio: float, seed: int) -> bool:
    """Return whether the ``number``-th record written (from 0) is for validation: one of each stretch of 1/ratio."""
    stretch = int(number * ratio)
    if number < ceil(stretch / ratio):
        stretch -= 1
    elif number >= ceil((stretch + 1) / ratio):
        stretch += 1
    begin, end = ceil(stretch / ratio), ceil((stretch + 1) / ratio)
    return number == begin + record_key(seed, _VALIDATION, stretch) % (end - begin)
