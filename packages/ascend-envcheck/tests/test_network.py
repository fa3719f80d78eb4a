"""What is said of the networks, the ranks and the container; and that the probe sees them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any, Callable

import pytest
from fake_machine import TABLE, FakeMachine
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_envcheck import Finding, Severity, Snapshot, check, collect
from ascend_envcheck.messages import Message
from ascend_envcheck.probes.network import MOUNTS, RANK_TABLE
from ascend_envcheck.rank_table import is_address, read
from ascend_envcheck.rules.network import RULES as NETWORK
from ascend_envcheck.rules.network import chosen_interface, outward
from ascend_envcheck.rules.ranks import RULES as RANKS
from ascend_envcheck.snapshot import CommandFacts, HostFacts

RULES = (*NETWORK, *RANKS)
FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP
ALONE: dict[str, str] = {}
SEVERAL = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
OURS, THEIRS = ("ip4-00000001", "ip4-00000002"), ("ip4-00000003", "ip4-00000004")


def told_by(rule: str, snapshot: Snapshot) -> list[Finding]:
    return list(check(snapshot, only=[rule], rules=RULES).findings)


def two_npus(variables: dict[str, str] | None = None, **answers: tuple[str, str]) -> Snapshot:
    """Two NPUs, and what hccn_tool answers to a question for each."""
    commands = {
        f"hccn_tool -i {number} -{question} -g": CommandFacts("ok", output=text)
        for question, texts in answers.items()
        for number, text in enumerate(texts)
    }
    nodes = dict.fromkeys(["/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager"], "rw")
    return replace(Snapshot(), devices=nodes, commands=commands, variables=variables or {}, host=HostFacts(live=True))


def ip(address: str) -> str:
    return f"ipaddr:{address}\nnetmask:255.255.255.0\n" if address else "Get ip address failed\n"


UP, DOWN = "link status: UP\n", "link status: DOWN\n"
WELL, ILL = "net health status: Success\n", "net health status: Init\n"
TLS = "dev_id:0, tls switch[{}](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset)\n"


# --- addresses and links ---


@pytest.mark.parametrize(
    ("variables", "addresses", "conf", "severity"),
    [
        (ALONE, OURS, "", INFO),
        (SEVERAL, OURS, "address_0=ip4-00000001\nnetmask_0=255.255.255.0\naddress_1=ip4-00000002\n", INFO),
        (SEVERAL, OURS, "address_0=ip4-00000001\naddress_1=ip4-0000000a\n", WARN),
        (SEVERAL, (OURS[0], OURS[0]), "", WARN),
        (ALONE, (OURS[0], ""), "", SKIP),
        (SEVERAL, (OURS[0], ""), "", FAIL),
    ],
)
def test_addresses(variables: dict[str, str], addresses: tuple[str, str], conf: str, severity: Severity) -> None:
    snapshot = two_npus(variables, ip=(ip(addresses[0]), ip(addresses[1])))
    (finding,) = told_by("NET-DEVIP", replace(snapshot, files={"/etc/hccn.conf": conf} if conf else {}))
    assert finding.severity is severity
    assert finding.blocks == (("npu",) if severity is FAIL else ())


@pytest.mark.parametrize(
    ("variables", "answers", "severity"),
    [
        (SEVERAL, {"link": (UP, UP), "net_health": (WELL, WELL)}, INFO),
        (SEVERAL, {"link": (UP, DOWN)}, FAIL),
        (ALONE, {"link": (UP, DOWN)}, INFO),  # NPUs of one server have HCCS; many a machine has no cable
        (SEVERAL, {"link": (UP, UP), "net_health": (WELL, ILL)}, FAIL),
        (ALONE, {"link": (UP, UP), "tls": (TLS.format(0), TLS.format(1))}, WARN),
        (ALONE, {"link": (UP, UP), "tls": (TLS.format(1), TLS.format(1))}, INFO),
        (ALONE, {"link": (UP, UP), "mtu": ("mtu:1500\n", "mtu:4096\n")}, WARN),
    ],
)
def test_links(variables: dict[str, str], answers: dict[str, tuple[str, str]], severity: Severity) -> None:
    (finding,) = told_by("NET-LINK", two_npus(variables, **answers))
    assert finding.severity is severity


def test_without_the_tool_nothing_is_known_and_nothing_fails() -> None:
    for variables in (ALONE, SEVERAL):
        for rule in ("NET-DEVIP", "NET-LINK", "NET-PING", "NET-IFNAME", "NET-RANKTABLE"):
            (finding,) = told_by(rule, two_npus(variables))
            assert finding.severity is SKIP, rule
            assert finding.cause


# --- peers ---

PING = "hccn_tool -i 0 -ping -g address ip4-00000009"
PING_A3 = PING.replace("-ping", "-hccs_ping")


@pytest.mark.parametrize(
    ("commands", "severity"),
    [
        ({PING: CommandFacts("ok", output="3 packets transmitted, 3 received, 0.00% packet loss\n")}, INFO),
        ({PING: CommandFacts("ok", output="3 packets transmitted, 2 received, 33.33% packet loss\n")}, WARN),
        ({PING: CommandFacts("ok", output="3 packets transmitted, 0 received, 100.00% packet loss\n")}, FAIL),
        ({PING: CommandFacts("failed", "exit status 1")}, FAIL),
        ({PING: CommandFacts("failed"), PING_A3: CommandFacts("ok", output="0.00% packet loss")}, INFO),
        ({PING: CommandFacts("missing")}, SKIP),
        ({}, SKIP),
    ],
)
def test_peers(commands: dict[str, CommandFacts], severity: Severity) -> None:
    (finding,) = told_by("NET-PING", replace(two_npus(), commands=commands))
    assert finding.severity is severity


# --- interfaces ---


# HCCL's document on HCCL_SOCKET_IFNAME: prefixes, = exact, ^ excludes; by default neither docker nor lo comes first.
@pytest.mark.parametrize(
    ("named", "chosen"),
    [
        ("", "bond0"),
        ("eth", "eth0"),
        ("enp,eth1", "eth1"),
        ("=eth1", "eth1"),
        ("=eth", None),
        ("^bond,eth0", "eth1"),
        ("^=bond0", "eth0"),
        ("docker", "docker0"),
        ("ib", None),
    ],
)
def test_the_interface_that_hccl_takes(named: str, chosen: str | None) -> None:
    states = dict.fromkeys(["lo", "docker0", "eth1", "eth0", "bond0"], "up")
    assert chosen_interface(states, named) == chosen


def test_the_interface_where_there_is_no_other() -> None:
    assert chosen_interface({"lo": "unknown", "docker0": "up"}) == "docker0"
    assert chosen_interface({"lo": "unknown"}) == "lo"
    assert chosen_interface({}) is None
    assert outward({"lo": "unknown", "docker0": "up", "eth0": "up", "eth1": "down", "veth12": "up"}) == ["eth0"]


@pytest.mark.parametrize(
    ("variables", "severity", "words"),
    [
        ({}, INFO, "HCCL takes bond0"),
        ({"HCCL_SOCKET_IFNAME": "ib0"}, WARN, "matches no interface"),
        ({**SEVERAL, "HCCL_SOCKET_IFNAME": "ib0"}, FAIL, "HCCL_SOCKET_IFNAME=ib0 matches no interface"),
        ({**SEVERAL, "HCCL_SOCKET_IFNAME": "=eth1"}, FAIL, "eth1, which is down"),
        ({**SEVERAL, "HCCL_IF_IP": "ip4-00000007", "HCCL_SOCKET_IFNAME": "ib0"}, INFO, "HCCL_IF_IP"),
        ({**SEVERAL, "HCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "bond0"}, WARN, "two networks"),
        ({"HCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "bond0"}, INFO, "two networks"),
        ({**SEVERAL, "HCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}, INFO, "HCCL takes eth0"),
    ],
)
def test_interfaces(variables: dict[str, str], severity: Severity, words: str) -> None:
    states = {"lo": "unknown", "eth0": "up", "eth1": "down", "bond0": "up"}
    snapshot = replace(two_npus(variables), host=HostFacts(live=True, interfaces=states))
    (finding,) = told_by("NET-IFNAME", snapshot)
    assert finding.severity is severity
    assert words in finding.cause


def test_a_name_that_only_torch_is_told() -> None:
    variables = {**SEVERAL, "HCCL_IF_IP": "ip4-00000007", "GLOO_SOCKET_IFNAME": "eth9"}
    snapshot = replace(two_npus(variables), host=HostFacts(live=True, interfaces={"eth0": "up"}))
    (finding,) = told_by("NET-IFNAME", snapshot)
    assert (finding.severity, finding.cause) == (FAIL, "GLOO_SOCKET_IFNAME=eth9 names no interface")


def test_a_command_to_copy_runs_nothing_of_the_snapshot() -> None:
    line = "hccn_tool -i $(reboot) -link -g"
    snapshot = replace(two_npus(SEVERAL), commands={line: CommandFacts("ok", output=DOWN)})
    assert [finding.command for finding in check(snapshot, rules=RULES).findings if "reboot" in finding.command] == []


# --- the rank table ---


def device(number: int, address: str, rank: int) -> dict[str, str]:
    return {"device_id": str(number), "device_ip": address, "rank_id": str(rank)}


def table() -> dict[str, Any]:
    """Two servers of two NPUs, in the form of the HCCL user guide."""
    servers = [
        {"server_id": "node_0", "device": [device(0, OURS[0], 0), device(1, OURS[1], 1)]},
        {"server_id": "node_1", "device": [device(0, THEIRS[0], 2), device(1, THEIRS[1], 3)]},
    ]
    return {"status": "completed", "version": "1.0", "server_count": "2", "server_list": servers}


def super_nodes() -> dict[str, Any]:
    """The same for A3."""
    whole = {**table(), "version": "1.2"}
    for server in whole["server_list"]:
        server["host_ip"] = "ip4-00000008"
        for number, entry in enumerate(server["device"]):
            entry.update(super_device_id=str(number), host_port=str(60000 + number))
    whole["super_pod_list"] = [{"super_pod_id": "0", "server_list": [{"server_id": "node_0"}, {"server_id": "node_1"}]}]
    return whole


def test_a_sound_table() -> None:
    for whole in (table(), super_nodes()):
        seen = read(json.dumps(whole))
        assert seen.faults == ()
        assert [entry.rank_id for entry in seen.devices] == [0, 1, 2, 3]
        assert seen.servers == ("node_0", "node_1")


def at(whole: dict[str, Any], server: int, number: int) -> dict[str, Any]:
    found: dict[str, Any] = whole["server_list"][server]["device"][number]
    return found


def swap(whole: dict[str, Any]) -> None:
    at(whole, 0, 1)["rank_id"], at(whole, 1, 0)["rank_id"] = "2", "1"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.update(status="initializing"), 'status is not "completed"'),
        (lambda t: t.update(version="2.0"), "version is 2.0"),
        (lambda t: t.pop("version"), "version is missing"),
        (lambda t: t.update(server_count="3"), "server_count is 3, server_list has 2"),
        (lambda t: t.pop("server_list"), "server_list is missing"),
        (lambda t: t["server_list"][1].update(server_id="node_0"), "server_id node_0 occurs twice"),
        (lambda t: t["server_list"][1].update(server_id="n" * 65), "longer than 64"),
        (lambda t: t["server_list"][1].pop("device"), "server node_1 has no device"),
        (lambda t: at(t, 1, 1).update(rank_id="4"), "0 to 3 once"),
        (lambda t: at(t, 1, 1).update(rank_id="2"), "0 to 3 once"),
        (lambda t: at(t, 1, 1).update(rank_id="two"), "rank_id is missing or no number"),
        (swap, "do not follow each other"),
        (lambda t: at(t, 0, 1).update(device_id="0"), "device_id 0 occurs twice on server node_0"),
        (lambda t: at(t, 0, 1).pop("device_id"), "device_id is missing"),
        (lambda t: at(t, 0, 1).update(device_ip=OURS[0]), "occurs twice"),
        (lambda t: at(t, 0, 1).update(device_ip="eth0"), "device_ip eth0 is no address"),
        (lambda t: at(t, 0, 1).pop("device_ip"), "has no device_ip"),
        (lambda t: at(t, 0, 1).update(device_port="1023"), "device_port is not between"),
        (lambda t: at(t, 0, 1).update(device_port="65536"), "device_port is not between"),
    ],
)
def test_what_is_wrong_with_a_table(spoil: Callable[[dict[str, Any]], object], words: str) -> None:
    whole = table()
    spoil(whole)
    assert any(words in fault for fault in read(json.dumps(whole)).faults)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: at(t, 0, 1).update(host_port="60000"), "host_port occurs twice"),
        (lambda t: t["super_pod_list"][0]["server_list"].pop(), "super_pod_list does not name each"),
        (lambda t: t["super_pod_list"][0]["server_list"].reverse(), "do not follow each other in server_list"),
    ],
)
def test_what_is_wrong_with_a_table_of_super_nodes(spoil: Callable[[dict[str, Any]], object], words: str) -> None:
    whole = super_nodes()
    spoil(whole)
    assert [words in fault for fault in read(json.dumps(whole)).faults] == [True]


def test_one_server_needs_no_device_ip() -> None:
    whole = {**table(), "server_count": "1", "server_list": table()["server_list"][:1]}
    for entry in whole["server_list"][0]["device"]:
        del entry["device_ip"]
    assert read(json.dumps(whole)).faults == ()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"status": "completed", // no\n}', "{}", "\ud800"]
)
def test_no_table_at_all(text: str) -> None:
    assert read(text).faults


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=100)
@given(st.data(), JSON_VALUES)
def test_no_table_is_too_odd(data: st.DataObject, junk: Any) -> None:
    whole = copy.deepcopy(super_nodes())
    place: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = junk
    assert all(isinstance(fault, Message) for fault in read(json.dumps(whole)).faults)


def test_addresses_and_what_is_left_of_them() -> None:
    good = ["10.0.0.1", "fe80::1", "ip4-1f3a9c27", "ip6-1f3a9c27"]
    bad = ["", "10.0.0", "300.0.0.1", "ip4-xyz", "eth0"]
    assert [is_address(text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


PATH = "/job/table"


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        ({}, INFO, "4 ranks"),
        ({"files": {}}, SKIP, "larger than 64 KiB"),
        ({"files": {}, "paths": {}}, FAIL, "/job/table does not exist"),
        ({"files": {RANK_TABLE: "{"}}, FAIL, "no JSON"),
        ({"variables": {"RANK_TABLE_FILE": PATH, "WORLD_SIZE": "8"}}, FAIL, "has 4 ranks, WORLD_SIZE is 8"),
        ({"paths": {PATH: "/job/table.v2", "/job": "/job"}}, FAIL, "symbolic link"),
        ({"paths": {PATH: "/mnt/job/table", "/job": "/mnt/job"}}, INFO, "4 ranks"),  # the folder is one, which is fine
        ({"variables": {"RANK_TABLE_FILE": PATH, "CM_CHIEF_IP": "ip4-00000001"}}, FAIL, "CM_CHIEF_IP must not be set"),
        ({"variables": {}}, SKIP, "RANK_TABLE_FILE is not set"),
    ],
)
def test_rank_table(change: dict[str, Any], severity: Severity, words: str) -> None:
    files, paths = {RANK_TABLE: json.dumps(table())}, {PATH: PATH, "/job": "/job"}
    sound = replace(two_npus({"RANK_TABLE_FILE": PATH}, ip=(ip(OURS[0]), ip(OURS[1]))), files=files, paths=paths)
    (finding,) = told_by("NET-RANKTABLE", replace(sound, **change))
    assert finding.severity is severity
    assert words in finding.cause


def test_a_table_of_another_machine() -> None:
    files = {RANK_TABLE: json.dumps(table())}
    stranger = replace(two_npus({"RANK_TABLE_FILE": PATH}, ip=(ip("ip4-0000000b"), ip("ip4-0000000c"))), files=files)
    assert "no NPU of this machine is in it" in told_by("NET-RANKTABLE", stranger)[0].cause
    ours = table()
    at(ours, 0, 1)["device_id"] = "5"
    snapshot = two_npus({"RANK_TABLE_FILE": PATH}, ip=(ip(OURS[0]), ip(OURS[1])))
    (finding,) = told_by("NET-RANKTABLE", replace(snapshot, files={RANK_TABLE: json.dumps(ours)}))
    assert "device_id 5, and this machine has 2 NPU(s)" in finding.cause


# --- ranks ---


@pytest.mark.parametrize(
    ("variables", "severity"),
    [
        ({}, SKIP),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "NNODES": "2"}, INFO),
        ({"WORLD_SIZE": "4", "RANK": "4"}, FAIL),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, FAIL),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}, FAIL),
        ({"WORLD_SIZE": "0"}, FAIL),
        ({"WORLD_SIZE": "two"}, FAIL),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, FAIL),  # on two NPUs
        ({"LOCAL_RANK": "2"}, FAIL),
        ({"LOCAL_WORLD_SIZE": "2", "ASCEND_RT_VISIBLE_DEVICES": "1"}, FAIL),
        ({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "NNODES": "2"}, WARN),
    ],
)
def test_sizes(variables: dict[str, str], severity: Severity) -> None:
    (finding,) = told_by("DIST-SIZE", two_npus(variables))
    assert finding.severity is severity


def test_sizes_without_an_npu_are_those_of_the_cpu() -> None:
    laptop = replace(Snapshot(), variables={"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "RANK": "7"})
    assert told_by("DIST-SIZE", laptop)[0].severity is INFO


# --- the container ---


@pytest.mark.parametrize(
    ("container", "missing", "mounted", "severities"),
    [
        ("", MOUNTS, (), [SKIP]),
        ("docker", (), (), [INFO]),
        ("docker", ("/usr/local/dcmi",), (), [WARN]),
        ("docker", ("/usr/local/Ascend/driver/lib64",), (), [WARN]),
        ("docker", ("/etc/hccn.conf",), (), [INFO]),
        ("docker", (), ("/usr/local/Ascend",), [WARN]),
        ("docker", (), ("/usr/local/Ascend/driver",), [INFO]),
    ],
)
def test_mounts(container: str, missing: tuple[str, ...], mounted: tuple[str, ...], severities: list[Severity]) -> None:
    snapshot = replace(
        two_npus(),
        host=HostFacts(live=True, container=container),
        paths={path: path for path in MOUNTS if path not in missing},
        folders={"/proc/self/mounts": mounted},
    )
    found = told_by("CONTAINER-MOUNTS", snapshot)
    assert [finding.severity for finding in found] == severities


# --- the probe ---

HCCN_TOOL = """#!/bin/sh
case "$3" in
  -ip) echo "ipaddr:192.168.100.10$2"; echo "netmask:255.255.255.0";;
  -link) echo "link status: UP";;
  -net_health) echo "net health status: Success";;
  -tls) echo "dev_id:$2, tls switch[0](0:disable, 1:enable)";;
  -ping) case "$6" in *.9) echo "3 packets transmitted, 3 received, 0.00% packet loss";; *) exit 1;; esac;;
  -hccs_ping) exit 1;;
  *) exit 1;;
esac
"""


def test_the_probe_sees_it_all(machine: FakeMachine) -> None:
    machine.npu()
    machine.without_site_packages()
    machine.file("/usr/local/bin/hccn_tool", HCCN_TOOL).chmod(0o755)
    machine.file("/etc/hccn.conf", "address_0=192.168.100.100\nnetmask_0=255.255.255.0\n")
    whole = {**table(), "server_count": "1", "server_list": table()["server_list"][:1]}
    whole["server_list"][0]["device"] = [device(0, "192.168.100.100", 0)]
    machine.file("/job/ranks", json.dumps(whole))
    machine.file("/proc/self/mounts", "overlay / overlay rw 0 0\n/dev/sda /usr/local/Ascend ext4 rw 0 0\n")
    snapshot = collect(
        root=str(machine.root),
        environ={**machine.environ, "RANK_TABLE_FILE": "/job/ranks"},
        search_path=[],
        import_torch=False,
        command_seconds=60,
        peers=("192.168.200.9", "192.168.200.8"),
    )
    assert "192.168" not in snapshot.to_json()
    severities = {finding.id: finding.severity for finding in check(snapshot, rules=RULES).findings}
    assert severities["NET-DEVIP"] is INFO
    assert severities["NET-LINK"] is INFO
    assert severities["NET-RANKTABLE"] is INFO
    assert severities["NET-PING"] is FAIL  # one of the two
    assert snapshot.folders["/proc/self/mounts"] == ("/usr/local/Ascend",)
    assert sum("ping" in line for line in snapshot.commands) == 3  # HCCS where RoCE did not arrive


def test_a_table_that_is_cut_off_is_not_judged(machine: FakeMachine) -> None:
    machine.npu()
    machine.without_site_packages()
    machine.file("/job/ranks", json.dumps(table()) + " " * 70_000)
    environ = {**machine.environ, "RANK_TABLE_FILE": "/job/ranks"}
    snapshot = collect(root=str(machine.root), environ=environ, search_path=[], import_torch=False, command_seconds=60)
    (finding,) = told_by("NET-RANKTABLE", snapshot)
    assert (finding.severity, finding.doubts) == (SKIP, ("npu",))


def test_where_each_device_needs_an_address() -> None:
    whole = {**table(), "server_count": "1", "server_list": table()["server_list"][:1]}
    for entry in whole["server_list"][0]["device"]:
        del entry["device_ip"]
    files = {RANK_TABLE: json.dumps(whole)}
    a2 = replace(two_npus({"RANK_TABLE_FILE": PATH}), files=files)
    assert told_by("NET-RANKTABLE", a2)[0].severity is INFO
    smi = {"npu-smi info": CommandFacts("ok", output=TABLE.replace("910B2", "310P3"))}
    assert told_by("NET-RANKTABLE", replace(a2, commands=smi))[0].severity is FAIL
    without_hccs = {"RANK_TABLE_FILE": PATH, "HCCL_INTER_HCCS_DISABLE": "TRUE"}
    assert told_by("NET-RANKTABLE", replace(a2, variables=without_hccs))[0].severity is FAIL


def test_peers_are_asked_for_without_the_tool(machine: FakeMachine) -> None:
    machine.npu()
    machine.without_site_packages()
    snapshot = collect(
        root=str(machine.root),
        environ=machine.environ,
        search_path=[],
        import_torch=False,
        command_seconds=60,
        peers=("192.168.200.9",),
    )
    (finding,) = told_by("NET-PING", snapshot)
    assert (finding.severity, finding.doubts) == (SKIP, ("npu",))
    assert not any(line.startswith("hccn_tool -i 0 -ip") for line in snapshot.commands)


NOISE = st.text(max_size=40)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from(["ip", "link", "net_health", "tls", "mtu"]), st.tuples(NOISE, NOISE)),
    st.dictionaries(
        st.sampled_from(["WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "NNODES", "RANK_TABLE_FILE", "HCCL_SOCKET_IFNAME"]),
        st.one_of(NOISE, st.sampled_from(["0", "2", "^", "=", "^=,", "9" * 18])),
    ),
    NOISE,
)
def test_no_network_is_too_odd(answers: dict[str, tuple[str, str]], variables: dict[str, str], text: str) -> None:
    snapshot = replace(two_npus(variables, **answers), files={RANK_TABLE: text, "/etc/hccn.conf": text})
    snapshot = replace(snapshot, host=HostFacts(live=True, interfaces={text: text, "eth0": "up"}))
    report = check(snapshot, rules=RULES)
    assert {finding.id for finding in report.findings} == {rule.id for rule in RULES}
    for finding in report.findings:
        assert "itself failed" not in finding.cause, finding
        assert isinstance(finding.cause, Message)
        assert finding.severity is not FAIL or (finding.command and finding.source)
