"""From a snapshot to a report: pure, the same anywhere."""

from __future__ import annotations

from typing import Collection, Sequence

from ascend_envcheck.errors import UnknownRuleError
from ascend_envcheck.findings import CPU, CUDA, NPU, Finding, Report, Severity, Verdict
from ascend_envcheck.rules import RULES
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import Snapshot

TASK = "fine-tune Qwen2.5-VL"
_YES = {CPU: "tiny models", CUDA: "", NPU: "by its versions and files; nothing was run on the NPU"}
_SEVERITIES = list(Severity)


def check(snapshot: Snapshot, *, only: Collection[str] = (), skip: Collection[str] = ()) -> Report:
    """Judges a snapshot.

    Args:
        snapshot: what `collect` saw, here or elsewhere.
        only: ids of the rules to run; all of them when empty.
        skip: ids of the rules not to run.

    Raises:
        UnknownRuleError: an id that no rule has, or no rule left.
    """
    rules = choose(only, skip)
    findings = [finding for rule in rules for finding in rule.judge(snapshot)]
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))  # stable: the table's order within
    devices = [CPU, NPU] if snapshot.imports.device != CUDA else [CPU, CUDA, NPU]
    left_out = [rule for rule in RULES if rule not in rules]
    return Report(tuple(findings), tuple(_verdict(device, findings, left_out, snapshot) for device in devices))


def choose(only: Collection[str], skip: Collection[str]) -> tuple[Rule, ...]:
    """The rules that a choice leaves, in the table's order.

    Raises:
        UnknownRuleError: an id that no rule has, or no rule left.
    """
    known = [rule.id for rule in RULES]
    for given in [*only, *skip]:
        if given not in known:
            raise UnknownRuleError(f"no rule {given!r}{_hint(given, known)}; `ascend-envcheck list` prints all ids")
    chosen = tuple(rule for rule in RULES if (not only or rule.id in only) and rule.id not in skip)
    if not chosen:
        raise UnknownRuleError("--only and --skip together leave no rule; drop one of them")
    return chosen


def _hint(given: str, known: Sequence[str]) -> str:
    import difflib  # only a typo needs it

    close = difflib.get_close_matches(given.upper(), known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _verdict(device: str, findings: Sequence[Finding], left_out: Sequence[Rule], snapshot: Snapshot) -> Verdict:
    blocking = [finding.cause for finding in findings if device in finding.blocks]
    open_points = [f.cause for f in findings if device in f.doubts and f.severity is Severity.SKIP]
    open_points += [f"{rule.id} was left out" for rule in left_out if device in rule.devices]
    reservations = [f.cause for f in findings if device in f.doubts and f.severity is Severity.WARN]
    if device == NPU and npu_count(snapshot) == 0 and blocking:
        return Verdict(TASK, device, "no", NO_NPU)
    if blocking:
        return Verdict(TASK, device, "no", _joined(blocking))
    if open_points:
        return Verdict(TASK, device, "not known", _joined(open_points))
    if reservations:
        return Verdict(TASK, device, "yes", "but " + _joined(reservations))
    return Verdict(TASK, device, "yes", _YES[device])


def _joined(causes: Sequence[str]) -> str:
    return "; ".join(_unique(causes))


def _unique(causes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(causes))
