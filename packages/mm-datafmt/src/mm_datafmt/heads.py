"""A few records of a file, byte for byte: the first ones, or some chosen by chance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from heapq import heappush, heapreplace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .appearing import appearing
from .errors import FormatError, OptionError, ParseError, RecordError, TargetError
from .inputs import Input, open_input
from .sources import record_key
from .splitting import Place


class Taken(NamedTuple):
    """How many records were written; how many were passed over on the way because they are not JSON."""

    written: int
    passed_over: int


def head(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | BinaryIO,
    n: int,
    *,
    random: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Taken:
    """Write ``n`` records of ``source`` (or all, if there are fewer), each with the very bytes it has there.

    An array becomes an array, JSON lines stay lines; both may be packed, the output is not. The first ``n`` are taken,
    and reading stops behind them; ``random`` takes any, each as likely as the other, in the order of the file: which
    ones depends on ``seed`` and on how many there are. ``n`` records are held in memory then. Records that are not JSON
    are passed over and counted.

    ``target`` appears complete; it may also be an open binary file. Raises :class:`ParseError` if no record is left,
    :class:`FormatError` for parquet and COCO files, whose records have no bytes of their own, :class:`TargetError`
    (also for an array that is to be named ``.jsonl``), :class:`FolderError`, ``ValueError`` (``n`` below 1) and
    ``OSError``.
    """
    if n < 1:
        raise OptionError(f"n is {n}; it must be at least 1")
    found = open_input(Path(source))
    if found.kind not in ("array", "lines"):
        raise FormatError(
            f"{source} is a {found.kind} file, whose records have no text: take convert --max_samples {n}"
        )
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        if found.kind == "array" and path.suffix == ".jsonl":
            raise TargetError(f"{source} is an array and is copied as it is: name the output .json, or use convert")
        with appearing(path, overwrite=overwrite) as file:
            return _copied(found, file, n, seed if random else None)
    return _copied(found, target, n, seed if random else None)


def _copied(source: Input, file: BinaryIO, n: int, seed: int | None) -> Taken:
    counts = {"passed_over": 0}
    records: Iterable[bytes]
    if seed is None:
        records = islice(_records(source, counts), n)
    else:
        records = _chosen(source, counts, n, seed)
    written = 0
    between, end = (b",\n", b"\n]\n") if source.kind == "array" else (b"\n", b"\n")
    for record in records:
        file.write(between if written else b"[\n" if source.kind == "array" else b"")
        file.write(record)
        written += 1
    if not written:
        raise ParseError(f"{source.path}: the file holds no record that is JSON")
    file.write(end)
    return Taken(written, counts["passed_over"])


def _records(source: Input, counts: dict[str, int]) -> Iterator[bytes]:
    for run in source.runs():
        for value, place in zip(run.values, run.places(), strict=True):
            if isinstance(value, RecordError):
                counts["passed_over"] += 1
            else:
                yield place.text


def _chosen(source: Input, counts: dict[str, int], n: int, seed: int) -> list[bytes]:
    """Return the ``n`` records with the smallest keys in their order; a key depends on seed and number alone."""
    kept: list[tuple[int, int, bytes]] = []
    for run in source.runs():
        places: list[Place] = []
        for index, value in enumerate(run.values):
            if isinstance(value, RecordError):
                counts["passed_over"] += 1
                continue
            number = run.start.number + index
            key = -record_key(seed, 0, number)
            if len(kept) < n or key > kept[0][0]:
                places = places or run.places()  # a scan of the run, rarely needed further on
                entry = (key, number, places[index].text)
                heappush(kept, entry) if len(kept) < n else heapreplace(kept, entry)
    return [record for _, _, record in sorted(kept, key=lambda entry: entry[1])]
