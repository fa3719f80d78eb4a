"""Inputs → samples → one output file: the loop that reads, judges, writes, and goes on where it was interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .data_json import write_data_json
from .decoding import UNDECODED
from .emitting import Emitter, Outcome
from .errors import BadSamplesError, DataFormatError, FormatError, OptionError, ParseError
from .formats import Coco, find_format
from .inputs import Input
from .journal import Journal, fingerprint, is_complete
from .judging import Judge
from .locking import only_one
from .media import MediaFolder
from .opening import OnFormat, byte_bar, opened, undecoded
from .outcomes import Done, in_order, one_by_one
from .outputs import Outputs, appear_after_all, validation_path
from .pictures import PictureFolder
from .report import Report, ReportBuilder
from .sources import Source, mixed
from .spooling import spooled
from .writer import between_records, part_of, require_writable

ON_BAD = ("error", "skip", "repair")
CHECKPOINT_SECONDS = 2.0
"""Time between two states that ``--resume`` can go on from."""

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the output depends on, apart from the inputs; :func:`convert` documents each."""

    target_format: str = "messages"
    seed: int = 0
    shuffle: bool = False
    max_samples: int | None = None
    val_ratio: float = 0.0
    on_bad: str = "error"
    max_bad_ratio: float | None = None
    media: str = "verify"
    boxes: str = ""
    image_max_pixels: int = 262144

    def __post_init__(self) -> None:
        if self.on_bad not in ON_BAD:
            raise OptionError(f"on_bad is {self.on_bad!r}; legal are {', '.join(ON_BAD)}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise OptionError(f"seed is {self.seed}; it must fit into 64 bits")
        if self.max_samples is not None and self.max_samples < 1:
            raise OptionError(f"max_samples is {self.max_samples}; it must be at least 1")
        if not 0 <= self.val_ratio < 1:
            raise OptionError(f"val_ratio is {self.val_ratio}; it must be at least 0 and below 1")
        if self.max_bad_ratio is not None and not 0 <= self.max_bad_ratio <= 1:
            raise OptionError(f"max_bad_ratio is {self.max_bad_ratio}; it must be between 0 and 1")


def convert(
    source: AnyPath | Source | Sequence[AnyPath | Source],
    target: AnyPath,
    *,
    image_dir: AnyPath | None = None,
    dataset_dir: AnyPath | None = None,
    source_format: str | None = None,
    target_format: str = "messages",
    seed: int = 0,
    shuffle: bool = False,
    max_samples: int | None = None,
    val_ratio: float = 0.0,
    on_bad: str = "error",
    max_bad_ratio: float | None = None,
    media: str = "verify",
    boxes: str = "",
    image_max_pixels: int = 262144,
    resume: bool = False,
    overwrite: bool = False,
    data_json: AnyPath | None = None,
    workers: int = 1,
    on_format: OnFormat | None = None,
    progress: bool = False,
) -> Report:
    """Convert one or several files; ``target`` (a JSON array, or JSON lines if it ends in ``.jsonl``) appears complete.

    Args:
        source: a file, or several; :class:`Source` gives one a weight (see :mod:`mm_datafmt.sources`).
        target: the file to write.
        image_dir: what media paths in the records are relative to (default: the folder of each source).
        dataset_dir: what they are stored relative to (default: the folder of ``target``).
        source_format: a name of :data:`FORMATS`; None takes it from the first records.
        target_format: the format to write.
        seed: of the shuffle and of the choice of validation records.
        shuffle: whether records are shuffled, over all sources.
        max_samples: stop after so many written records, validation included.
        val_ratio: share of the written records that go to ``<target>.val.json`` instead.
        on_bad: ``error`` writes nothing if any record is bad; ``skip`` leaves bad records out, ``repair`` mends what it
            can and leaves out the rest; both list them in ``<target>.bad.jsonl``.
        max_bad_ratio: largest share of rejected records with which the output still appears.
        media: how closely files are looked at, one of :data:`mm_datafmt.media.MEDIA_CHECKS`.
        resume: go on where an interrupted call with the same arguments stopped.
        overwrite: replace files that exist.
        data_json: also write MindSpeed MM's ``data.json`` for the output there.
        workers: processes that judge and encode, where nothing is shuffled or mixed; the result is the same.
        on_format: told the format of each source before the first record is judged.
        progress: show a bar on a terminal.

    Raises:
        BadSamplesError: records have problems (``error``), too many have, or none is left; ``.report`` holds them.
        ParseError: a source is not JSON (with ``error``: anywhere; else only if nothing of it can be read).
        FormatError, FolderError, TargetError, ResumeError, MissingPackageError, ValueError: about the arguments.
        OSError: a file cannot be read or written. After it, as after an interruption, ``resume`` may go on.
    """
    options = Options(
        target_format=target_format,
        seed=seed,
        shuffle=shuffle,
        max_samples=max_samples,
        val_ratio=val_ratio,
        on_bad=on_bad,
        max_bad_ratio=max_bad_ratio,
        media=media,
        boxes=boxes,
        image_max_pixels=image_max_pixels,
    )
    several = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    sources = [one if isinstance(one, Source) else Source(Path(one)) for one in several]
    weights = _weights(sources)
    output = Path(target)
    journal_path = part_of(output, "journal")
    # The main file gets its name last: then all have theirs, perhaps even data_json, and are those that shall be there.
    have_appeared = resume and is_complete(journal_path) and not part_of(output).exists()
    for file in (output, *([] if data_json is None else [Path(data_json)])):
        require_writable(file, overwrite=overwrite or have_appeared)
    stored_in = output.parent if dataset_dir is None else Path(dataset_dir)
    found_in = [one.path.parent if image_dir is None else Path(image_dir) for one in sources]
    folders = [MediaFolder(folder, stored_in, check=media) for folder in found_in]
    written = find_format(target_format)
    if isinstance(written, Coco):
        raise FormatError(f"{target_format} can only be read")
    pairs = [opened(one.path, source_format, on_format) for one in sources]
    report = ReportBuilder(
        source=", ".join(str(one.path) for one in sources),
        format=", ".join(dict.fromkeys(fmt.name for _, fmt in pairs)),
        target_format=target_format,
    )
    names = [os.fsencode(one.path).decode("utf-8", "replace") for one in sources]
    amend = None
    if boxes:
        from .grounding import BoxConversion

        conversion, pictures = BoxConversion.named(boxes, image_max_pixels or None), PictureFolder(stored_in)
        amend = partial(conversion, size_of=pictures)
    judges = [
        Judge(fmt, media, repair=on_bad == "repair", amend=amend)
        for (_, fmt), media in zip(pairs, folders, strict=True)
    ]
    inputs = [source for source, _ in pairs]
    resumable = all(one.seekable for one in inputs)
    job = _Job(
        options=options,
        emitter=Emitter(judges, written, between_records(output)),
        workers=workers,
        report=report,
        names=names,
        resumable=resumable,
    )
    settings: dict[str, Any] = {
        "options": vars(options),
        "weights": weights,
        "formats": [fmt.name for _, fmt in pairs],
        "folders": [str(folder.resolve()) for folder in (*found_in, stored_in)],
    }
    if resumable:  # of the inputs themselves: copies of them are made anew
        settings["sources"] = [fingerprint(one.path) for one in inputs]
    journal = Journal(journal_path, settings)
    with only_one(output), spooled(inputs, output, needed=shuffle or weights is not None) as usable:
        job.run(usable, weights, output, journal, resume=resume, overwrite=overwrite, progress=progress)
        if data_json is not None:
            write_data_json(
                Path(data_json),
                dataset=output,
                validation=validation_path(output) if val_ratio else None,
                dataset_dir=stored_in,
            )
        journal.remove()
    return report.build()


def can_go_on(target: AnyPath) -> bool:
    """Return whether an interrupted conversion to ``target`` left something to ``resume`` from."""
    return part_of(Path(target), "journal").exists()


@dataclass(kw_only=True)
class _Job:
    options: Options
    emitter: Emitter
    report: ReportBuilder
    names: Sequence[str]
    workers: int
    resumable: bool

    def run(
        self,
        inputs: Sequence[Input],
        weights: Sequence[float] | None,
        output: Path,
        journal: Journal,
        *,
        resume: bool,
        overwrite: bool,
        progress: bool,
    ) -> None:
        state = journal.load() if resume else None
        if state is None:
            journal.remove()
        else:
            self.report.restore(state["report"])
        if state is not None and state["complete"]:
            appear_after_all(
                output,
                val_ratio=self.options.val_ratio,
                keep_bad=self.options.on_bad != "error",
                sizes=state["sizes"],
                overwrite=overwrite,
            )
            return
        outputs = Outputs(
            output,
            val_ratio=self.options.val_ratio,
            seed=self.options.seed,
            keep_bad=self.options.on_bad != "error",
            overwrite=overwrite,
            sizes=None if state is None else state["sizes"],
        )
        with _kept_or_removed(outputs, journal), byte_bar(inputs, progress) as on_bytes:
            outputs.open()
            place = None if state is None else state["place"]
            if self.options.shuffle or weights is not None:
                seed = self.options.seed if self.options.shuffle else None
                dones = one_by_one(self.emitter, mixed(inputs, weights, seed, place, on_bytes))
            else:
                dones = in_order(self.emitter, inputs, place, on_bytes, self.workers)
            with closing(dones):
                self._loop(dones, outputs, journal if self.resumable else None)
            self._accept()
            sizes = outputs.complete()
            if self.resumable:
                journal.save({"complete": True, "report": self.report.state(), "sizes": sizes})
            outputs.appear()

    def _loop(self, dones: Iterator[Done], outputs: Outputs, journal: Journal | None) -> None:
        report, limit = self.report, self.options.max_samples
        saved = time.monotonic()
        if limit is not None and report.written >= limit:
            return
        for source, outcome, place, again in dones:
            if limit is not None and report.written + outcome.written >= limit:
                outcome = again(limit - report.written)
            report.records += outcome.read
            report.lost.update(outcome.lost)
            self._note(source, outcome, outputs)
            if limit is not None and report.written >= limit:
                return
            if journal is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                sizes = outputs.flush()
                journal.save({"complete": False, "place": place, "report": report.state(), "sizes": sizes})
                saved = time.monotonic()

    def _note(self, source: int, outcome: Outcome, outputs: Outputs) -> None:
        name = self.names[source]
        for place, faults, mended in outcome.bad:
            if self.options.on_bad == "error" and faults[0].code in UNDECODED:
                raise undecoded(place, outcome.layout, faults[0], name)
            self.report.add_bad(place, faults, repaired=mended, source=name if len(self.names) > 1 else "")
            outputs.write_bad(place, faults, name, repaired=mended)
        if self.options.on_bad == "error" and self.report.bad_records:
            return
        self.report.validation += outputs.write(outcome.data, outcome.written, self.report.written)
        self.report.written += outcome.written

    def _accept(self) -> None:
        """Raise unless what was read may be published."""
        report = self.report
        rejected = report.bad_records - report.repaired
        if not report.records:
            raise ParseError(f"{report.source}: the file holds no record")
        ratio, reason = self.options.max_bad_ratio, None
        if self.options.on_bad == "error" and report.bad_records:
            reason = ""
        elif ratio is not None and rejected > ratio * report.records:
            reason = f"{rejected} of {report.records} records were rejected, more than max_bad_ratio {ratio}"
        elif not report.written:
            reason = "no record is left"
        if reason is not None:
            report.written = report.validation = 0  # what was is thrown away
            raise BadSamplesError(report.build(), reason)


def _weights(sources: Sequence[Source]) -> list[float] | None:
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise FormatError("some sources have a weight and some have none: give all of them one, or none")
    return weights if len(weights) > 1 else None


@contextmanager
def _kept_or_removed(outputs: Outputs, journal: Journal) -> Iterator[None]:
    """Keep the temporary files of a conversion that was interrupted and can go on; remove those of a failed one."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        keep = journal.path.exists() and not isinstance(error, DataFormatError)
        outputs.close(keep=keep)
        if not keep:
            journal.remove()
        raise
    except BaseException:
        outputs.close(keep=False)
        journal.remove()
        raise
