"""What ``check`` found: a report with lengths and a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..report import Report
from .histogram import bins_of
from .lengths import Lengths


@dataclass(frozen=True, kw_only=True)
class CheckReport(Report):
    """A :class:`Report` on a file that nothing was written from.

    ``lengths`` are those of the samples fit for use, repaired ones included. ``max_bad_ratio`` is the share of records
    that may be rejected for :attr:`passed`.
    """

    lengths: Lengths
    on_bad: str = "error"
    max_bad_ratio: float = 0.0

    @classmethod
    def of(cls, report: Report, lengths: Lengths, *, on_bad: str, max_bad_ratio: float) -> CheckReport:
        """Return ``report`` with what else was found."""
        held = {one.name: getattr(report, one.name) for one in fields(Report)}
        return cls(**held, lengths=lengths, on_bad=on_bad, max_bad_ratio=max_bad_ratio)

    @property
    def passed(self) -> bool:
        """Whether no more records are rejected than may be."""
        return self.rejected <= self.max_bad_ratio * self.records

    def describe(self) -> str:
        """Return the report as text, with the lengths; the histogram is drawn by :mod:`.histogram`."""
        lines = [Report.describe(self)]
        if self.bad_records:
            lines.append("by reason: " + ", ".join(f"{code} {count}" for code, count in self.counts.items()))
        if self.bad_records and self.on_bad != "error":
            lines.append(f"rejected {self.rejected}, repaired {self.repaired}")
        return "\n".join([*lines, *self.lengths.describe()])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types; lengths as a summary and bins."""
        held = asdict(self)
        held["lengths"] = self.lengths.summary()
        held["lengths"]["histogram"] = [list(one[:3]) for one in bins_of(self.lengths.counts)]
        return held | {"passed": self.passed, "rejected": self.rejected}
