"""What a pass over a file found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import RecordError, shown

LISTED = 20
"""How many problems a text lists."""

KEPT = 1000
"""How many problems a report keeps, so that a million bad records do not fill the memory; all are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One fault: ``record`` counts from 1, ``line`` is that of a JSON lines file, ``code`` the reason as one word."""

    record: int
    line: int | None
    code: str
    message: str

    def __str__(self) -> str:
        return f"{place(self.record, self.line)}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome for one file.

    ``counts`` says how often each code occurred; ``problems`` holds the first :data:`KEPT` in the order of the file.
    """

    source: str
    format: str
    records: int
    bad_records: int
    problem_count: int
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return self.problem_count == 0

    def describe(self) -> str:
        """Return the report as text: one line, and where there are problems the first :data:`LISTED` of them."""
        head = f"{shown(self.source, 300)} ({self.format}): {_plural(self.records, 'record')}"
        if self.ok:
            return f"{head}, no problems"
        lines = [f"{head}, {_plural(self.problem_count, 'problem')} in {_plural(self.bad_records, 'record')}"]
        lines += [f"  {problem}" for problem in self.problems[:LISTED]]
        if self.problem_count > LISTED:
            lines.append(f"  and {self.problem_count - LISTED} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)


@dataclass(kw_only=True)
class ReportBuilder:
    """Counts records and faults while a file is read."""

    source: str
    format: str = ""
    records: int = 0
    bad_records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add(self, record: int, line: int | None, faults: list[RecordError]) -> None:
        """Take note of one record and of what is wrong with it."""
        self.records += 1
        self.bad_records += bool(faults)
        for fault in faults:
            self.counts[fault.code] += 1
            if len(self.problems) < KEPT:
                self.problems.append(Problem(record=record, line=line, code=fault.code, message=str(fault)))

    def build(self) -> Report:
        """Return what was found."""
        return Report(
            source=self.source,
            format=self.format,
            records=self.records,
            bad_records=self.bad_records,
            problem_count=self.counts.total(),
            counts=dict(sorted(self.counts.items())),
            problems=tuple(self.problems),
        )


def place(record: int, line: int | None) -> str:
    """Return where a record stands, in words."""
    return f"record {record}" if line is None else f"record {record} (line {line})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
