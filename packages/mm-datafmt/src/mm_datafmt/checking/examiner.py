"""The records of a file, a run at a time: judged, compared with each other, measured."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import RecordError
from ..judging import Judge
from ..report import ReportBuilder
from ..sample import Sample
from ..splitting import Place, Run
from .duplicates import Duplicates, digest_of
from .lengths import LengthMeter, Size
from .pictures import CheckedMedia

BadSink = Callable[[Place, list[RecordError], bool], object]


class Watcher(Protocol):
    """Is shown every record, in order: for a gallery."""

    def see(self, number: int, sample: Sample, faults: list[RecordError], length: int | None) -> None:
        """Take a look; ``sample`` is as the file gives it."""


@dataclass(kw_only=True)
class Examiner:
    """Judges runs into ``report`` and ``meter``; bad records also go to ``on_bad``, all that parse to ``watcher``.

    Faults with a code in ``ignored`` are passed over where the record can be used all the same.
    """

    judge: Judge
    media: CheckedMedia
    meter: LengthMeter
    report: ReportBuilder
    ignored: Collection[str] = ()
    pool: Executor | None = None
    on_bad: BadSink | None = None
    watcher: Watcher | None = None
    duplicates: Duplicates | None = field(default_factory=Duplicates)

    def examine(self, run: Run) -> None:
        """Judge the records of ``run``."""
        first = run.start.number
        parsed = [self.judge.parse(value) for value in run.values]
        samples = [one for one in parsed if isinstance(one, Sample)]
        self.media.look_ahead((path for sample in samples for path in sample.images), self.pool)
        self.report.records += len(parsed)
        bad: list[tuple[int, list[RecordError], bool]] = []
        fit: list[tuple[int, Sample]] = []
        faults_of: dict[int, list[RecordError]] = {}
        for index, one in enumerate(parsed):
            usable, faults = self._judged(one, first + index)
            if usable is not None:
                fit.append((index, usable))
            if faults:
                faults_of[index] = faults
                bad.append((index, faults, usable is not None))
        lengths = self._measured(fit, parsed)
        self._note(run, bad)
        if self.watcher is not None:
            for index, one in enumerate(parsed):
                if isinstance(one, Sample):
                    self.watcher.see(first + index, one, faults_of.get(index, []), lengths.get(index))

    def _judged(self, one: Sample | RecordError, number: int) -> tuple[Sample | None, list[RecordError]]:
        if isinstance(one, RecordError):
            return None, [one]
        usable, faults = self.judge.judge(one)
        if self.ignored and faults:
            faults = [fault for fault in faults if fault.code not in self.ignored]
            usable = one if not faults else usable
        earlier = self.duplicates.first(digest_of(one), number) if self.duplicates is not None else None
        if earlier is not None:
            faults = [*faults, RecordError(f"says the same as record {earlier}", code="duplicate_record")]
            usable = None
        return usable, faults

    def _measured(self, fit: list[tuple[int, Sample]], parsed: list[Sample | RecordError]) -> dict[int, int | None]:
        pairs: list[tuple[Sample, list[Size]]] = []
        for index, usable in fit:
            source = parsed[index]
            assert isinstance(source, Sample), "only what was parsed is fit for use"
            pairs.append((usable, [self.media.picture(path)[1:] for path in source.images]))
        return dict(zip([index for index, _ in fit], self.meter.add(pairs), strict=True))

    def _note(self, run: Run, bad: list[tuple[int, list[RecordError], bool]]) -> None:
        if not bad:
            return
        places = run.places()
        for index, faults, mended in bad:
            self.report.add_bad(places[index], faults, repaired=mended)
            if self.on_bad is not None:
                self.on_bad(places[index], faults, mended)
