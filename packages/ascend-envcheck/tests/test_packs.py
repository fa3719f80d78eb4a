"""Rules of others: what a pack may say, what is refused, and plug-ins that work, clash and break."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ascend_envcheck import RULES, Severity, Snapshot, check, cli
from ascend_envcheck.errors import PackError
from ascend_envcheck.rules import version_spec
from ascend_envcheck.rules.conditions import ConditionError, condition
from ascend_envcheck.rules.packs import BROKEN, all_rules, read_pack
from ascend_envcheck.snapshot import CommandFacts, Distribution

RULE: dict[str, Any] = {
    "id": "OUR-DIFFUSERS",
    "title": "diffusers runs our pipeline",
    "title_zh": "diffusers 可运行我们的流水线",
    "severity": "FAIL",
    "when": {"distribution": "diffusers", "version": "==0.29.0"},
    "cause": "diffusers 0.29.0 breaks it",
    "cause_zh": "diffusers 0.29.0 会出错",
    "command": "pip install 'diffusers>=0.31'",
    "source": "https://example.org",
    "tasks": ["infer"],
    "blocks": ["npu"],
}
SEEN = Snapshot(
    distributions={"diffusers": Distribution("0.29.0"), "torch_npu": Distribution("2.7.1.post2+git")},
    variables={"LD_LIBRARY_PATH": "/usr/local/Ascend/lib", "HF_TOKEN": "***"},
    paths={"/usr/local/Ascend/nnal": "/usr/local/Ascend/nnal"},
    folders={"/opp": ("ascend910b",)},
    commands={"npu-smi info": CommandFacts("ok", "", "| 0 910B2 | Alarm |"), "hccn_tool": CommandFacts("missing")},
)


def write(folder: Path, *rules: object, name: str = "pack.json", **more: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"schema_version": 1, "rules": rules, **more}))
    return path


def judged(path: Path, snapshot: Snapshot) -> list[tuple[str, str]]:
    (rule,) = read_pack(path)
    return [(finding.severity.value, finding.cause) for finding in rule.judge(snapshot)]


def test_a_pack_judges(tmp_path: Path) -> None:
    path = write(tmp_path, RULE)
    assert judged(path, SEEN) == [("FAIL", RULE["cause"])]
    assert judged(path, replace(SEEN, distributions={"diffusers": Distribution("0.31.0")})) == [("INFO", RULE["title"])]
    assert judged(path, replace(SEEN, distributions={"diffusers": Distribution("unreadable")}))[0][0] == "SKIP"
    rules = all_rules([path])
    assert rules[: len(RULES)] == RULES
    report = check(SEEN, rules=rules)
    (finding,) = (finding for finding in report.findings if finding.id == "OUR-DIFFUSERS")
    assert (finding.severity, finding.command, finding.source) == (Severity.FAIL, RULE["command"], RULE["source"])
    blocked = {verdict.task for verdict in report.verdicts if RULE["cause"] in " ".join(verdict.reasons)}
    assert blocked <= {"infer"}
    assert rules[-1].title.in_chinese == RULE["title_zh"]  # type: ignore[attr-defined]


def test_what_blocks_leaves_the_verdict_open_when_it_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path, {**RULE, "when": {"path": "/nowhere", "exists": False}})
    (rule,) = read_pack(path)
    (finding,) = rule.judge(SEEN)
    assert (finding.severity, finding.doubts, finding.blocks) == (Severity.SKIP, ("npu",), ())


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"distribution": "diffusers", "version": "!=0.29.0"}, False),
        ({"distribution": "Diffusers", "version": ">=0.28,<0.30"}, True),
        ({"distribution": "torch-npu", "version": "==2.7.*"}, True),
        ({"distribution": "torch", "version": ">=2.0"}, False),  # looked for, not installed
        ({"distribution": "torch", "installed": False}, True),
        ({"distribution": "of-which-nobody-wrote-down", "installed": False}, None),
        ({"variable": "LD_LIBRARY_PATH", "matches": "^/usr/local/Ascend"}, True),
        ({"variable": "LD_LIBRARY_PATH", "matches": "cann"}, False),
        ({"variable": "LD_LIBRARY_PATH", "is_set": True}, True),
        ({"variable": "ASCEND_HOME_PATH", "is_set": False}, True),
        ({"variable": "ASCEND_HOME_PATH", "matches": "."}, False),
        ({"variable": "OF_WHICH_NOBODY_WROTE_DOWN", "is_set": False}, None),
        ({"variable": "HF_TOKEN", "matches": "hf_"}, None),  # masked
        ({"path": "/usr/local/Ascend/nnal", "exists": True}, True),
        ({"path": "/opp/ascend910b", "exists": True}, True),
        ({"path": "/opp/ascend310p", "exists": False}, True),
        ({"path": "/of/which/nobody/wrote", "exists": False}, None),
        ({"command": "npu-smi info", "matches": "Alarm|Critical"}, True),
        ({"command": "npu-smi info", "matches": "^$"}, False),
        ({"command": "hccn_tool", "matches": "up"}, False),
        ({"command": "never asked", "matches": "."}, None),
    ],
)
def test_conditions(when: dict[str, Any], expected: bool | None) -> None:
    assert condition(when, "when")(SEEN) is expected
    negated = None if expected is None else not expected
    assert condition({"not": when}, "when")(SEEN) is negated


TRUE, FALSE = {"variable": "LD_LIBRARY_PATH", "is_set": True}, {"variable": "LD_LIBRARY_PATH", "is_set": False}
UNKNOWN = {"command": "never asked", "matches": "."}


@pytest.mark.parametrize(
    ("parts", "every", "some"),
    [
        ([TRUE, TRUE], True, True),
        ([TRUE, FALSE], False, True),
        ([FALSE, FALSE], False, False),
        ([TRUE, UNKNOWN], None, True),
        ([FALSE, UNKNOWN], False, None),
        ([UNKNOWN], None, None),
    ],
)
def test_unknown_goes_through_all_and_any_as_in_sql(
    parts: list[dict[str, Any]], every: bool | None, some: bool | None
) -> None:
    assert condition({"all": parts}, "when")(SEEN) is every
    assert condition({"any": parts}, "when")(SEEN) is some
    assert condition({"all": [{"any": parts}]}, "when")(SEEN) is some


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ([], r"when: must be an object"),
        ({}, r'when: .*"distribution": …, "version\|installed"'),
        ({"distribution": "a"}, "must be an object with a test"),
        ({"distribution": "a", "version": "1", "installed": True}, "must be an object with a test"),
        ({"distribution": "a", "exists": True}, "when.exists: distribution is tested by version or installed"),
        ({"distribution": "a", "version": "1.0"}, r"when.version: '1.0' is none of ==V"),
        ({"distribution": "a", "version": ">=soon"}, "when.version: 'soon' is no version"),
        ({"distribution": "a", "version": "~=1"}, "when.version: ~= needs two numbers"),
        ({"distribution": "a", "version": ">1.*"}, "is no version that > compares with"),
        ({"distribution": "a", "version": 1}, "when.version: must be text"),
        ({"distribution": "", "installed": True}, "when.distribution: must be a name"),
        ({"variable": "A", "matches": "("}, "when.matches: must be a regular expression"),
        ({"variable": "A", "matches": None}, "when.matches: must be a regular expression"),
        ({"variable": "A", "is_set": 1}, "when.is_set: must be true or false"),
        ({"all": []}, "when.all: must be a list of conditions, one or more"),
        ({"all": [TRUE], "any": [TRUE]}, "must be an object with a test"),
        ({"any": [TRUE, {"not": {"path": "/x", "exists": "yes"}}]}, r"when.any\[1\].not.exists: must be true or false"),
    ],
)
def test_wrong_conditions_name_the_place(when: Any, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        condition(when, "when")


def test_conditions_too_deep() -> None:
    when: dict[str, Any] = TRUE
    for _ in range(200):
        when = {"not": when}
    with pytest.raises(ConditionError, match="more than 32"):
        condition(when, "when")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id": "our"}, r"rules\[0\].id: 'our' must be upper case"),
        ({"id": None}, r"rules\[0\].id: must be a line of text"),
        ({"severity": "FATAL"}, r"rules\[0\].severity: must be one of FAIL, WARN, INFO"),
        ({"severity": []}, r"rules\[0\].severity: must be one of"),
        ({"tasks": ["eval"]}, r"rules\[0\].tasks: must be a list of some of train, infer"),
        ({"blocks": "npu"}, r"rules\[0\].blocks: must be a list of some of cpu, cuda, npu"),
        ({"cause": "two\nlines"}, r"rules\[0\].cause: must be a line of text"),
        ({"title": " "}, r"rules\[0\].title: must be a line of text"),
        ({"titel": "x"}, r"rules\[0\].titel: no such key; there are id, title"),
        ({"when": {}}, r"rules\[0\].when: must be an object with a test"),
    ],
)
def test_wrong_rules_name_the_file_and_the_place(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {**RULE, **changed})
    with pytest.raises(PackError, match=message) as caught:
        read_pack(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["id", "title", "severity", "when", "cause", "command", "source"])
def test_what_a_fail_must_have(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, {key: value for key, value in RULE.items() if key != name})
    with pytest.raises(PackError, match=rf"rules\[0\].{name}: is missing"):
        read_pack(path)


def test_a_warn_needs_neither_command_nor_source(tmp_path: Path) -> None:
    short = {key: RULE[key] for key in ("id", "title", "when", "cause")}
    (rule,) = read_pack(write(tmp_path, {**short, "severity": "WARN"}))
    (finding,) = rule.judge(SEEN)
    assert (finding.severity, finding.tasks, finding.blocks) == (Severity.WARN, ("train", "infer"), ())


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {**RULE, "severity": "x", "tasks": 1}, [], {**RULE, "id": "B", "when": {"all": []}}, extra=1)
    with pytest.raises(PackError) as caught:
        read_pack(path)
    places = re.findall(r"(extra|rules\[\d\]\S*):", str(caught.value))
    assert places == ["extra", "rules[0].severity", "rules[0].tasks", "rules[1]", "rules[2].when.all"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"rules": []}', '{"schema_version": 2, "rules": []}', "\xff", "[" * 100_000]
)
def test_no_pack(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PackError, match=re.escape(str(path))):
        all_rules([path])


def test_ids_that_are_taken(tmp_path: Path) -> None:
    for rules in ([{**RULE, "id": RULES[0].id}], [RULE, RULE]):
        with pytest.raises(PackError, match=r"is taken|is the id of another"):
            all_rules([write(tmp_path, *rules)])
    first, second = write(tmp_path, RULE), write(tmp_path, RULE, name="again.json")
    with pytest.raises(PackError, match=r"again.json: the id 'OUR-DIFFUSERS' is taken"):
        all_rules([first, second])


def test_packs_at_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack, snapshot = write(tmp_path, RULE), tmp_path / "s.json"
    snapshot.write_text(SEEN.to_json())
    assert cli.main(["check", "--from", str(snapshot), "--rules", str(pack), "--only", "OUR-DIFFUSERS"]) == 1
    assert "FAIL  OUR-DIFFUSERS" in capsys.readouterr().out
    assert cli.main(["list", "--rules", str(pack), "--lang", "en"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-2] == "rules of others"
    assert out.splitlines()[-1].split() == ["OUR-DIFFUSERS", *RULE["title"].split(), "[infer]"]
    pack.write_text("{}")
    assert cli.main(["list", "--rules", str(pack)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {pack}: must be an object")


PLUGIN = '''
from ascend_envcheck import Finding, Rule, Severity

def ours(snapshot):
    """our own check of our own cluster"""
    yield Finding("ours", Severity.INFO, "seen")

def judge(snapshot):
    yield Finding("ONE", Severity.INFO, "one")

def junk(snapshot):
    return ["not a finding"]

def raises(snapshot):
    raise ZeroDivisionError("mine")

ONE = Rule("ONE", "one", judge)
SEVERAL = (Rule("TWO", "two", judge), Rule("THREE", "three", judge, group="of nobody"))
CLASH = Rule("PROBES", "clash", judge)
NUMBER = 7
'''


def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, *points: str) -> None:
    """An installed package with entry points."""
    (folder / "their_rules.py").write_text(PLUGIN)
    (folder / "their_exit.py").write_text("raise SystemExit(1)")
    info = folder / "their_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ascend_envcheck.rules]\n" + "".join(f"{point}\n" for point in points))
    monkeypatch.syspath_prepend(str(folder))


def ids_of_others() -> list[str]:
    return [rule.id for rule in all_rules()[len(RULES) :]]


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids_of_others() == []
    plugin(tmp_path, monkeypatch, "ours=their_rules:ours", "one=their_rules:ONE", "several=their_rules:SEVERAL")
    rules = all_rules()
    assert sorted(ids_of_others()) == ["ONE", "THREE", "TWO", "ours"]
    assert {rule.title for rule in rules} >= {"our own check of our own cluster"}
    found = {finding.id: finding.cause for finding in check(Snapshot(), rules=rules).findings}
    assert found["ours"] == "seen"
    assert cli.main(["list"]) == 0  # a group of nobody is that of others


@pytest.mark.parametrize(
    ("point", "why"),
    [
        ("bad=their_rules:nothing", "AttributeError"),
        ("bad=no_such_module:x", "ModuleNotFoundError"),
        ("bad=their_exit:x", "SystemExit"),
        ("bad=their_rules:NUMBER", "it is int, must be a Rule"),
        ("bad=their_rules:CLASH", "taken by another rule: PROBES"),
    ],
)
def test_a_broken_entry_point_is_a_warning(
    point: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path, monkeypatch, point, "one=their_rules:ONE")
    rules = all_rules()
    assert [rule.id for rule in rules[len(RULES) :]] == ["ONE", BROKEN]
    report = check(Snapshot(), rules=rules, only=[BROKEN, "ONE"])
    assert [(finding.id, finding.severity) for finding in report.findings] == [
        (BROKEN, Severity.WARN),
        ("ONE", Severity.INFO),
    ]
    assert "bad" in report.findings[0].cause
    assert why in report.findings[0].cause


@pytest.mark.parametrize("name", ["junk", "raises"])
def test_a_rule_that_fails_while_it_judges_is_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path, monkeypatch, f"{name}=their_rules:{name}")
    (finding,) = check(Snapshot(), rules=all_rules(), only=[name]).findings
    assert finding.severity is Severity.WARN


RELEASE = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
VERSION = st.builds(
    "{}{}{}{}".format,
    RELEASE,
    st.sampled_from(["", "", "", "rc1", "a2", "b3", ".rc2"]),
    st.sampled_from(["", "", ".post1", ".post11"]),
    st.sampled_from(["", "", ".dev3"]),
)


@given(VERSION, st.sampled_from(["", "+cpu", "+git1234"]), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), VERSION)
def test_versions_compare_as_packaging_says(version: str, local: str, operator: str, wanted: str) -> None:
    spec = operator + wanted
    assert version_spec.fault(spec) == ""
    # Releases of packaging differ in whether 2.dev3 is a pre-release of 2.post1, which < then leaves out, and in
    # whether 2.post1 is a post-release of 2.dev3, which > leaves out.
    assume(operator != "<" or ".post" not in wanted)
    assume(operator != ">" or not Version(wanted).is_prerelease)
    # A local label is of no account here; to packaging it is with ==V+label, which no condition of ours has.
    assert version_spec.meets(version + local, spec) is SpecifierSet(spec).contains(version, prereleases=True)


@given(VERSION, RELEASE, st.sampled_from(["==", "!="]))
def test_prefixes_compare_as_packaging_says(version: str, wanted: str, operator: str) -> None:
    spec = f"{operator}{wanted}.*"
    assert version_spec.meets(version, spec) is SpecifierSet(spec).contains(version, prereleases=True)


@given(VERSION, VERSION.filter(lambda text: "." in text and len(Version(text).release) > 1))
def test_compatible_releases_compare_as_packaging_says(version: str, wanted: str) -> None:
    spec = f"~={wanted}"
    assert version_spec.meets(version, spec) is SpecifierSet(spec).contains(version, prereleases=True)


@given(VERSION, VERSION)
def test_the_order_is_total_and_that_of_packaging(one: str, other: str) -> None:
    first, second = version_spec.key(one), version_spec.key(other)
    assert first is not None
    assert second is not None
    assert (first < second) is (Version(one) < Version(other))
    assert (first == second) is (Version(one) == Version(other))


@given(st.text(), st.text())
def test_no_text_is_too_odd(version: str, spec: str) -> None:
    if not version_spec.fault(spec):
        assert version_spec.meets(version, spec) in (True, False, None)
    assert version_spec.meets("no version", ">=1") is None
