"""A report as JUnit XML, for the test page of a CI server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from ascend_envcheck.findings import Finding, Report, Severity
from ascend_envcheck.render.text import by_group, printable
from ascend_envcheck.rules.rule import GROUPS, Rule
from ascend_envcheck.snapshot import Snapshot

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


def render(report: Report, snapshot: Snapshot, rules: Sequence[Rule]) -> str:
    """A suite a group and a case a rule that was run: FAIL fails it, WARN is its output, SKIP alone skips it."""
    from xml.etree.ElementTree import Element, SubElement, tostring

    root = Element("testsuites", name="ascend-envcheck")
    for group, findings in by_group(report.findings, rules).items():
        suite = SubElement(root, "testsuite", name=str(GROUPS[group]))
        by_id: dict[str, list[Finding]] = {}
        for finding in findings:
            by_id.setdefault(finding.id, []).append(finding)
        for id_, members in by_id.items():
            _case(suite, group, id_, members)
        _count(suite)
    _verdicts(root, report, snapshot)
    _count(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _case(suite: Element, group: str, id_: str, findings: Sequence[Finding]) -> None:
    from xml.etree.ElementTree import SubElement

    case = SubElement(suite, "testcase", classname=f"ascend_envcheck.{group}", name=printable(id_), time="0")
    failures = [finding for finding in findings if finding.severity is Severity.FAIL]
    warnings = [finding for finding in findings if finding.severity is Severity.WARN]
    if failures:
        failure = SubElement(case, "failure", message=printable(failures[0].cause), type="FAIL")
        failure.text = _text(failures)
    elif all(finding.severity is Severity.SKIP for finding in findings):
        SubElement(case, "skipped", message=printable("; ".join(finding.cause for finding in findings)))
    if warnings:
        SubElement(case, "system-out").text = _text(warnings)


def _verdicts(root: Element, report: Report, snapshot: Snapshot) -> None:
    from xml.etree.ElementTree import Element, SubElement

    suite = Element("testsuite", name=f"verdicts of ascend-envcheck {printable(snapshot.tool_version)}")
    properties = SubElement(suite, "properties")
    for verdict in report.verdicts:
        SubElement(properties, "property", name=f"{verdict.task} {verdict.device}", value=printable(str(verdict)))
    _count(suite)
    root.insert(0, suite)


def _text(findings: Sequence[Finding]) -> str:
    """Cause, command and source; XML has no way to write most control characters."""
    parts = ((f.cause, f.command and f"run: {f.command}", f.source and f"source: {f.source}") for f in findings)
    return "\n".join(printable(line) for lines in parts for line in lines if line)


def _count(element: Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        element.set(name, str(sum(1 for _ in element.iter(tag))))
    element.set("errors", "0")
