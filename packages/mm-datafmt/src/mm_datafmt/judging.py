"""A decoded value becomes a sample whose media are found, or the reasons why not."""

from __future__ import annotations

from collections.abc import Callable

from .errors import RecordError
from .formats import Format
from .media import MediaFolder
from .repairs import repaired
from .rules import faults_of
from .sample import Sample

Verdict = tuple[Sample | None, list[RecordError]]
"""The sample, None if it is not fit for use, and what was wrong, also with one that was repaired."""


class Judge:
    """Parses, applies the rules and looks for the media; with ``repair`` it mends what it can."""

    def __init__(
        self,
        fmt: Format,
        media: MediaFolder,
        *,
        repair: bool = False,
        amend: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.format = fmt
        self._parse = fmt.parse
        self.media = media
        self._repair = repair
        self._amend = amend

    @property
    def amends(self) -> bool:
        """Whether samples are changed beyond what makes them fit for use."""
        return self._amend is not None

    def __call__(self, value: object) -> Verdict:
        """Return the verdict on ``value``, decoded JSON or the fault of a record that could not be decoded."""
        sample = self.parse(value)
        return (None, [sample]) if isinstance(sample, RecordError) else self.judge(sample)

    def parse(self, value: object) -> Sample | RecordError:
        """Return the sample that ``value`` holds, whatever its rules and media are like, or why it holds none."""
        if isinstance(value, RecordError):
            return value
        try:
            return self._parse(value)
        except RecordError as fault:
            return fault.with_traceback(None)

    def judge(self, sample: Sample) -> Verdict:
        """Return the verdict on what :meth:`parse` gave."""
        faults = faults_of(sample)
        mended = repaired(sample) if faults and self._repair else None
        missing: list[RecordError] = []
        stored = self._stored(mended or sample, missing)
        if missing or (faults and mended is None):
            return None, faults + missing
        if self._amend is not None:
            try:
                stored = self._amend(stored)
            except RecordError as fault:
                return None, [*faults, fault.with_traceback(None)]
        return stored, faults

    def _stored(self, sample: Sample, faults: list[RecordError]) -> Sample:
        """Return ``sample`` with the paths that are stored; add the faults of its media to ``faults``."""
        messages, images, videos, audios, tools, extra = sample
        media = self.media
        return Sample(
            messages,
            _paths(images, media.image, faults) if images else images,
            _paths(videos, media.video, faults) if videos else videos,
            _paths(audios, media.audio, faults) if audios else audios,
            tools,
            extra,
        )


def _paths(
    paths: tuple[str, ...], judge: Callable[[str], str | RecordError], faults: list[RecordError]
) -> tuple[str, ...]:
    stored = []
    for path in paths:
        verdict = judge(path)
        if isinstance(verdict, str):
            stored.append(verdict)
        else:
            faults.append(verdict)
    return tuple(stored)
