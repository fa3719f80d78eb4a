"""The pass of ``check`` over a file: options in, :class:`CheckReport` out, and the two files that it may write."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OptionError, ParseError, RecordError
from ..formats import find_format
from ..inputs import Input
from ..judging import Judge
from ..opening import OnFormat, byte_bar, opened
from ..outputs import bad_entry
from ..report import ReportBuilder
from ..splitting import Place
from ..writer import RecordFile, require_writable
from .duplicates import Duplicates
from .examiner import BadSink, Examiner
from .gallery import Gallery
from .lengths import LengthMeter, PixelRule
from .pictures import CheckedMedia, SizeLimits
from .result import CheckReport
from .text_tokens import Estimate, TextCounter, TokenizerFile

DUPLICATE = "duplicate_record"
DECODING = 4

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What follows from bad records; see :func:`check`."""

    on_bad: str = "error"
    max_bad_ratio: float = 0.0
    ignored: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.on_bad not in ("error", "skip", "repair"):
            raise OptionError(f"on_bad is {self.on_bad!r}; legal are error, skip, repair")
        if not 0 <= self.max_bad_ratio <= 1:
            raise OptionError(f"max_bad_ratio is {self.max_bad_ratio}; it must be between 0 and 1")


def check(
    source: AnyPath,
    *,
    dataset_dir: AnyPath | None = None,
    source_format: str | None = None,
    media: str = "header",
    limits: SizeLimits = SizeLimits(),  # noqa: B008 - frozen
    pixels: PixelRule = PixelRule(),  # noqa: B008 - frozen
    tokenizer: AnyPath | None = None,
    seq_length: int | None = None,
    on_bad: str = "error",
    max_bad_ratio: float = 0.0,
    ignore: Collection[str] = (),
    bad_file: AnyPath | None = None,
    html: AnyPath | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    on_format: OnFormat | None = None,
    progress: bool = False,
) -> CheckReport:
    """Check every sample of ``source`` and its media, in constant memory but for 18 to 36 bytes a record.

    Problems are returned, not raised, also those of records that are not JSON.

    Args:
        source: the file to check.
        dataset_dir: what media paths are relative to (default: the folder of ``source``).
        source_format: a name of :data:`FORMATS`; None takes it from the first records.
        media: ``header`` looks at an image's first and last bytes, ``decode`` at every pixel, ``exists`` whether there
            is a file, ``none`` at nothing (paths are checked as text).
        limits: of image sizes.
        pixels: how the trainer sizes images, for their tokens; an image that it would refuse is a fault.
        tokenizer: the folder of the model, whose ``tokenizer.json`` counts the text's tokens; None estimates them.
        seq_length: the trainer's limit in tokens; the report says how many samples it would cut.
        on_bad: ``error`` and ``skip`` reject every bad record, ``repair`` those that cannot be mended as
            :func:`convert` would.
        max_bad_ratio: largest share of rejected records with which the report has ``passed``.
        ignore: codes of faults that are none here.
        bad_file: a file that lists rejected and repaired records, as JSON lines if it ends in ``.jsonl``.
        html: a file for a report to look at, one page without anything outside it.
        overwrite: replace these two if they exist.
        workers: threads that look at images ahead; None takes none for headers, which a slow (network) disk may need,
            and 4 for decoding. The report is the same.
        on_format: told the format's name before the first record is judged.
        progress: show a bar on a terminal.

    Raises:
        ParseError: there is no record at all, or the tokenizer is none.
        FormatError, FolderError, TargetError, MissingPackageError, ValueError: about the arguments.
        OSError: the file cannot be read.
    """
    policy = Policy(on_bad=on_bad, max_bad_ratio=max_bad_ratio, ignored=frozenset(ignore))
    if seq_length is not None and seq_length < 1:
        raise OptionError(f"seq_length is {seq_length}; it must be at least 1")
    if source_format is not None:
        find_format(source_format)
    for target in (bad_file, html):
        if target is not None:
            require_writable(Path(target), overwrite=overwrite)
    path = Path(source)
    text: TextCounter = Estimate() if tokenizer is None else TokenizerFile(Path(tokenizer))
    meter = LengthMeter(rule=pixels, text=text)
    folder = path.parent if dataset_dir is None else Path(dataset_dir)
    found = CheckedMedia(folder, look=media, limits=limits, refusal=meter.refusal, ignored=policy.ignored)
    gallery = None if html is None else Gallery()
    with ExitStack() as stack:
        opened_file, chosen = opened(path, source_format, on_format)
        report = ReportBuilder(source=str(path), format=chosen.name)
        threads = (DECODING if media == "decode" else 0) if workers is None else workers
        examiner = Examiner(
            judge=Judge(chosen, found, repair=on_bad == "repair"),
            media=found,
            meter=meter,
            report=report,
            ignored=policy.ignored,
            pool=stack.enter_context(ThreadPoolExecutor(threads)) if threads and found.looks_inside else None,
            on_bad=None if bad_file is None else stack.enter_context(_bad_sink(Path(bad_file), path, overwrite)),
            watcher=gallery,
            duplicates=None if DUPLICATE in policy.ignored else Duplicates(),
        )
        _go_over(opened_file, examiner, progress)
        if not report.records:
            raise ParseError(f"{path}: the file holds no record")
    result = CheckReport.of(report.build(), meter.lengths(seq_length), on_bad=on_bad, max_bad_ratio=max_bad_ratio)
    if html is not None and gallery is not None:
        from .html_report import write_html

        write_html(Path(html), result, gallery, found, overwrite=overwrite)
    return result


def _go_over(source: Input, examiner: Examiner, progress: bool) -> None:
    with byte_bar([source], progress) as on_bytes:
        for run in source.runs(on_bytes=on_bytes):
            examiner.examine(run)


@contextmanager
def _bad_sink(target: Path, source: Path, overwrite: bool) -> Iterator[BadSink]:
    """Give what writes bad records to ``target``, which appears at the end, if there were any."""
    file = RecordFile(target, overwrite=overwrite)

    def sink(place: Place, faults: list[RecordError], mended: bool) -> None:
        file.write(bad_entry(place, faults, str(source), repaired=mended))

    try:
        file.open()
        yield sink
    except BaseException:
        file.remove()
        raise
    if file.size:
        file.finish()
    else:
        file.remove()
        target.unlink(missing_ok=True)  # of an earlier check that is being overwritten
