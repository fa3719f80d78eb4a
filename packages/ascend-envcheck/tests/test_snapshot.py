"""A snapshot comes back as it went, and what is none is refused with its place."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from fake_machine import FakeMachine, healthy
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import RULES, Snapshot, SnapshotError, check
from ascend_envcheck.render import text as plain
from ascend_envcheck.snapshot import CommandFacts, DiskFacts, Distribution, HostFacts, ImportFacts, PythonFacts

# Surrogates and control characters included: a snapshot is a file from anywhere.
TEXT = st.text(st.characters(), max_size=30)
OUTCOME = st.one_of(st.sampled_from(["ok", "failed", "crashed", "timeout", "missing", "not-run"]), TEXT)
VERSION = st.one_of(TEXT, st.from_regex(r"\d{1,3}(\.\d{1,3}){0,3}(rc1|\.post\d|\+cpu|\.RC1)?", fullmatch=True))
HOME = "/usr/local/Ascend/cann"
FILES = [
    f"{HOME}/{name}"
    for name in (
        "aarch64-linux/ascend_toolkit_install.info",
        "share/info/runtime/version.info",
        "runtime/version.info",
        "version.cfg",
    )
]
LINE = st.builds(
    "{}{}{}".format, st.sampled_from(["version", "version_dir", "Version", ""]), st.sampled_from("=: "), VERSION
)

SNAPSHOTS = st.builds(
    Snapshot,
    python=st.builds(PythonFacts, version=VERSION, machine=st.sampled_from(["x86_64", "aarch64", ""])),
    distributions=st.dictionaries(
        st.sampled_from(["torch", "torch_npu", "torchvision", "transformers", "megatron-core", "psutil"]),
        st.builds(Distribution, version=VERSION, requires=st.lists(TEXT, max_size=2).map(tuple)),
    ),
    imports=st.builds(
        ImportFacts,
        torch=OUTCOME,
        torch_detail=TEXT,
        torch_alone=OUTCOME,
        torch_version=VERSION,
        torch_npu=OUTCOME,
        torch_npu_detail=TEXT,
        accelerator_api=st.sampled_from([True, False, None]),
        device=st.sampled_from(["", "npu", "cuda", "mps"]),
        device_count=st.integers(-3, 10**20),
        device_detail=TEXT,
    ),
    commands=st.dictionaries(
        st.sampled_from(["npu-smi info", "npu-smi info -m", "npu-smi info -t board -i 0", "smoke", "chronyc tracking"]),
        st.builds(CommandFacts, outcome=OUTCOME, detail=TEXT, output=TEXT),
    ),
    host=st.builds(
        HostFacts,
        live=st.booleans(),
        kernel=VERSION,
        libc=VERSION,
        container=TEXT,
        memory=st.dictionaries(st.sampled_from(["MemTotal", "MemAvailable", "HugePages_Free"]), st.integers()),
        limits=st.dictionaries(st.sampled_from(["nofile", "memlock", "nproc", "core"]), st.integers(-1)),
        disks=st.dictionaries(
            st.sampled_from(["home", "shm", "tmp", "cwd", "log"]),
            st.builds(DiskFacts, total=st.integers(), free=st.integers(), free_inodes=st.none() | st.integers()),
        ),
        reserved_ports=TEXT,
        listening=st.lists(st.integers(), max_size=2).map(tuple),
    ),
    devices=st.dictionaries(st.sampled_from(["/dev/davinci0", "/dev/hisi_hdc"]), st.sampled_from(["rw", "denied"])),
    cann_homes=st.sampled_from([(), (HOME,), (HOME, "/opt/cann"), ("",)]),
    files=st.dictionaries(st.sampled_from(FILES), st.one_of(TEXT, st.lists(LINE, max_size=4).map("\n".join))),
    paths=st.dictionaries(st.sampled_from([HOME, "/opt/cann", f"{HOME}/set_env.sh", ""]), TEXT),
    libraries=st.dictionaries(
        st.sampled_from(["libatb.so", "libascendcl.so"]), st.lists(TEXT, max_size=2).map(tuple)
    ),
    variables=st.dictionaries(st.sampled_from(["ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "ATB_HOME_PATH"]), TEXT),
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(SNAPSHOTS)
def test_no_snapshot_is_too_odd(snapshot: Snapshot) -> None:
    """Malformed version files, odd versions, odd outcomes: always a finding of each rule, and text that prints."""
    report = check(snapshot)
    assert len({finding.id for finding in report.findings}) == len(RULES)
    text = plain.render(report, snapshot, RULES)
    assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(report.to_json())["verdicts"]


@settings(deadline=None, max_examples=100)
@given(SNAPSHOTS)
def test_there_and_back(snapshot: Snapshot) -> None:
    again = Snapshot.from_json(snapshot.to_json())
    assert again == snapshot
    assert check(again) == check(snapshot)


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=100)
@given(SNAPSHOTS, st.data())
def test_a_mutated_snapshot_is_refused_or_judged(snapshot: Snapshot, data: st.DataObject) -> None:
    whole = json.loads(snapshot.to_json())
    at = whole
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    if data.draw(st.booleans()):
        del at[key]
    else:
        at[key] = data.draw(JSON_VALUES)
    with suppress(SnapshotError):  # anything else is a crash
        assert check(Snapshot.from_json(json.dumps(whole))).verdicts


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("python", 3, r"snapshot\.python is an integer, must be an object"),
        ("python.version", None, r"snapshot\.python\.version is null, must be a string"),
        ("imports.device_count", True, r"device_count is true or false, must be an integer"),
        ("imports.accelerator_api", "yes", r"accelerator_api is a string, must be true or false"),
        ("imports.device_count", 1.5, r"device_count is a number, must be an integer"),
        ("cann_homes", [1], r"cann_homes\[0\] is an integer, must be a string"),
        ("cann_homes", "x", r"cann_homes is a string, must be a list"),
        ("files", {"a": []}, r"snapshot\.files\.a is a list, must be a string"),
        ("distributions", {"torch": {"version": "2"}}, r"distributions\.torch\.requires is missing"),
        ("schema_version", 1, r"schema_version 1, this version reads 2; use the ascend-envcheck that wrote it"),
        ("schema_version", "1", r"schema_version is a string, must be an integer"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, message: str) -> None:
    whole = json.loads(Snapshot().to_json())
    *folders, last = path.split(".")
    at = whole
    for folder in folders:
        at = at[folder]
    at[last] = value
    with pytest.raises(SnapshotError, match=message):
        Snapshot.from_json(json.dumps(whole))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "7"])
def test_no_snapshot_at_all(text: str) -> None:
    with pytest.raises(SnapshotError, match="not a snapshot"):
        Snapshot.from_json(text)


def test_keys_of_a_later_release_are_ignored() -> None:
    whole = {**json.loads(Snapshot().to_json()), "weather": "fine"}
    assert Snapshot.from_json(json.dumps(whole)) == Snapshot()


def test_a_machine_is_judged_elsewhere_as_at_home(machine: FakeMachine) -> None:
    healthy(machine)
    snapshot = machine.snapshot()
    assert check(Snapshot.from_json(snapshot.to_json())) == check(snapshot)


def test_a_terminal_is_not_steered() -> None:
    snapshot = replace(Snapshot(), imports=ImportFacts(torch="failed", torch_detail="\x1b[2Jgone\nFAKE  line"))
    text = plain.render(check(snapshot), snapshot, RULES)
    assert "\x1b" not in text
    assert "?[2Jgone?FAKE  line" in text


def test_a_command_to_copy_runs_nothing_of_the_snapshot() -> None:
    home = "/x; rm -rf $HOME #"
    snapshot = replace(
        Snapshot(),
        devices={"/dev/davinci0": "rw", "/dev/davinci_manager": "rw"},
        cann_homes=(home,),
        paths={home: home, f"{home}/set_env.sh": f"{home}/set_env.sh"},
    )
    commands = {finding.id: finding.command for finding in check(snapshot).findings}
    assert commands["CANN-SOURCED"] == "source '/x; rm -rf $HOME #/set_env.sh'"
