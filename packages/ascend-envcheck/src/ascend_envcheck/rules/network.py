"""Rules on the networks of the NPUs and of the host."""

from __future__ import annotations

import re
from typing import Callable, Iterable, Mapping, Sequence

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.probes.network import HCCN_CONF, PINGS, RANK_TABLE, TOOL
from ascend_envcheck.rules.environment import Environment
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import MISSING, OK, Snapshot
from ascend_envcheck.variables import whole_number
from ascend_envcheck.versions import pairs

FAIL, WARN, INFO, SKIP = Severity.FAIL, Severity.WARN, Severity.INFO, Severity.SKIP

_NPU = (NPU,)
_HCCN = "HCCN Tool reference; cann/hccl docs/zh/user_guide/fault_diagnosis"
_HCCL = "cann/hccl docs/zh/user_guide/hccl_env"
_NO_TOOL = say("hccn_tool was not run, or gave no answer", "hccn_tool 未运行或没有输出")
_FEW = 8  # device numbers in one line
_LONG = 64  # characters of a value

_VIRTUAL = re.compile(r"lo$|docker|veth|br-|virbr|cni|flannel|cali|tunl|kube|dummy|ifb|tailscale|wg")
"""Interfaces that lead to no other machine, or to one by a detour; HCCL itself passes over docker and lo only."""


def several_machines(snapshot: Snapshot) -> bool:
    """Whether the job spans several machines, as far as launcher, rank table or ``--peers`` tell."""
    from ascend_envcheck.rank_table import read

    servers = len(read(snapshot.files[RANK_TABLE]).servers) if RANK_TABLE in snapshot.files else 0
    return max(Environment(snapshot).machines() or 1, servers) > 1 or bool(_pings(snapshot))


def device_addresses(snapshot: Snapshot) -> Mapping[str, str]:
    """The address of each NPU that has told one, by its number."""
    return _answers(snapshot, "-ip", r"ipaddr\s*:\s*(\S+)")


def addresses(snapshot: Snapshot) -> Iterable[Finding]:
    """NET-DEVIP: each NPU has an address, its own, and the one of /etc/hccn.conf."""
    asked, given = _asked(snapshot, "-ip"), device_addresses(snapshot)
    written = pairs(snapshot.files.get(HCCN_CONF, ""))
    several = several_machines(snapshot)
    without = [number for number in asked if number not in given]
    differing = [n for n, address in given.items() if written.get(f"address_{n}", address) != address]
    if npu_count(snapshot) == 0 or not asked:
        yield _skip("NET-DEVIP", snapshot)
    elif without and not several:
        cause = say(
            "{which} without an address, which one machine alone does not need",
            "{which}没有配置 IP，单机无需配置",
            which=_npus(without),
        )
        yield Finding("NET-DEVIP", SKIP, cause)
    elif without:
        cause = say(
            "{which} without an address: other machines can't be reached",
            "{which}没有配置 IP：无法与其他机器通信",
            which=_npus(without),
        )
        command = f"sudo {TOOL} -i {without[0]} -ip -s address ADDRESS netmask MASK"
        yield Finding("NET-DEVIP", FAIL, cause, command, _HCCN, blocks=_NPU)
    elif differing:
        cause = say(
            "{which}: the address differs from /etc/hccn.conf, which a restart brings back",
            "{which}的 IP 与 /etc/hccn.conf 不一致，重启后会恢复为文件中的值",
            which=_npus(differing),
        )
        yield Finding("NET-DEVIP", WARN, cause, f"cat {HCCN_CONF}; {TOOL} -i {differing[0]} -ip -g", _HCCN)
    elif len(set(given.values())) < len(given):
        cause = say("several NPUs have the same address", "多个 NPU 的 IP 相同")
        command = f"cat {HCCN_CONF}"
        yield Finding("NET-DEVIP", WARN, cause, command, _HCCN, doubts=_NPU)
    else:
        cause = say("{count} NPU(s) have an address each", "{count} 个 NPU 均已配置 IP", count=len(given))
        yield Finding("NET-DEVIP", INFO, cause)


def links(snapshot: Snapshot) -> Iterable[Finding]:
    """NET-LINK: the network ports of the NPUs are up and alike."""
    ups = _answers(snapshot, "-link", r"link status\s*:\s*(\w+)")
    health = _answers(snapshot, "-net_health", r"net health status\s*:\s*([^\r\n]+)")
    down = [number for number, state in ups.items() if state.upper() != "UP"]
    ill = [number for number, state in health.items() if state.strip().lower() != "success" and number not in down]
    if npu_count(snapshot) == 0 or not (ups or health):
        yield _skip("NET-LINK", snapshot)
        return
    several = several_machines(snapshot)
    unlike = list(_unlike(snapshot))
    for which, english, chinese in (
        (down, "{which}: the network port is down", "{which}的网口未连接（DOWN）"),
        (ill, "{which}: the network does not answer the health check", "{which}的网络健康检查未通过"),
    ):
        if which:
            cause = say(english, chinese, which=_npus(which))
            command = (
                f"{TOOL} -i {which[0]} -link -g; {TOOL} -i {which[0]} -net_health -g; {TOOL} -i {which[0]} -optical -g"
            )
            yield _for_machines("NET-LINK", cause, command, _HCCN, several)
    yield from unlike
    if not (down or ill or unlike):
        cause = say("{count} network port(s) are up and alike", "{count} 个网口均为 UP 且配置一致", count=len(ups))
        yield Finding("NET-LINK", INFO, cause)


def _unlike(snapshot: Snapshot) -> Iterable[Finding]:
    for question, pattern, name, why in (
        (
            "-tls",
            r"tls switch\s*\[(\d)\]",
            "TLS",
            say("HCCL ends with EI0016 then", "HCCL 会报 EI0016"),
        ),
        ("-mtu", r"mtu\D*(\d+)", "MTU", say("large packets are lost then", "大包会丢失")),
    ):
        values = _answers(snapshot, question, pattern)
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{number}: {value}" for number, value in list(values.items())[:_FEW])
            cause = say(
                "the NPUs differ in {name} ({values}); {why}",
                "各 NPU 的 {name} 设置不一致（{values}）；{why}",
                name=name,
                values=listed,
                why=why,
            )
            yield Finding("NET-LINK", WARN, cause, f"{TOOL} -i 0 {question} -g", _HCCN, doubts=_NPU)


def peers(snapshot: Snapshot) -> Iterable[Finding]:
    """NET-PING: the NPUs of the other machines answer."""
    pings = _pings(snapshot)
    if not pings:
        cause = say("not asked for; --peers HOSTFILE does", "未要求检查；可用 --peers HOSTFILE")
        yield Finding("NET-PING", SKIP, cause)
        return
    if None in pings.values():
        cause = say("hccn_tool is not here, which would ask them", "没有 hccn_tool，无法检查对端")
        yield Finding("NET-PING", SKIP, cause, doubts=_NPU)
        return
    lost = {peer: loss for peer, loss in pings.items() if loss}
    for peer, loss in lost.items():
        words = {"peer": peer, "loss": f"{loss:g}"}
        cause = say("{peer} loses {loss} % of the packets", "{peer} 丢包率 {loss} %", **words)
        command = f"{TOOL} -i 0 -ping -g address ADDRESS; {TOOL} -i 0 -link -g"
        gone = loss >= 100
        yield Finding(
            "NET-PING", FAIL if gone else WARN, cause, command, _HCCN, blocks=_NPU if gone else (), doubts=_NPU
        )
    if not lost:
        cause = say("{count} address(es) of other NPUs answer", "{count} 个对端 NPU 均可达", count=len(pings))
        yield Finding("NET-PING", INFO, cause)


def _pings(snapshot: Snapshot) -> Mapping[str, float | None]:
    """Peer to the share of packets, in percent, that no way of reaching it got back; None where it was not tried."""
    lost: dict[str, float | None] = {}
    for line, answer in snapshot.commands.items():
        words = line.split()
        if words[:1] == [TOOL] and len(words) == 7 and words[3] in PINGS:
            found = re.search(r"(\d{1,3}(?:\.\d{1,9})?)\s*% packet loss", answer.output)
            loss = float(found[1]) if found else 0.0 if answer.outcome == OK else 100.0
            before = lost.get(words[6])
            lost[words[6]] = None if answer.outcome == MISSING else loss if before is None else min(loss, before)
    return lost


def interface(snapshot: Snapshot) -> Iterable[Finding]:
    """NET-IFNAME: the interface that HCCL takes is there and up, and torch's others agree."""
    env, states = Environment(snapshot), snapshot.host.interfaces
    if npu_count(snapshot) == 0 or not states:
        yield Finding("NET-IFNAME", SKIP, NO_NPU if npu_count(snapshot) == 0 else _NO_INTERFACES)
        return
    named, by_address = env["HCCL_SOCKET_IFNAME"][:_LONG], env.is_set("HCCL_IF_IP")
    chosen = None if by_address else chosen_interface(states, named)
    faults = [*_missing(env, states)]
    if chosen is not None and states[chosen] == "down":
        faults.append(say("HCCL takes {name}, which is down", "HCCL 选用的网卡 {name} 处于 down 状态", name=chosen))
    elif chosen is None and not by_address:
        template = ("{name}={value} matches no interface", "{name}={value} 没有匹配到任何网卡")
        faults.append(say(*template, name="HCCL_SOCKET_IFNAME", value=named))
    several, others = several_machines(snapshot), list(_elsewhere(env, chosen))
    for fault in faults:
        yield _for_machines("NET-IFNAME", fault, _CHOOSE, _HCCL, several, alone=WARN if named else INFO)
    for other in others:
        yield Finding("NET-IFNAME", WARN if several else INFO, other, _CHOOSE, _HCCL, doubts=_NPU if several else ())
    if not faults and not others:
        name = "HCCL_IF_IP" if chosen is None else chosen
        yield Finding("NET-IFNAME", INFO, say("HCCL takes {name}", "HCCL 使用 {name}", name=name))


def _missing(env: Environment, states: Mapping[str, str]) -> Iterable[Message]:
    for name in _OF_TORCH:
        if any(entry not in states for entry in env[name].split(",") if entry):
            template = ("{name}={value} names no interface", "{name}={value} 不是现有网卡")
            yield say(*template, name=name, value=env[name][:_LONG])


def _elsewhere(env: Environment, chosen: str | None) -> Iterable[Message]:
    for name in _OF_TORCH:
        if chosen is not None and env.is_set(name) and chosen not in env[name].split(","):
            yield say(
                "{name}={value}, and HCCL takes {chosen}: two networks for one job",
                "{name}={value}，而 HCCL 使用 {chosen}：同一任务走了两个网络",
                name=name,
                value=env[name][:_LONG],
                chosen=chosen,
            )


_OF_TORCH = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_CHOOSE = "ip -br address; export HCCL_SOCKET_IFNAME==NAME GLOO_SOCKET_IFNAME=NAME TP_SOCKET_IFNAME=NAME"
_NO_INTERFACES = say("the interfaces of the host are not known", "无法得知主机网卡")


def outward(states: Mapping[str, str]) -> list[str]:
    """The interfaces that may lead to other machines."""
    return sorted(name for name, state in states.items() if state != "down" and not _VIRTUAL.match(name))


def chosen_interface(states: Mapping[str, str], named: str = "") -> str | None:
    """The interface that HCCL takes, None when the name matches none.

    With a name: the first that matches it (``^`` excludes, ``=`` is exact, else a prefix). Without: the first in the
    alphabet that is neither docker's nor lo, then docker's, then lo. Source: HCCL's document on HCCL_SOCKET_IFNAME.
    """
    names = sorted(states, key=lambda name: (name == "lo", name.startswith("docker"), name))
    if not named:
        return names[0] if names else None
    excluding, listed = named.startswith("^"), named.lstrip("^")
    exact, entries = listed.startswith("="), [entry for entry in listed.lstrip("=").split(",") if entry]
    fits: Callable[[str], bool] = (
        (lambda name: name in entries) if exact else (lambda name: any(name.startswith(entry) for entry in entries))
    )
    return next((name for name in names if fits(name) is not excluding), None)


def _asked(snapshot: Snapshot, question: str) -> Mapping[str, str]:
    """NPU number to what hccn_tool said to a question, where it answered at all."""
    found = {}
    for line, answer in snapshot.commands.items():
        words = line.split()
        asked = words[:2] == [TOOL, "-i"] and words[3:] == [question, "-g"] and whole_number(words[2]) is not None
        if asked and answer.output and answer.outcome == OK:
            found[words[2]] = answer.output
    return found


def _answers(snapshot: Snapshot, question: str, pattern: str) -> Mapping[str, str]:
    found = {number: re.search(pattern, text, re.IGNORECASE) for number, text in _asked(snapshot, question).items()}
    return {number: match[1] for number, match in found.items() if match}


def _skip(rule: str, snapshot: Snapshot) -> Finding:
    return Finding(rule, SKIP, NO_NPU if npu_count(snapshot) == 0 else _NO_TOOL)


def _npus(numbers: Sequence[str]) -> Message:
    listed = ", ".join(numbers[:_FEW]) + (", …" if len(numbers) > _FEW else "")
    return say("NPU {numbers}", "NPU {numbers} ", numbers=listed)


def _for_machines(
    rule: str, cause: Message, command: str, source: str, several: bool, alone: Severity = INFO
) -> Finding:
    """A fault of the network: it stops a job of several machines, and may not matter on one."""
    return Finding(rule, FAIL if several else alone, cause, command, source, blocks=_NPU if several else ())


RULES = (
    Rule("NET-DEVIP", say("each NPU has a network address", "每个 NPU 都有 IP"), addresses, "network", _NPU),
    Rule(
        "NET-LINK",
        say("the NPUs' network ports are up and alike", "NPU 网口均为 UP 且配置一致"),
        links,
        "network",
        _NPU,
    ),
    Rule("NET-PING", say("the NPUs of the other machines answer", "对端 NPU 可达"), peers, "network"),
    Rule("NET-IFNAME", say("HCCL takes the right interface", "HCCL 使用正确的网卡"), interface, "network", _NPU),
)
