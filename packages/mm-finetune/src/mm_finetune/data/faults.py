"""What becomes of records that can't be used: found before the run by their headers, or later when they are read.

Whoever takes part must take the same decision at the same step. So a record that its header gives away is left out of
the order, which is made from an index that all processes share. One that fails only when it is decoded keeps its place
and its shape: zeros for pixels and no loss, from that step on, on every process (:mod:`mm_finetune.data.exchange` tells
them). Nothing is replaced or moved, so nothing can fall out of step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mm_datafmt import RecordError, Sample, read_each
from mm_finetune.errors import DataError

FAULT = "fault"
"""The key of ``Sample.extra`` that says why a record could not be read; the sample then has no messages."""

SHOWN = 5  # faults named in a message; the rest is counted


class Fault(NamedTuple):
    """Why a record can't be used.

    ``code`` is one of ``missing`` (a file is not there), ``unreadable``, ``conversation`` (no record of its format, its
    turns or placeholders), ``too_long``, ``no_loss`` (no token carries loss), ``hangs`` (decoding took too long),
    ``changed`` (a picture has another size than before the run).
    """

    record: int
    code: str
    message: str


def records_of(path: Path, parse: Callable[[object], Sample] | None = None) -> Iterator[Sample]:
    """The records of a file; one that can't be read keeps its place, and says why when it is asked for.

    Args:
        path: the file.
        parse: as of :func:`mm_datafmt.read_each`.

    Raises:
        DataFormatError: the file as a whole can't be read.
    """
    for found in read_each(path, parse=parse):
        if isinstance(found, RecordError):
            yield Sample((), extra={FAULT: f"{found} (line {found.line})"})
        else:
            yield found


def require_read(sample: Sample) -> None:
    """Raise :class:`DataError` for what stands in the place of a record that can't be read."""
    if not sample.messages:
        raise DataError(str((sample.extra or {})[FAULT]))


class BadRecords:
    """The policy for bad records, and the list of them.

    Args:
        on_bad: ``error`` or ``skip``.
        max_ratio: with ``skip``, the largest share of bad records.
        total: records of the data set.
        path: ``bad.jsonl``, written by one process; None: not written.
    """

    def __init__(self, on_bad: Literal["error", "skip"], max_ratio: float, total: int, path: Path | None) -> None:
        self._on_bad, self._max_ratio, self._total, self._path = on_bad, max_ratio, total, path
        self.records: set[int] = set()

    def add(self, faults: Iterable[Fault], *, step: int | None = None) -> None:
        """Note faults, the same on every process.

        Args:
            faults: records that are known already are passed over.
            step: at which they were found; None: before the first.

        Raises:
            DataError: the policy does not bear them.
        """
        new = list({fault.record: fault for fault in faults if fault.record not in self.records}.values())
        if not new:
            return
        self.records.update(fault.record for fault in new)
        self._write(new, step)
        if self._on_bad == "error":
            raise DataError(f"{described(new)}; repair or remove them, or set data.on_bad: skip")
        if len(self.records) > self._max_ratio * self._total:
            raise DataError(
                f"{len(self.records)} of {self._total} records can't be used, more than data.max_bad_ratio"
                f" {self._max_ratio} allows: {described(new)}"
            )

    def _write(self, faults: Sequence[Fault], step: int | None) -> None:
        if self._path is None:
            return
        rows = (json.dumps({**fault._asdict(), "step": step}, ensure_ascii=False) + "\n" for fault in faults)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(rows)


def described(faults: Sequence[Fault]) -> str:
    """The first faults in words, the others as a number."""
    more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    if all(fault.code == "missing" for fault in faults):
        files = ", ".join(f"{fault.message} (record {fault.record})" for fault in faults[:SHOWN])
        return f"pictures missing: {files}{more}; is data.dataset_dir right?"
    return "; ".join(f"record {fault.record}: {fault.message}" for fault in faults[:SHOWN]) + more
