"""One report in each of its forms; what is expected comes from their standards, and from what a reader needs."""

from __future__ import annotations

import json
import re
from typing import Any
from unicodedata import east_asian_width
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_envcheck import RULES, Finding, Report, Rule, Severity, Snapshot, Verdict, check, say
from ascend_envcheck.findings import NPU
from ascend_envcheck.render import rendered
from ascend_envcheck.render.markdown import code, plain
from ascend_envcheck.render.sarif import document
from ascend_envcheck.render.text import padded

LINK = "https://example.org/why"
REPORT = Report(
    (
        Finding("F-ONE", Severity.FAIL, say("driver too old", "驱动过旧"), "install it", LINK, blocks=(NPU,)),
        Finding("F-ONE", Severity.FAIL, say("firmware too old", "固件过旧"), "install that", "release notes"),
        Finding("W-ONE", Severity.WARN, say("slow disk", "磁盘较慢"), "mount | grep x", "measured"),
        Finding("I-ONE", Severity.INFO, say("all fine", "一切正常")),
        Finding("I-TWO", Severity.INFO, say("fine too", "也正常")),
        Finding("S-ONE", Severity.SKIP, say("no NPU", "没有 NPU")),
        Finding("S-TWO", Severity.SKIP, say("no NPU", "没有 NPU"), doubts=(NPU,)),
        Finding("S-TWO", Severity.SKIP, say("no CANN", "没有 CANN")),
    ),
    (Verdict("train", "npu", "no", (say("driver too old", "驱动过旧"),)), Verdict("infer", "cpu", "yes")),
)
GROUP_OF = {"F-ONE": "driver", "W-ONE": "host", "I-ONE": "python", "I-TWO": "host", "S-ONE": "cann", "S-TWO": "cann"}
SOME_RULES = tuple(
    Rule(id_, say(f"{id_} is well", f"{id_} 正常"), lambda s: [], group) for id_, group in GROUP_OF.items()
)
HOSTILE = "\x1b[2J\nFAIL  \u202eX | `a` </td><script> \ud800 ]]> & \x00"


def text(language: str = "en", *, colours: bool = False) -> list[str]:
    return rendered(REPORT, Snapshot(), SOME_RULES, kind="text", language=language, colours=colours).splitlines()


def test_the_faults_stand_right_above_the_verdicts() -> None:
    """A terminal shows the last lines; they are what the reader came for."""
    kinds = [line.split()[0] for line in text() if re.match(r"\s*(FAIL|WARN|INFO|SKIP)  ", line)]
    assert kinds == ["INFO", "INFO", "SKIP", "SKIP", "WARN", "FAIL", "FAIL"]
    assert text()[-2:] == [str(verdict) for verdict in REPORT.verdicts]
    assert text()[-3] == "2 FAIL, 1 WARN, 2 INFO, 3 SKIP"


def test_a_verdict_of_many_reasons_is_one_line() -> None:
    many = Verdict("train", "npu", "no", tuple(say(f"reason {n}", f"原因 {n}") for n in range(7)))
    for language, more in (
        ("en", "reason 0; reason 1; and 5 more"),
        ("zh", "原因 0；原因 1；另有 5 项"),
    ):
        out = rendered(Report((), (many,)), Snapshot(), (), kind="text", language=language)
        assert out.splitlines()[-1].endswith(more)
    assert "reason 6" in rendered(Report((), (many,)), Snapshot(), (), kind="markdown")


def test_info_is_a_line_under_its_group_and_groups_keep_their_order() -> None:
    lines = text()
    assert lines.index("host") < lines.index("Python and its packages")
    assert lines[lines.index("host") + 1].split() == ["INFO", "I-TWO", "fine", "too"]


def test_skips_of_one_reason_share_a_line() -> None:
    assert [line for line in text() if line.startswith("SKIP")] == [
        "SKIP  no NPU: S-ONE, S-TWO",
        "SKIP  no CANN: S-TWO",
    ]


def test_a_fault_says_what_to_run_and_why() -> None:
    lines = text()
    place = next(number for number, line in enumerate(lines) if line.startswith("FAIL  F-ONE"))
    assert lines[place].endswith("driver too old")
    assert [line.split(None, 1) for line in lines[place + 1 : place + 3]] == [["run:", "install it"], ["source:", LINK]]
    columns = {line.index(value) for line, value in zip(lines[place + 1 :], ("install it", LINK))}
    assert len(columns) == 1


def test_chinese_lines_up_by_columns_of_the_terminal() -> None:
    lines = text("zh")
    assert any("驱动过旧" in line for line in lines)
    labels = [found[0] for found in (re.match(r"\s+(执行|来源)：\s*", line) for line in lines) if found]
    starts = {len(label) + sum(east_asian_width(character) in "WF" for character in label) for label in labels}
    assert len(starts) == 1
    assert padded("来源：", 8) == "来源：  "


def test_colours_only_where_they_are_wanted() -> None:
    assert not any("\x1b" in line for line in text())
    coloured = text(colours=True)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in coloured] == text()
    assert [line for line in coloured if "driver too old" in line and line.startswith("\x1b[31m")]


@pytest.mark.parametrize("kind", ["text", "markdown", "junit"])
def test_a_snapshot_steers_no_terminal(kind: str) -> None:
    report = Report(
        (Finding("A", Severity.FAIL, HOSTILE, HOSTILE, HOSTILE),), (Verdict("train", "npu", "no", (HOSTILE,)),)
    )
    out = rendered(report, Snapshot(tool_version=HOSTILE), (), kind=kind)
    assert all(character.isprintable() or character == "\n" for character in out)
    assert not re.search(r"^FAIL  \?X", out, re.MULTILINE)


def check_sarif(log: dict[str, Any]) -> None:
    """What SARIF 2.1.0 demands of the properties that are used (§3.13, 3.14, 3.18, 3.19, 3.27, 3.49)."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].startswith("https://")
    for run in log["runs"]:
        driver = run["tool"]["driver"]
        assert driver["name"]
        ids = [rule["id"] for rule in driver["rules"]]
        assert len(ids) == len(set(ids))  # §3.19.23: unique
        for rule in driver["rules"]:
            assert isinstance(rule["shortDescription"]["text"], str)
            assert re.match(r"https?://\S+\Z", rule.get("helpUri", LINK))
        assert all(isinstance(each["executionSuccessful"], bool) for each in run["invocations"])  # §3.20.14: required
        for result in run["results"]:
            assert isinstance(result["message"]["text"], str)
            assert result["message"]["text"]
            assert ids[result["ruleIndex"]] == result["ruleId"]
            assert result["kind"] in ("pass", "open", "informational", "notApplicable", "review", "fail")
            assert result["level"] in ("none", "note", "warning", "error")
            # §3.27.10: a level other than none is for kind "fail" only.
            assert (result["kind"] == "fail") == (result["level"] != "none")


def test_sarif() -> None:
    log = json.loads(rendered(REPORT, Snapshot(), SOME_RULES, kind="sarif"))
    check_sarif(log)
    results = log["runs"][0]["results"]
    assert [(each["ruleId"], each["kind"], each["level"]) for each in results] == [
        ("F-ONE", "fail", "error"),
        ("F-ONE", "fail", "error"),
        ("W-ONE", "fail", "warning"),
        ("I-ONE", "informational", "none"),
        ("I-TWO", "informational", "none"),
        ("S-ONE", "notApplicable", "none"),
        ("S-TWO", "open", "none"),
        ("S-TWO", "notApplicable", "none"),
    ]
    links = {rule["id"]: rule.get("helpUri") for rule in log["runs"][0]["tool"]["driver"]["rules"]}
    assert links["F-ONE"] == LINK
    assert links["W-ONE"] is None


def test_sarif_of_every_rule_and_of_a_rule_that_speaks_under_another_id() -> None:
    check_sarif(document(check(Snapshot()), Snapshot(), RULES))
    stranger = Report((Finding("OF-NOBODY", Severity.WARN, "odd"),), ())
    check_sarif(document(stranger, Snapshot(), RULES))


def check_junit(xml: str) -> ElementTree.Element:
    root = ElementTree.fromstring(xml)
    for element in [root, *root.iter("testsuite")]:
        for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            assert int(element.attrib[name]) == len(list(element.iter(tag)))
        assert element.attrib["errors"] == "0"
    return root


def test_junit() -> None:
    root = check_junit(rendered(REPORT, Snapshot(), SOME_RULES, kind="junit"))
    cases = {case.attrib["name"]: case for case in root.iter("testcase")}
    assert set(cases) == set(GROUP_OF)
    assert [element.tag for element in cases["F-ONE"]] == ["failure"]
    assert "firmware too old" in str(cases["F-ONE"][0].text)
    assert "run: install it" in str(cases["F-ONE"][0].text)
    assert [element.tag for element in cases["W-ONE"]] == ["system-out"]
    assert [element.tag for element in cases["I-ONE"]] == []
    assert [element.tag for element in cases["S-TWO"]] == ["skipped"]
    assert "no NPU; no CANN" in cases["S-TWO"][0].attrib["message"]
    assert [each.attrib["value"] for each in root.iter("property")] == [str(verdict) for verdict in REPORT.verdicts]


@given(st.text(), st.text())
def test_whatever_a_snapshot_says_junit_is_xml_and_sarif_is_json(cause: str, command: str) -> None:
    report = Report((Finding(cause, Severity.FAIL, cause, command, command), Finding("W", Severity.WARN, cause)), ())
    check_junit(rendered(report, Snapshot(), RULES, kind="junit"))
    json.loads(rendered(report, Snapshot(), RULES, kind="sarif"))


def test_markdown_rows_have_as_many_cells_as_the_header() -> None:
    report = Report((Finding("A|B", Severity.FAIL, HOSTILE, "a | b || `c`", LINK), *REPORT.findings), REPORT.verdicts)
    for language in ("en", "zh"):
        table: list[str] = []
        for line in [*rendered(report, Snapshot(), SOME_RULES, kind="markdown", language=language).splitlines(), ""]:
            if line.startswith("|"):
                table.append(line)
            elif table:
                assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
                assert re.match(r"(\|---)+\|\Z", table[1])
                table = []


def test_markdown_has_verdicts_first_and_commands_to_copy() -> None:
    out = rendered(REPORT, Snapshot(), SOME_RULES, kind="markdown")
    assert out.index("* this machine can fine-tune") < out.index("| FAIL |") < out.index("<details>")
    assert "`install it`" in out
    assert "`mount \\| grep x`" in out
    assert out.count("| INFO |") == 2


def test_markdown_has_no_markup_of_a_snapshot() -> None:
    assert plain("<img src=x> [a](javascript:b) *c* #1") == r"\<img src=x\> \[a\](javascript:b) \*c\* \#1"
    assert code("a ` b `` c") == "``` a ` b `` c ```"  # CommonMark: a fence longer than any run inside
    assert code("plain") == "`plain`"


def test_json_is_the_same_in_every_language() -> None:
    forms = [rendered(REPORT, Snapshot(), SOME_RULES, kind="json", language=language) for language in ("en", "zh")]
    assert forms[0] == forms[1] == REPORT.to_json()
