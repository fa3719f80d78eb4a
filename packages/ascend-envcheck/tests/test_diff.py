"""What differs between machines, and which of many is the odd one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import TABLE, FakeMachine, healthy
from hypothesis import given
from hypothesis import strategies as st

from ascend_envcheck import Snapshot, cli
from ascend_envcheck.diff import ABSENT, TOPICS, Difference, differences
from ascend_envcheck.snapshot import CommandFacts, DiskFacts, Distribution, HostFacts, ImportFacts


def with_torch_npu(version: str) -> Snapshot:
    return Snapshot(distributions={"torch_npu": Distribution(version)})


def titles(found: tuple[Difference, ...]) -> list[str]:
    return [each.fact.title for each in found]


HOST = HostFacts(
    live=True,
    kernel="5.10.0",
    limits={"nofile": 1024, "memlock": -1},
    memory={"MemTotal": 1056563200, "MemFree": 5, "HugePages_Total": 0},
    disks={"shm": DiskFacts(64 * 2**30, 1000, 7)},
    interfaces={"eth0": "up", "veth12ab": "up"},
    listening=(22,),
)
BOARD = "NPU ID : 0\nSerial Number : id-11111111\nFirmware Version : 7.1.0.3.220\nTemperature(C) : 40\n"
A = Snapshot(
    host=HOST,
    distributions={"torch": Distribution("2.7.1"), "torch_npu": Distribution("2.7.1")},
    imports=ImportFacts(torch="ok", torch_version="2.7.1", device="npu", device_count=8),
    commands={
        "npu-smi info": CommandFacts("ok", "", TABLE),
        "npu-smi info -t board -i 0": CommandFacts("ok", "", BOARD),
    },
    devices={"/dev/davinci0": "rw"},
    cann_homes=("/usr/local/Ascend/cann-8.5.0",),
    files={"/usr/local/Ascend/driver/version.info": "Version=24.1.0\nPackage_date=20250101\n"},
    folders={"/opp": ("ascend910b", "common")},
    variables={"HCCL_IF_IP": "ip4-aaaaaaaa", "RANK": "0", "HCCL_BUFFSIZE": "200"},
)


def test_the_same_node_a_minute_later_and_its_healthy_neighbour_are_the_same() -> None:
    host = replace(
        HOST,
        memory={"MemTotal": 1056563900, "MemFree": 9, "HugePages_Total": 0},
        disks={"shm": DiskFacts(64 * 2**30, 5, 3)},
        interfaces={"eth0": "up", "veth99ff": "up"},
        listening=(22, 29500),
    )
    busy = TABLE.replace("91.1        49", "301.0       71").replace("3372 / 65536", "60000/ 65536")
    board = BOARD.replace("id-11111111", "id-22222222").replace(": 40", ": 71")
    other = replace(
        A,
        host=host,
        commands={
            "npu-smi info": CommandFacts("ok", "", busy),
            "npu-smi info -t board -i 0": CommandFacts("ok", "", board),
        },
        files={"/usr/local/Ascend/driver/version.info": "Version=24.1.0\nPackage_date=20250202\n"},
        variables={"HCCL_IF_IP": "ip4-bbbbbbbb", "RANK": "8", "HCCL_BUFFSIZE": "200"},
    )
    assert differences([A, other]) == ()


@pytest.mark.parametrize(
    ("changed", "topic", "title", "values"),
    [
        (replace(A, distributions={"torch": Distribution("2.7.1")}), "packages", "torch_npu", ("2.7.1", ABSENT)),
        (replace(A, imports=replace(A.imports, device_count=7)), "import", "device_count", ("8", "7")),
        (
            replace(A, files={"/usr/local/Ascend/driver/version.info": "Version=23.0.3\n"}),
            "driver",
            "/usr/local/Ascend/driver/version.info: version",
            ("24.1.0", "23.0.3"),
        ),
        (replace(A, devices={"/dev/davinci0": "denied"}), "devices", "/dev/davinci0", ("rw", "denied")),
        (
            replace(A, cann_homes=("/usr/local/Ascend/cann-9.0.0",)),
            "cann",
            "homes",
            ("/usr/local/Ascend/cann-8.5.0", "/usr/local/Ascend/cann-9.0.0"),
        ),
        (replace(A, folders={"/opp": ("common",)}), "cann", "/opp/: ascend910b", ("there", ABSENT)),
        (
            replace(A, variables={**A.variables, "HCCL_BUFFSIZE": "400"}),
            "variables",
            "HCCL_BUFFSIZE",
            ("200", "400"),
        ),
        (
            replace(A, host=replace(HOST, limits={"nofile": 1024, "memlock": 65536})),
            "limits",
            "memlock",
            ("unlimited", "65536"),
        ),
        (replace(A, host=replace(HOST, kernel="6.6.0")), "host", "kernel", ("5.10.0", "6.6.0")),
        (replace(A, host=replace(HOST, interfaces={"eth0": "down"})), "host", "interfaces: eth0", ("up", "down")),
        (
            replace(A, host=replace(HOST, disks={"shm": DiskFacts(64 * 2**20, 5)})),
            "host",
            "disk of shm",
            ("64.0 GiB", "0.1 GiB"),
        ),
        (
            replace(
                A,
                commands={
                    **A.commands,
                    "npu-smi info -t board -i 0": CommandFacts("ok", "", BOARD.replace("3.220", "1.101")),
                },
            ),
            "commands",
            "npu-smi info -t board -i 0: firmware version",
            ("7.1.0.3.220", "7.1.0.1.101"),
        ),
    ],
)
def test_each_topic(changed: Snapshot, topic: str, title: str, values: tuple[str, str]) -> None:
    found = {(each.fact.topic, each.fact.title): each.values for each in differences([A, changed])}
    assert found[topic, title] == values
    # A CANN home carries its version in its name.
    assert set(found) - {("cann", "version")} == {(topic, title)}


def test_a_sick_chip_and_another_npu_smi() -> None:
    sick = TABLE.replace("| OK            |", "| Alarm         |").replace("25.2.0", "24.1.0")
    changed = replace(A, commands={**A.commands, "npu-smi info": CommandFacts("ok", "", sick)})
    assert [(each.fact.title, each.values) for each in differences([A, changed])] == [
        ("npu-smi", ("25.2.0", "24.1.0")),
        ("running driver", ("25.2.0", "24.1.0")),
        ("NPU 0: health", ("OK", "Alarm")),
    ]


def test_what_one_of_them_could_not_see_is_no_difference() -> None:
    """A copy of a machine's files tells nothing of its kernel, limits and commands."""
    assert differences([A, replace(A, host=HostFacts(), commands={}, imports=ImportFacts())]) == differences(
        [A, replace(A, commands={})]
    )
    found = differences([A, replace(A, commands={}, host=HostFacts(), imports=ImportFacts())])
    assert {each.fact.topic for each in found} <= {"driver", "devices"}


def test_the_odd_one_of_eight() -> None:
    found = differences([with_torch_npu("2.7.1")] * 2 + [with_torch_npu("2.6.0")] + [with_torch_npu("2.7.1")] * 5)
    assert [(each.usual, each.odd) for each in found] == [("2.7.1", (2,))]


def test_a_tie_has_no_majority() -> None:
    versions = ["2.7.1", "2.7.1", "2.6.0", "2.6.0"]
    (found,) = differences([with_torch_npu(version) for version in versions])
    assert (found.usual, found.odd) == (None, ())
    (found,) = differences([with_torch_npu(version) for version in ("1", "1", "2", "3")])
    assert found.usual is None  # half is not more than half
    (found,) = differences([with_torch_npu(version) for version in ("1", "2")])
    assert found.usual is None  # of two, nobody is odd


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=9))
def test_the_majority_is_more_than_half_and_the_rest_is_odd(versions: list[str]) -> None:
    found = differences([with_torch_npu(version) for version in versions])
    assert bool(found) == (len(set(versions)) > 1)
    for each in found:
        often = [version for version in "abc" if 2 * versions.count(version) > len(versions)]
        assert each.usual == (often[0] if often else None)
        assert len(each.odd) == (len(versions) - versions.count(often[0]) if often else 0)


def test_topics_come_in_their_order() -> None:
    found = differences([A, Snapshot()])
    order = [list(TOPICS).index(each.fact.topic) for each in found]
    assert order == sorted(order)


def written(folder: Path, **snapshots: Snapshot) -> list[str]:
    paths = []
    for name, snapshot in snapshots.items():
        path = folder / f"{name}.json"
        path.write_text(snapshot.to_json())
        paths.append(str(path))
    return paths


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path, a=A, b=replace(A, distributions={**A.distributions, "torch": Distribution("2.6.0")}))
    assert cli.main(["diff", a, a]) == 0
    assert capsys.readouterr().out == "no difference in 2 snapshots\n"
    assert cli.main(["diff", a, b]) == 1
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["Python", "and", "its", "packages"],
        ["torch"],
        [a, "2.7.1"],
        [b, "2.6.0"],
    ]


def test_many_files_name_the_odd_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {f"node{number}": with_torch_npu("2.6.0" if number == 3 else "2.7.1") for number in range(8)}
    written(tmp_path, **nodes)
    monkeypatch.chdir(tmp_path)
    names = [f"{name}.json" for name in nodes]
    assert cli.main(["diff", *names, "--lang", "en"]) == 1
    out = capsys.readouterr().out
    assert "node3.json: torch_npu 2.6.0, the other 7 have 2.7.1\n" in out
    assert out.startswith("node0.json, node1.json, node2.json, node4.json, ")
    assert cli.main(["diff", *names, "--lang", "zh"]) == 1
    assert "node3.json：torch_npu 为 2.6.0，其余 7 个为 2.7.1\n" in capsys.readouterr().out
    assert cli.main(["diff", "node1.json", "node2.json", "node3.json", "node3.json"]) == 1
    out = capsys.readouterr().out
    assert "no majority" in out
    assert "2.7.1  (node1.json, node2.json)" in out
    assert "2.6.0  (node3.json, node3.json)" in out


def test_two_odd_ones_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"a": "2.7.1", "b": "2.7.1", "c": "2.7.1", "d": "2.6.0", "e": "2.5.1"}
    written(tmp_path, **{name: with_torch_npu(version) for name, version in versions.items()})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["diff", *(f"{name}.json" for name in versions)]) == 1
    out = capsys.readouterr().out
    assert "d.json: torch_npu 2.6.0, 3 of 5 have 2.7.1\n" in out
    assert "e.json: torch_npu 2.5.1, 3 of 5 have 2.7.1\n" in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = written(tmp_path, a=with_torch_npu("1"), b=with_torch_npu("1"), c=with_torch_npu("2"))
    assert cli.main(["diff", *names, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "files": names,
        "differences": [
            {"topic": "packages", "name": "torch_npu", "values": ["1", "1", "2"], "majority": "1", "odd": [names[2]]}
        ],
    }


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = written(tmp_path, a=A)
    (tmp_path / "bad.json").write_text("{}")
    assert cli.main(["diff", good, str(tmp_path / "bad.json")]) == 2
    assert "bad.json" in capsys.readouterr().err
    assert cli.main(["diff", good, str(tmp_path / "none.json")]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["diff", good])
    assert stop.value.code == 2


def test_a_hostile_file_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = written(tmp_path, a=A, b=replace(A, variables={**A.variables, "HCCL_BUFFSIZE": "\x1b[2J\nsame"}))
    assert cli.main(["diff", *names]) == 1
    out = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "?[2J?same" in out


def test_a_real_look_at_one_machine_twice(machine: FakeMachine) -> None:
    """Tokens of addresses differ from look to look, the machine does not."""
    healthy(machine)
    machine.environ["HCCL_IF_IP"] = "10.1.2.3"
    assert differences([machine.snapshot(), machine.snapshot()]) == ()
