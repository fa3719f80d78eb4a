"""Inputs that one cannot jump about in, copied into plain files while they are shuffled or mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .decoding import encode
from .errors import RecordError
from .inputs import Input
from .writer import part_of


@contextmanager
def spooled(inputs: Sequence[Input], output: Path, *, needed: bool) -> Iterator[Sequence[Input]]:
    """Give the inputs; if ``needed``, those that are packed, tables or pipes as copies beside ``output``."""
    copies: list[Path] = []
    try:
        usable = []
        for number, source in enumerate(inputs):
            if needed and (source.packing or not source.seekable or source.kind in ("parquet", "coco")):
                copies.append(part_of(output, f"spool{number}"))
                source = _copied(source, copies[-1])
            usable.append(source)
        yield usable
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)


def _copied(source: Input, copy: Path) -> Input:
    plain = Input(path=copy, kind=source.kind, max_record=source.max_record)
    with copy.open("wb") as file:
        if source.kind not in ("parquet", "coco"):
            with source.open() as window:
                while window.available(1):
                    file.write(window.buffer[window.position :])
                    window.position = len(window.buffer)
            return plain
        for run in source.runs():
            file.writelines(_encoded(value) + b"\n" for value in run.values)
    return replace(plain, kind="lines")


def _encoded(value: object) -> bytes:
    """Return a row as a line; one that is broken stays a record, and one that no format takes."""
    try:
        return b"null" if isinstance(value, RecordError) else encode(value)
    except TypeError:  # a table may hold what JSON cannot
        return b"null"
