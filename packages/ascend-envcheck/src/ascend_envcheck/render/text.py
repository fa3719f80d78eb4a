"""A report as text for people.

A terminal shows the end of what was printed. So what is in order comes first, what could not be judged after it, then
the warnings, then the faults, and right below them the verdicts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator, Sequence

from ascend_envcheck.findings import NO, YES, Finding, Report, Severity, Verdict
from ascend_envcheck.messages import ENGLISH, Message, say, told
from ascend_envcheck.rules.rule import GROUPS, Rule
from ascend_envcheck.snapshot import Snapshot

_RUN, _SOURCE = say("run:", "执行："), say("source:", "来源：")
_SUMMARY = Message(
    "{fail} FAIL, {warn} WARN, {info} INFO, {skip} SKIP", "{fail} FAIL，{warn} WARN，{info} INFO，{skip} SKIP"
)
_LABEL_COLUMNS = 8
_REASONS = 2  # of a verdict
_LEAST_ID_COLUMNS = 16

_RED, _YELLOW, _GREEN, _FAINT, _PLAIN = "31", "33", "32", "2", ""
_OF_SEVERITY = {Severity.FAIL: _RED, Severity.WARN: _YELLOW, Severity.INFO: _GREEN, Severity.SKIP: _FAINT}
_OF_ANSWER = {NO: _RED, YES: _GREEN}


def render(
    report: Report,
    snapshot: Snapshot,
    rules: Sequence[Rule] = (),
    language: str = ENGLISH,
    *,
    colours: bool = False,
) -> str:
    """INFO a line each by group, SKIP a line a reason, WARN and FAIL with what to do, and the verdicts last."""
    python = snapshot.python
    start = f"ascend-envcheck {snapshot.tool_version}: Python {python.version}, {python.system} {python.machine}"
    lines: list[tuple[str, str]] = [(_PLAIN, start)]
    lines += _in_order(report, rules, language)
    lines += _skipped(report, language)
    for severity in (Severity.WARN, Severity.FAIL):
        lines += _troubles(report, severity, language)
    counts = {s.value.lower(): sum(f.severity is s for f in report.findings) for s in Severity}
    summary = say(_SUMMARY, _SUMMARY.in_chinese, **counts)
    lines += [(_PLAIN, ""), (_PLAIN, told(summary, language))]
    lines += [(_OF_ANSWER.get(each.answer, _YELLOW), _short(each).sentence(language)) for each in report.verdicts]
    return "".join(_coloured(printable(line), colour if colours else _PLAIN) + "\n" for colour, line in lines)


def printable(line: str) -> str:
    """The line without what could steer a terminal; a snapshot may come from anywhere."""
    return "".join(character if character.isprintable() else "?" for character in line)


def padded(text: str, columns: int) -> str:
    """The text with spaces after it up to a width; Chinese characters take two columns of a terminal."""
    from unicodedata import east_asian_width

    width = len(text) + sum(east_asian_width(character) in "WF" for character in text)
    return text + " " * (columns - width)


def by_group(findings: Sequence[Finding], rules: Sequence[Rule]) -> dict[str, list[Finding]]:
    """Findings by the group of their rule, groups in the order of `GROUPS`; of no known rule are those of others."""
    group_of = {rule.id: rule.group for rule in rules}
    groups: dict[str, list[Finding]] = {group: [] for group in GROUPS}
    for finding in findings:
        group = group_of.get(finding.id, "other")
        groups[group if group in groups else "other"].append(finding)
    return {group: members for group, members in groups.items() if members}


def _short(verdict: Verdict) -> Verdict:
    """A verdict in a line that one reads; what it leaves out stands above, or was asked to be left out."""
    left = len(verdict.reasons) - _REASONS
    if left <= 1:
        return verdict
    more = say("and {count} more", "另有 {count} 项", count=left)
    return replace(verdict, reasons=(*verdict.reasons[:_REASONS], more))


def _coloured(line: str, colour: str) -> str:
    return f"\x1b[{colour}m{line}\x1b[0m" if colour and line else line


def _in_order(report: Report, rules: Sequence[Rule], language: str) -> Iterator[tuple[str, str]]:
    infos = [finding for finding in report.findings if finding.severity is Severity.INFO]
    columns = _columns(infos)
    for group, members in by_group(infos, rules).items():
        yield _PLAIN, ""
        yield _PLAIN, told(GROUPS[group], language)
        for finding in members:
            yield _GREEN, f"  INFO  {finding.id:<{columns}}  {told(finding.cause, language)}"


def _skipped(report: Report, language: str) -> Iterator[tuple[str, str]]:
    reasons: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.severity is Severity.SKIP:
            reasons.setdefault(told(finding.cause, language), []).append(finding.id)
    if reasons:
        yield _PLAIN, ""
    for reason, ids in reasons.items():
        yield _FAINT, f"SKIP  {reason}: {', '.join(dict.fromkeys(ids))}"


def _troubles(report: Report, severity: Severity, language: str) -> Iterator[tuple[str, str]]:
    found = [finding for finding in report.findings if finding.severity is severity]
    columns = _columns(found)
    indent = " " * (len(severity.value) + 2 + columns + 2)
    if found:
        yield _PLAIN, ""
    for finding in found:
        yield _OF_SEVERITY[severity], f"{severity.value}  {finding.id:<{columns}}  {told(finding.cause, language)}"
        for label, value in ((_RUN, finding.command), (_SOURCE, finding.source)):
            if value:
                yield _PLAIN, f"{indent}{padded(told(label, language), _LABEL_COLUMNS)}{told(value, language)}"


def _columns(findings: Sequence[Finding]) -> int:
    return max([_LEAST_ID_COLUMNS, *(len(finding.id) for finding in findings)])
