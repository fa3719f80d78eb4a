"""A report as SARIF 2.1.0, for what collects results of many tools.

Source of names and rules: OASIS, Static Analysis Results Interchange Format, version 2.1.0.
"""

from __future__ import annotations

from typing import Any, Sequence

from ascend_envcheck.findings import Finding, Report, Severity
from ascend_envcheck.rules.rule import Rule
from ascend_envcheck.snapshot import Snapshot

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render(report: Report, snapshot: Snapshot, rules: Sequence[Rule]) -> str:
    """One run with a result for each finding; the verdicts are properties of the run."""
    import json

    return json.dumps(document(report, snapshot, rules), indent=2) + "\n"


def document(report: Report, snapshot: Snapshot, rules: Sequence[Rule]) -> dict[str, Any]:
    """The SARIF log as plain values."""
    descriptors = _descriptors(report, rules)
    index = {descriptor["id"]: number for number, descriptor in enumerate(descriptors)}
    driver = {"name": "ascend-envcheck", "version": snapshot.tool_version, "language": "en-US", "rules": descriptors}
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True}],
        "results": [_result(finding, index[finding.id]) for finding in report.findings],
        "properties": {"verdicts": [str(verdict) for verdict in report.verdicts]},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _descriptors(report: Report, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    titles = {rule.id: str(rule.title) for rule in rules}
    links: dict[str, str] = {}
    for finding in report.findings:
        titles.setdefault(finding.id, finding.id)  # a rule of others may speak under another id than its own
        if finding.source.startswith(("https://", "http://")) and len(finding.source.split()) == 1:
            links.setdefault(finding.id, finding.source)
    return [
        {"id": id_, "shortDescription": {"text": title}, **({"helpUri": links[id_]} if id_ in links else {})}
        for id_, title in titles.items()
    ]


def _result(finding: Finding, index: int) -> dict[str, Any]:
    kind, level = _kind_and_level(finding)
    facts = {"command": finding.command, "source": finding.source, "blocks": finding.blocks, "tasks": finding.tasks}
    return {
        "ruleId": finding.id,
        "ruleIndex": index,
        "kind": kind,
        "level": level,
        "message": {"text": str(finding.cause)},
        "properties": {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()},
    }


def _kind_and_level(finding: Finding) -> tuple[str, str]:
    """§3.27.9, §3.27.10: only ``fail`` has a level; ``open`` is what could not be decided but matters."""
    if finding.severity is Severity.FAIL:
        return "fail", "error"
    if finding.severity is Severity.WARN:
        return "fail", "warning"
    if finding.severity is Severity.INFO:
        return "informational", "none"
    return "open" if finding.doubts else "notApplicable", "none"
