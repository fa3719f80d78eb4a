"""A report in the form that was asked for."""

from __future__ import annotations

from typing import Sequence

from ascend_envcheck.findings import Report
from ascend_envcheck.messages import ENGLISH
from ascend_envcheck.rules.rule import Rule
from ascend_envcheck.snapshot import Snapshot


def rendered(
    report: Report,
    snapshot: Snapshot,
    rules: Sequence[Rule],
    *,
    kind: str,
    language: str = ENGLISH,
    colours: bool = False,
) -> str:
    """The report in one of the forms, ending in a newline.

    Args:
        report: what was found.
        snapshot: where.
        rules: by which rules; they tell the group and the title of a finding.
        kind: text, json, sarif, junit or markdown. What machines read is in English.
        language: of text and markdown.
        colours: whether text may colour; a terminal that wants none, and a pipe, get none.
    """
    if kind == "json":
        return report.to_json()
    if kind == "sarif":
        from ascend_envcheck.render import sarif

        return sarif.render(report, snapshot, rules)
    if kind == "junit":
        from ascend_envcheck.render import junit

        return junit.render(report, snapshot, rules)
    if kind == "markdown":
        from ascend_envcheck.render import markdown

        return markdown.render(report, snapshot, language)
    from ascend_envcheck.render import text

    return text.render(report, snapshot, rules, language, colours=colours)
