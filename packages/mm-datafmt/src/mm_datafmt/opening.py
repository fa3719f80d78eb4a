"""What every pass over files begins with: open them, tell the format, show a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .errors import FormatError, ParseError, RecordError
from .formats import Coco, Format, detect_format, find_format
from .inputs import Input, first_runs, open_input
from .report import place
from .splitting import Place, Run

_SAMPLED = 16

OnFormat = Callable[[str], object]


def opened(path: Path, format_name: str | None, on_format: OnFormat | None = None) -> tuple[Input, Format]:
    """Return the file and its format, taken from its first records if no name is given, and tell ``on_format``.

    Raises :class:`FormatError`, :class:`ParseError` and ``OSError``.
    """
    chosen = None if format_name is None else find_format(format_name)
    source = open_input(path)
    if source.kind == "coco":
        chosen = chosen or find_format(coco_format(source))
        if not isinstance(chosen, Coco):
            raise FormatError(f"{path} is a COCO annotation file, not {chosen.name}")
        source = replace(source, joined=chosen.joined)
    elif isinstance(chosen, Coco):
        raise FormatError(f"{path} is no COCO annotation file: 'images' and 'annotations' at the top are missing")
    elif chosen is None:
        records = _sampled(source)
        try:
            chosen = detect_format(records)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
    if on_format is not None:
        on_format(chosen.name)
    return source, chosen


def _sampled(source: Input) -> list[object]:
    """Return the first few records, those that can be decoded. Raises :class:`ParseError` if there are none."""
    records: list[object] = []
    first = None
    for run in first_runs(source):
        first = first or run
        records.extend(value for value in run.values if not isinstance(value, RecordError))
        if len(records) >= _SAMPLED:
            break
    if first is None:
        raise ParseError(f"{source.path}: the file holds no record")
    if not records:
        raise_if_undecoded(first, 0, str(source.path))
    return records[:_SAMPLED]


def coco_format(source: Input) -> str:
    """Return what a COCO file is read as by default: captions if its annotations have any, else boxes."""
    from .coco_file import has_captions

    return "coco_captions" if has_captions(source) else "coco_boxes"


def raise_if_undecoded(run: Run, index: int, path: str) -> None:
    """Raise :class:`ParseError` if record ``index`` of ``run`` could not be decoded."""
    fault = run.values[index]
    if isinstance(fault, RecordError):
        raise undecoded(run.places()[index], run.layout, fault, path)


def undecoded(where: Place, layout: str, fault: RecordError, path: str) -> ParseError:
    """Return the error that says which record of a run of that ``layout`` could not be decoded."""
    offset = where.offset + (fault.offset or 0)
    message = f"{path}: {fault}"
    if fault.code != "truncated" or layout == "lines":
        hint = "; JSON lines hold one whole record on each line" if layout == "lines" else ""
        message = f"{path}: {place(where.number, where.line)} is not valid JSON at byte {offset}: {fault}{hint}"
    return ParseError(message, record=where.number, offset=offset)


@contextmanager
def byte_bar(inputs: Sequence[Input], shown: bool) -> Iterator[Callable[[int], object] | None]:
    """Give what counts the bytes read, on a bar that appears after two seconds and only on a terminal."""
    if not shown or not sys.stderr.isatty():  # so that a program that reads us need not wait for the import
        yield None
        return
    from tqdm import tqdm

    sizes = [source.path.stat().st_size for source in inputs if source.seekable]
    total = sum(sizes) if len(sizes) == len(inputs) else None
    with tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, desc=inputs[0].path.name) as bar:
        yield bar.update
