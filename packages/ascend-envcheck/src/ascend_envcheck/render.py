"""A report as text for people."""

from __future__ import annotations

from typing import Iterator

from ascend_envcheck.findings import Finding, Report, Severity
from ascend_envcheck.snapshot import Snapshot

_INDENT = " " * 24


def as_text(report: Report, snapshot: Snapshot) -> str:
    """The findings, most severe first, what was skipped in one line a reason, and the verdicts last."""
    python = snapshot.python
    lines = [f"ascend-envcheck {snapshot.tool_version}: Python {python.version}, {python.system} {python.machine}", ""]
    for finding in report.findings:
        if finding.severity is not Severity.SKIP:
            lines += _finding(finding)
    lines += _skipped(report)
    lines += ["", *(str(verdict) for verdict in report.verdicts)]
    return "\n".join(printable(line) for line in lines) + "\n"


def printable(line: str) -> str:
    """The line without what could steer a terminal; a snapshot may come from anywhere."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _finding(finding: Finding) -> Iterator[str]:
    yield f"{finding.severity.value}  {finding.id:<16}  {finding.cause}"
    if finding.severity in (Severity.FAIL, Severity.WARN):
        if finding.command:
            yield f"{_INDENT}run:    {finding.command}"
        if finding.source:
            yield f"{_INDENT}source: {finding.source}"


def _skipped(report: Report) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.severity is Severity.SKIP:
            reasons.setdefault(finding.cause, []).append(finding.id)
    for reason, ids in reasons.items():
        yield f"SKIP  {', '.join(ids)}: {reason}"
