"""The published schemas accept what the tool writes and reads, and refuse what it refuses."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Iterator

import pytest
from fake_machine import FakeMachine, healthy
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ascend_envcheck import Finding, Report, Severity, Snapshot, SnapshotError, check, cli
from ascend_envcheck.commands.schema import KINDS as OFFERED
from ascend_envcheck.errors import PackError, SchemaError
from ascend_envcheck.explanation import explain
from ascend_envcheck.rules.packs import read_pack
from ascend_envcheck.schema import KINDS, schema
from ascend_envcheck.snapshot import CommandFacts, DiskFacts, Distribution, HostFacts


def valid(value: Any, kind: str) -> list[str]:
    """What JSON Schema 2020-12 says against a value."""
    return [error.message for error in Draft202012Validator(schema(kind)).iter_errors(value)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_schema_is_whole(kind: str) -> None:
    made = schema(kind)
    Draft202012Validator.check_schema(made)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    text = json.dumps(made)
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) == set(made.get("$defs", {}))


def test_an_empty_and_a_real_machine(machine: FakeMachine) -> None:
    healthy(machine)
    for snapshot in (Snapshot(), machine.snapshot()):
        assert valid(json.loads(snapshot.to_json()), "snapshot") == []
        assert valid(json.loads(check(snapshot).to_json()), "report") == []


def test_every_severity_and_answer_is_in_the_schema() -> None:
    report = Report(tuple(Finding("A", severity, "c") for severity in Severity), ())
    document = json.loads(report.to_json())
    assert valid(document, "report") == []
    document["findings"][0]["severity"] = "FATAL"
    assert len(valid(document, "report")) == 1


FULL = json.loads(
    Snapshot(
        host=HostFacts(
            root=True, limits={"nofile": 1}, disks={"tmp": DiskFacts(1, 1, None)}, listening=(22,), groups=("a",)
        ),
        distributions={"torch": Distribution("2.7.1", ("a==1",))},
        commands={"npu-smi info": CommandFacts("ok", "", "x")},
        folders={"/a": ("b",)},
        variables={"A": "1"},
        files={"/a": "b"},
        libraries={"libc": ("/lib",)},
    ).to_json()
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(document)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


ODD = st.sampled_from([..., None, True, 0, -1, 7, 0.5, "", "x", [], ["x"], [1], {}, {"x": "y"}, {"x": ["y"]}])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(places(FULL))), ODD)
def test_the_schema_refuses_what_the_reader_refuses(path: tuple[Any, ...], value: Any) -> None:
    """The reader is written by hand, the schema is made from annotations: two witnesses."""
    document = changed(FULL, path, value)
    try:
        Snapshot.from_json(json.dumps(document))
        accepted = True
    except SnapshotError:
        accepted = False
    assert (valid(document, "snapshot") == []) is accepted


LOG = """\
[ERROR] TBE(12,python3):2026-01-02-03:04:05.678.901 something odd went wrong
ImportError: libatb.so: cannot open shared object file: No such file or directory
Traceback (most recent call last):
RuntimeError: never heard of
"""


def test_explanations() -> None:
    for text in (LOG, "", "all is well"):
        assert valid(json.loads(explain(text).to_json()), "explain") == []
    document = json.loads(explain(LOG).to_json())
    for path, value in ((("status",), "perhaps"), (("lines",), "4"), (("schema_version",), 0), (("found",), ...)):
        assert len(valid(changed(document, path, value), "explain")) == 1, path
    for key in document["found"][0]:
        assert len(valid(changed(document, ("found", 0, key), ...), "explain")) == 1, key
    assert set(document["found"][0]) == set(schema("explain")["$defs"]["Found"]["properties"])


def test_mutated_reports_are_refused() -> None:
    document = json.loads(check(Snapshot()).to_json())
    for path, value in (
        (("findings", 0, "severity"), "BAD"),
        (("findings", 0, "blocks"), "npu"),
        (("findings", 0, "cause"), ...),
        (("verdicts", 0, "sentence"), ...),
        (("verdicts", 0, "answer"), None),
        (("schema_version",), 1),
        (("findings",), {}),
    ):
        assert len(valid(changed(document, path, value), "report")) == 1, path


PACK = {
    "schema_version": 1,
    "rules": [
        {
            "id": "A",
            "title": "t",
            "title_zh": "t",
            "severity": "FAIL",
            "cause": "c",
            "command": "x",
            "source": "y",
            "tasks": ["train"],
            "blocks": ["npu"],
            "when": {
                "all": [
                    {"distribution": "a", "version": ">=1"},
                    {"any": [{"variable": "A", "matches": "x"}, {"not": {"path": "/a", "exists": True}}]},
                    {"command": "npu-smi info", "matches": "x"},
                ]
            },
        }
    ],
}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(places(PACK))), ODD.filter(lambda value: value != "x"))
def test_the_schema_of_packs_refuses_what_their_reader_refuses(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[Any, ...], value: Any
) -> None:
    document = changed(PACK, path, value)
    file = Path(tmp_path_factory.getbasetemp()) / "pack.json"
    file.write_text(json.dumps(document))
    try:
        read_pack(file)
        accepted = True
    except PackError:
        accepted = False
    if path[-1] == "version" and isinstance(value, str):
        return  # whether a text is a condition on versions is beyond a schema
    assert (valid(document, "rules") == []) is accepted


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        assert cli.main(["schema", kind]) == 0
        assert json.loads(capsys.readouterr().out) == schema(kind)
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema("report")
    with pytest.raises(SystemExit) as stop:
        cli.main(["schema", "nothing"])
    assert stop.value.code == 2
    with pytest.raises(SchemaError, match="no schema 'nothing'; there are snapshot, report"):
        schema("nothing")


def test_what_is_offered_is_there() -> None:
    assert sorted(OFFERED) == sorted(KINDS)
