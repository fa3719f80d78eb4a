"""The three things one does with a file: read it, check it, convert it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from .errors import BadSamplesError, ParseError, RecordError
from .formats import Format, Messages, detect_format, find_format
from .media import MediaFolder
from .records import Record, read_records
from .report import Report, ReportBuilder, place
from .rules import faults_of
from .sample import Sample
from .writer import json_array, require_writable

OnFormat = Callable[[str], object]


def read(path: str | os.PathLike[str], *, format: str | None = None) -> Iterator[Sample]:
    """Yield the samples of ``path`` as they are, one in memory at a time; only the format's layout is checked.

    ``format`` is a name of :data:`FORMATS`; None takes it from the first record. Raises :class:`FormatError`,
    :class:`ParseError`, :class:`RecordError` at the first record that does not fit, and ``OSError``.
    """
    chosen = None if format is None else find_format(format)
    return _read(Path(path), chosen)


def _read(path: Path, chosen: Format | None) -> Iterator[Sample]:
    chosen, records = _opened(read_records(path), path, chosen)
    for record in records:
        try:
            yield chosen.parse(record.value)
        except RecordError as fault:
            raise RecordError(
                f"{path}: {place(record.number, record.line)}: {fault}",
                code=fault.code,
                record=record.number,
                line=record.line,
            ) from None


def check(
    source: str | os.PathLike[str],
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    source_format: str | None = None,
    on_format: OnFormat | None = None,
    progress: bool = False,
) -> Report:
    """Check every sample of ``source`` and its media, which are relative to ``dataset_dir`` (default: its folder).

    ``on_format`` is told the format's name before the first record is judged; ``progress`` shows a bar on a terminal.
    Problems are returned, not raised. Raises :class:`FormatError`, :class:`ParseError`, :class:`FolderError` and
    ``OSError`` where the file cannot be read.
    """
    path = Path(source)
    chosen = None if source_format is None else find_format(source_format)
    folder = path.parent if dataset_dir is None else Path(dataset_dir)
    report = ReportBuilder(source=str(path))
    media = MediaFolder(folder, folder)
    for _ in _judged(path, chosen, media, report, on_format, progress):
        pass
    return report.build()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    image_dir: str | os.PathLike[str] | None = None,
    dataset_dir: str | os.PathLike[str] | None = None,
    source_format: str | None = None,
    overwrite: bool = False,
    on_format: OnFormat | None = None,
    progress: bool = False,
) -> Report:
    """Convert ``source`` to the messages format; ``target`` appears only if every sample is clean.

    Media paths in the records are relative to ``image_dir`` (default: the folder of ``source``); they are stored
    relative to ``dataset_dir`` (default: the folder of ``target``). ``on_format`` and ``progress`` are as in
    :func:`check`. Raises :class:`BadSamplesError` with the report when samples have problems, :class:`TargetError`
    when ``target`` exists and ``overwrite`` is false, and otherwise what :func:`check` raises.
    """
    path, output = Path(source), Path(target)
    chosen = None if source_format is None else find_format(source_format)
    require_writable(output, overwrite=overwrite)
    media = MediaFolder(
        path.parent if image_dir is None else Path(image_dir),
        output.parent if dataset_dir is None else Path(dataset_dir),
    )
    builder = ReportBuilder(source=str(path))
    emit = Messages().emit
    with json_array(output, overwrite=overwrite) as write:
        for sample in _judged(path, chosen, media, builder, on_format, progress):
            if not builder.bad_records:
                write(emit(sample))
        report = builder.build()
        if not report.ok:
            raise BadSamplesError(report)
    return report


def _judged(
    path: Path,
    chosen: Format | None,
    media: MediaFolder,
    report: ReportBuilder,
    on_format: OnFormat | None,
    progress: bool,
) -> Iterator[Sample]:
    """Yield the clean samples with their stored paths; put all others into ``report``."""
    with _byte_bar(path, progress) as advance:
        chosen, records = _opened(read_records(path, on_bytes=advance), path, chosen)
        report.format = chosen.name
        if on_format is not None:
            on_format(chosen.name)
        for record in records:
            sample, faults = _judge(record, chosen, media)
            report.add(record.number, record.line, faults)
            if sample is not None and not faults:
                yield sample


def _judge(record: Record, chosen: Format, media: MediaFolder) -> tuple[Sample | None, list[RecordError]]:
    try:
        sample = chosen.parse(record.value)
    except RecordError as fault:
        return None, [fault]
    faults = list(faults_of(sample))
    images = _stored(sample.images, media.image, faults)
    videos = _stored(sample.videos, media.video, faults)
    return replace(sample, images=images, videos=videos), faults


def _stored(
    paths: tuple[str, ...], judge: Callable[[str], str | RecordError], faults: list[RecordError]
) -> tuple[str, ...]:
    verdicts = [judge(path) for path in paths]
    faults.extend(verdict for verdict in verdicts if isinstance(verdict, RecordError))
    return tuple(verdict for verdict in verdicts if isinstance(verdict, str))


def _opened(records: Iterator[Record], path: Path, chosen: Format | None) -> tuple[Format, Iterator[Record]]:
    """Return the format, taken from the first record if None was chosen, and all records."""
    first = next(records, None)
    if first is None:
        raise ParseError(f"{path}: the file holds no record")
    return chosen or detect_format(first.value), chain((first,), records)


@contextmanager
def _byte_bar(path: Path, shown: bool) -> Iterator[Callable[[int], object] | None]:
    """Give what counts the bytes read, on a bar that appears after two seconds and only on a terminal."""
    if not shown:
        yield None
        return
    from tqdm import tqdm

    total = path.stat().st_size if path.is_file() else None
    with tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, desc=path.name) as bar:
        yield bar.update
