"""A report as Markdown, to be pasted into an issue."""

from __future__ import annotations

import re
from typing import Iterator, Sequence

from ascend_envcheck.findings import Finding, Report, Severity
from ascend_envcheck.messages import ENGLISH, Message, say, told
from ascend_envcheck.render.text import printable
from ascend_envcheck.snapshot import Snapshot

_HEADER = say("| | rule | what was found | what to run |", "| | 规则 | 发现 | 执行命令 |")
_SHORT_HEADER = say("| | rule | what was found |", "| | 规则 | 发现 |")
_IN_ORDER = Message("{count} more: in order, or not to be judged here", "其余 {count} 项：正常，或此处无法判断")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def render(report: Report, snapshot: Snapshot, language: str = ENGLISH) -> str:
    """The verdicts, a table of FAIL and WARN with commands, and the rest folded away."""
    python = snapshot.python
    where = f"ascend-envcheck {snapshot.tool_version}, Python {python.version}, {python.system} {python.machine}"
    bad = [finding for finding in report.findings if finding.severity in (Severity.FAIL, Severity.WARN)]
    rest = [finding for finding in report.findings if finding not in bad]
    lines = [f"**{plain(where)}**", "", *(f"* {plain(verdict.sentence(language))}" for verdict in report.verdicts)]
    lines += _table(bad, told(_HEADER, language), language, commands=True)
    if rest:
        folded = told(say(_IN_ORDER, _IN_ORDER.in_chinese, count=len(rest)), language)
        lines += ["", f"<details><summary>{folded}</summary>"]
        lines += [*_table(rest, told(_SHORT_HEADER, language), language, commands=False), "", "</details>"]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """The text in one line, with nothing in it that Markdown or HTML would read as markup."""
    return _MARKS.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """The text as a code span inside a table: longer fence than any run of backticks, pipes escaped."""
    line = printable(text).replace("|", r"\|")
    fence = "`" * (1 + max([0, *(len(run) for run in re.findall("`+", line))]))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _table(findings: Sequence[Finding], header: str, language: str, *, commands: bool) -> Iterator[str]:
    if not findings:
        return
    yield from ("", header, "|---" * (header.count("|") - 1) + "|")
    for finding in findings:
        row = f"| {finding.severity.value} | {plain(finding.id)} | {plain(told(finding.cause, language))} |"
        yield f"{row} {code(finding.command) if finding.command else ''} |" if commands else row
