"""What a pass over a file found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import RecordError, shown

if TYPE_CHECKING:
    from .splitting import Place

LISTED = 20
"""How many problems a text lists."""

KEPT = 1000
"""How many problems a report keeps, so that a million bad records do not fill the memory; all are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One fault: where its record stands (number and line from 1, first byte), the reason as one word and in words."""

    record: int
    line: int | None
    code: str
    message: str
    offset: int | None = None
    source: str = ""
    repaired: bool = False

    def __str__(self) -> str:
        where = place(self.record, self.line)
        prefix = f"{self.source}: " if self.source else ""
        return f"{prefix}{where}: {self.message}{' (repaired)' if self.repaired else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a pass.

    ``records`` were read, ``bad_records`` of them have faults, ``repaired`` of those were mended; the others were
    rejected, so ``records == written + rejected`` after a conversion. ``validation`` of the written ones went into the
    validation file. ``counts`` says how often each code occurred; ``problems`` holds the first :data:`KEPT` in the
    order of reading. ``lost`` counts the records that had a field without a place in the output, by field.
    """

    source: str
    format: str
    records: int
    bad_records: int
    problem_count: int
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]
    repaired: int = 0
    written: int = 0
    validation: int = 0
    target_format: str = ""
    lost: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return self.problem_count == 0

    @property
    def rejected(self) -> int:
        """How many records were left out."""
        return self.bad_records - self.repaired

    def describe(self) -> str:
        """Return the report as text: one line, and where there are problems the first :data:`LISTED` of them."""
        head = f"{shown(self.source, 300)} ({self.format}): {_plural(self.records, 'record')}"
        if self.ok:
            lines = [f"{head}, no problems"]
        else:
            lines = [f"{head}, {_plural(self.problem_count, 'problem')} in {_plural(self.bad_records, 'record')}"]
            lines += [f"  {problem}" for problem in self.problems[:LISTED]]
            if self.problem_count > LISTED:
                lines.append(f"  and {self.problem_count - LISTED} more")
        lines += [
            f"  field {shown(name)} of {_plural(count, 'record')} has no place in {self.target_format}"
            for name, count in self.lost.items()
            if self.written
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)


@dataclass(kw_only=True)
class ReportBuilder:
    """Counts records and faults while files are read."""

    source: str
    format: str = ""
    target_format: str = ""
    records: int = 0
    bad_records: int = 0
    repaired: int = 0
    written: int = 0
    validation: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add_bad(self, place: Place, faults: Sequence[RecordError], *, repaired: bool = False, source: str = "") -> None:
        """Take note of one record's faults; all records are counted by :attr:`records`."""
        self.bad_records += 1
        self.repaired += repaired
        for fault in faults:
            self.counts[fault.code] += 1
            if len(self.problems) < KEPT:
                offset = place.offset + (fault.offset or 0)
                self.problems.append(
                    Problem(
                        record=place.number,
                        line=place.line,
                        code=fault.code,
                        message=str(fault),
                        offset=offset,
                        source=source,
                        repaired=repaired,
                    )
                )

    def build(self) -> Report:
        """Return what was found."""
        return Report(
            source=self.source,
            format=self.format,
            target_format=self.target_format,
            records=self.records,
            bad_records=self.bad_records,
            repaired=self.repaired,
            written=self.written,
            validation=self.validation,
            problem_count=self.counts.total(),
            counts=dict(sorted(self.counts.items())),
            lost=dict(sorted(self.lost.items())),
            problems=tuple(self.problems),
        )

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs to go on, as plain JSON types."""
        return vars(self) | {
            "counts": dict(self.counts),
            "lost": dict(self.lost),
            "problems": [asdict(problem) for problem in self.problems],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        for name, value in state.items():
            setattr(self, name, Counter(value) if name in ("counts", "lost") else value)
        self.problems = [Problem(**problem) for problem in state["problems"]]


def place(record: int, line: int | None) -> str:
    """Return where a record stands, in words."""
    return f"record {record}" if line is None else f"record {record} (line {line})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
