"""Rules of others: from installed packages (entry points of the group ``ascend_envcheck.rules``) and from JSON packs.

An entry point names a `Rule`, several of them, or a function that takes a `Snapshot` and gives `Finding`s. A pack is a
file, whose conditions are those of `ascend_envcheck.rules.conditions`::

    {"schema_version": 1, "rules": [{
      "id": "OUR-DIFFUSERS", "title": "diffusers is one that our pipeline runs with", "severity": "FAIL",
      "when": {"distribution": "diffusers", "version": "==0.29.0"},
      "cause": "diffusers 0.29.0 breaks our pipeline", "command": "pip install 'diffusers>=0.31'",
      "source": "https://example.org/notes", "tasks": ["infer"], "blocks": ["npu"]}]}
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from ascend_envcheck.errors import PackError
from ascend_envcheck.findings import EVERY_DEVICE, TASKS, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.rules import RULES
from ascend_envcheck.rules.conditions import Condition, ConditionError, condition
from ascend_envcheck.rules.rule import Rule
from ascend_envcheck.snapshot import Snapshot

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "ascend_envcheck.rules"
PACK_VERSION = 1
BROKEN = "ENTRY-POINTS"
"""The id of the rule that tells of entry points that give no rules; it is there only with such."""

ID_PATTERN = r"[A-Z][A-Z0-9_.-]{0,63}"


class Field(NamedTuple):
    """A key of a rule in a pack."""

    kind: str  # text, id, choice, choices, condition
    required: bool = False
    legal: Sequence[str] = ()


FIELDS: Mapping[str, Field] = {
    "id": Field("id", True),
    "title": Field("text", True),
    "title_zh": Field("text"),
    "severity": Field("choice", True, ("FAIL", "WARN", "INFO")),
    "when": Field("condition", True),
    "cause": Field("text", True),
    "cause_zh": Field("text"),
    "command": Field("text"),
    "source": Field("text"),
    "tasks": Field("choices", legal=TASKS),
    "blocks": Field("choices", legal=EVERY_DEVICE),
}
"""Every key of a rule in a pack; a FAIL must have ``command`` and ``source`` too."""


def all_rules(packs: Sequence[Path] = ()) -> tuple[Rule, ...]:
    """`RULES`, then those of entry points, then those of packs.

    Raises:
        PackError: a file is no pack, or has an id that is taken.
        OSError: it can't be read.
    """
    rules = [*RULES, *_of_entry_points()]
    for path in packs:
        taken = {rule.id for rule in rules}
        own = read_pack(path)
        for rule in own:
            if rule.id in taken:
                raise PackError(f"{path}: the id {rule.id!r} is taken by another rule; choose one of your own")
        rules += own
    return tuple(rules)


def read_pack(path: Path) -> list[Rule]:
    """The rules of a file.

    Raises:
        PackError: with all that is wrong in it, a line each.
        OSError: it can't be read.
    """
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path}: not JSON: {error}") from error
    if (
        not isinstance(data, dict)
        or json.dumps(data.get("schema_version")) != str(PACK_VERSION)  # true equals 1 to Python
        or not isinstance(data.get("rules"), list)
    ):
        raise PackError(f'{path}: must be an object {{"schema_version": {PACK_VERSION}, "rules": [...]}}')
    unknown = sorted(set(data) - {"schema_version", "rules"})
    faults = [f"{name}: no such key; there are schema_version, rules" for name in unknown]
    rules: dict[str, Rule] = {}
    for number, item in enumerate(data["rules"]):
        rule, wrong = _rule(item, f"rules[{number}]")
        if rule is not None and rule.id in rules:
            wrong = [f"rules[{number}].id: {rule.id!r} is the id of another rule of this file"]
        elif rule is not None:
            rules[rule.id] = rule
        faults += wrong
    if faults:
        raise PackError("\n  ".join([f"{path}: {len(faults)} faults" if len(faults) > 1 else f"{path}:", *faults]))
    return list(rules.values())


def _rule(item: Any, where: str) -> tuple[Rule | None, list[str]]:
    """A rule, or what is wrong with it."""
    if not isinstance(item, dict):
        return None, [f"{where}: must be an object with {', '.join(_required())}"]
    faults = [f"{where}.{name}: is missing" for name in _required() if name not in item]
    values: dict[str, Any] = {}
    for name, value in item.items():
        try:
            values[name] = _value(name, value, f"{where}.{name}")
        except ConditionError as error:
            faults.append(str(error))
    if item.get("severity") == "FAIL":
        needed = [name for name in ("command", "source") if name not in item]
        faults += [
            f"{where}.{name}: is missing; every FAIL says what to run, and where that is known from" for name in needed
        ]
    return (None, faults) if faults else (_made(values), [])


def _required() -> list[str]:
    return [name for name, field in FIELDS.items() if field.required]


def _value(name: str, value: Any, where: str) -> Any:
    if name not in FIELDS:
        raise ConditionError(f"{where}: no such key; there are {', '.join(FIELDS)}")
    field = FIELDS[name]
    if field.kind == "condition":
        return condition(value, where)
    if field.kind == "choices":
        if not isinstance(value, list) or not value or any(each not in field.legal for each in value):
            raise ConditionError(f"{where}: must be a list of some of {', '.join(field.legal)}")
        return tuple(value)
    if field.kind == "choice" and value not in field.legal:
        raise ConditionError(f"{where}: must be one of {', '.join(field.legal)}")
    if not isinstance(value, str) or not value.strip() or len(value.splitlines()) > 1:
        raise ConditionError(f"{where}: must be a line of text")
    if field.kind == "id" and not re.match(ID_PATTERN + r"\Z", value):
        raise ConditionError(f"{where}: {value!r} must be upper case, as in OUR-DIFFUSERS")
    return value


def _made(values: Mapping[str, Any]) -> Rule:
    title = Message(values["title"], values.get("title_zh", ""))
    tasks = values.get("tasks", TASKS)
    finding = Finding(
        values["id"],
        Severity(values["severity"]),
        Message(values["cause"], values.get("cause_zh", "")),
        values.get("command", ""),
        values.get("source", ""),
        blocks=values.get("blocks", ()),
        tasks=tasks,
    )
    when: Condition = values["when"]

    def judge(snapshot: Snapshot) -> Iterable[Finding]:
        holds = when(snapshot)
        if holds:
            yield finding
        elif holds is None:
            yield Finding(finding.id, Severity.SKIP, _UNKNOWN, doubts=finding.blocks, tasks=tasks)
        else:
            yield Finding(finding.id, Severity.INFO, title, tasks=tasks)

    return Rule(finding.id, title, judge, devices=finding.blocks, tasks=tasks)


_UNKNOWN = say("the snapshot does not tell what this rule asks", "快照中没有该规则所需的信息")


def _of_entry_points() -> list[Rule]:
    rules: list[Rule] = []
    broken: dict[str, str] = {}
    for point in _entry_points():
        try:
            given = point.load()
            found = _rules_in(given, point.name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken plug-in is a finding, the other rules go on
            broken[point.name] = repr(error)
            continue
        taken = {rule.id for rule in (*RULES, *rules)} | {BROKEN}
        clashing = [rule.id for rule in found if rule.id in taken]
        if clashing or len({rule.id for rule in found}) < len(found):
            broken[point.name] = f"an id is taken by another rule: {', '.join(clashing or [rule.id for rule in found])}"
        else:
            rules += [replace(rule, judge=_checked(rule.judge)) for rule in found]
    return [*rules, _broken(broken)] if broken else rules


def _entry_points() -> Sequence[EntryPoint]:
    from importlib.metadata import entry_points

    found: Any = entry_points()
    # Up to Python 3.9 a dict of lists, which may name one twice.
    chosen = found.select(group=GROUP) if hasattr(found, "select") else found.get(GROUP, ())
    return list({point.name: point for point in chosen}.values())


def _rules_in(given: Any, name: str) -> list[Rule]:
    if isinstance(given, Rule):
        return _rules_in([given], name)
    if callable(given):
        lines = (getattr(given, "__doc__", None) or "").strip().splitlines()
        return [Rule(name, lines[0] if lines else name, given)]
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        rules = list(given)
        if all(isinstance(rule, Rule) and isinstance(rule.id, str) for rule in rules):
            return rules
    raise TypeError(f"it is {type(given).__name__}, must be a Rule, several of them, or a function of a Snapshot")


def _checked(judge: Callable[[Snapshot], Iterable[Finding]]) -> Callable[[Snapshot], Iterable[Finding]]:
    def checked(snapshot: Snapshot) -> Iterable[Finding]:
        for finding in judge(snapshot):
            if not isinstance(finding, Finding):
                raise TypeError(f"it gave {type(finding).__name__}, must give Findings")
            yield finding

    return checked


def _broken(points: Mapping[str, str]) -> Rule:
    def judge(snapshot: Snapshot) -> Iterable[Finding]:
        for name, error in points.items():
            cause = say(
                "the entry point {name} gives no rules: {error}",
                "入口点 {name} 未能提供规则：{error}",
                name=name,
                error=error,
            )
            yield Finding(BROKEN, Severity.WARN, cause)

    return Rule(BROKEN, say("the rules of other packages load", "其他软件包的规则可以加载"), judge)
