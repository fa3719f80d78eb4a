"""What the probes could not see."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, Finding, Severity
from ascend_envcheck.messages import say
from ascend_envcheck.rules.rule import Rule
from ascend_envcheck.snapshot import Snapshot


def probes(snapshot: Snapshot) -> Iterable[Finding]:
    """PROBES: every probe came to its end."""
    for name, trouble in sorted(snapshot.probes.items()):
        cause = say(
            "the probe {name} did not come to its end ({outcome}): {detail}",
            "探测 {name} 未能完成（{outcome}）：{detail}",
            name=name,
            outcome=trouble.outcome,
            detail=trouble.detail,
        )
        yield Finding("PROBES", Severity.WARN, cause, doubts=EVERY_DEVICE)
    if not snapshot.probes:
        yield Finding("PROBES", Severity.INFO, say("every probe came to its end", "所有探测均已完成"))


RULES = (Rule("PROBES", say("every probe came to its end", "所有探测均已完成"), probes, "tool"),)
