"""From a snapshot to a report: pure, the same anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Collection, Iterable, Sequence

from ascend_envcheck.errors import UnknownRuleError
from ascend_envcheck.findings import (
    CPU,
    CUDA,
    NO,
    NOT_KNOWN,
    NPU,
    PROFILES,
    TASKS,
    YES,
    Finding,
    Report,
    Severity,
    Verdict,
)
from ascend_envcheck.messages import say
from ascend_envcheck.rules import RULES
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import Snapshot

_YES = {
    CPU: (say("tiny models", "小模型"),),
    CUDA: (),
    NPU: (say("by its versions and files; nothing was run on the NPU", "依据版本与文件判断，未在 NPU 上运行"),),
}
_SEVERITIES = list(Severity)


def check(
    snapshot: Snapshot,
    *,
    profile: str = "all",
    only: Collection[str] = (),
    skip: Collection[str] = (),
    rules: Sequence[Rule] = RULES,
) -> Report:
    """Judges a snapshot.

    Args:
        snapshot: what `collect` saw, here or elsewhere.
        profile: what the machine is wanted for: train, infer or all.
        only: ids of the rules to run; all of them when empty.
        skip: ids of the rules not to run.
        rules: what to judge by; `RULES`, and others after them.

    Raises:
        UnknownRuleError: an id that no rule has, or no rule left.
        ValueError: a profile that does not exist.
    """
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    tasks = TASKS if profile == "all" else (profile,)
    chosen = choose(only, skip, rules)
    findings = [finding for rule in chosen for finding in _findings(rule, snapshot, tasks)]
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))  # stable: the table's order within
    devices = [CPU, NPU] if snapshot.imports.device != CUDA else [CPU, CUDA, NPU]
    left_out = [rule for rule in rules if rule not in chosen]
    verdicts = (_verdict(task, device, findings, left_out, snapshot) for task in tasks for device in devices)
    return Report(tuple(findings), tuple(verdicts))


def choose(only: Collection[str], skip: Collection[str], rules: Sequence[Rule] = RULES) -> tuple[Rule, ...]:
    """The rules that a choice leaves, in the table's order.

    Raises:
        UnknownRuleError: an id that no rule has, or no rule left.
    """
    known = [rule.id for rule in rules]
    for given in [*only, *skip]:
        if given not in known:
            raise UnknownRuleError(f"no rule {given!r}{_hint(given, known)}; `ascend-envcheck list` prints all ids")
    chosen = tuple(rule for rule in rules if (not only or rule.id in only) and rule.id not in skip)
    if not chosen:
        raise UnknownRuleError("--only and --skip together leave no rule; drop one of them")
    return chosen


def _findings(rule: Rule, snapshot: Snapshot, tasks: Collection[str]) -> Iterable[Finding]:
    if not set(tasks) & set(rule.tasks):
        return []
    try:
        found = [replace(each) for each in rule.judge(snapshot)]  # and fails here for what is no finding
    except Exception as error:  # noqa: BLE001 - one bad rule, most likely of a third party, must not hide all others
        cause = say(
            "the rule {id} itself failed: {error}", "规则 {id} 自身出错：{error}", id=rule.id, error=repr(error)
        )
        found = [Finding(rule.id, Severity.WARN, cause, doubts=rule.devices)]
    narrowed = (replace(each, tasks=tuple(task for task in each.tasks if task in rule.tasks)) for each in found)
    return [each for each in narrowed if set(each.tasks) & set(tasks)]


def _hint(given: str, known: Sequence[str]) -> str:
    import difflib  # only a typo needs it

    close = difflib.get_close_matches(given.upper(), known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _verdict(
    task: str, device: str, findings: Sequence[Finding], left_out: Sequence[Rule], snapshot: Snapshot
) -> Verdict:
    mine = [finding for finding in findings if task in finding.tasks]
    blocking = [finding.cause for finding in mine if device in finding.blocks]
    if device == NPU and npu_count(snapshot) == 0 and blocking:
        return Verdict(task, device, NO, (NO_NPU,))
    if blocking:
        return Verdict(task, device, NO, _unique(blocking))
    open_points = [f.cause for f in mine if device in f.doubts and f.severity is Severity.SKIP]
    open_points += [
        say("{id} was left out", "未检查 {id}", id=rule.id)
        for rule in left_out
        if device in rule.devices and task in rule.tasks
    ]
    if open_points:
        return Verdict(task, device, NOT_KNOWN, _unique(open_points))
    reservations = [f.cause for f in mine if device in f.doubts and f.severity is Severity.WARN]
    if reservations:
        first, *rest = _unique(reservations)
        return Verdict(task, device, YES, (say("but {why}", "但是 {why}", why=first), *rest))
    return Verdict(task, device, YES, _YES[device])


def _unique(causes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(causes))
