"""Rank tables: the JSON file that tells HCCL which NPU of which server has which rank.

Versions 1.0 (A2, 910, 300I Duo) and 1.2 (A3), as the HCCL user guide describes them. The file comes from anywhere, so
that nothing in it is believed, and nothing raises.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

from ascend_envcheck.messages import Message, say

VERSIONS = ("1.0", "1.2")
LONGEST_ID = 64
"""Characters of a server_id, at most; HCCL user guide, rank table."""

LOWEST_PORT, HIGHEST_PORT = 1024, 65535
_MOST_FAULTS = 20  # of one kind of file fault, the first few tell it all
_TOKEN = re.compile(r"ip[46]-[0-9a-f]{8}")  # what redaction leaves of an address


@dataclass(frozen=True)
class Device:
    """One NPU of a rank table; what is missing or no number is None, or ""."""

    server: str
    device_id: int | None
    rank_id: int | None
    address: str


@dataclass(frozen=True)
class RankTable:
    """What a rank table says, as far as it can be read, and what is wrong with it."""

    devices: tuple[Device, ...] = ()
    servers: tuple[str, ...] = ()
    faults: tuple[Message, ...] = ()


def read(text: str, *, with_addresses: bool = False) -> RankTable:
    """The table in a text; ``with_addresses``: each device must have one, as it must between servers of version 1.0."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        fault = say(
            "it is no JSON ({error}); comments and trailing commas are not allowed",
            "不是合法的 JSON（{error}）；不允许注释和多余的逗号",
            error=str(error)[:200],
        )
        return RankTable(faults=(fault,))
    if not isinstance(table, dict):
        return RankTable(faults=(say("it holds no object", "顶层不是 JSON 对象"),))
    servers = _objects(table.get("server_list"))
    devices = tuple(_device(server, entry) for server in servers for entry in _objects(server.get("device")))
    names = tuple(_text(server.get("server_id")) for server in servers)
    needed = with_addresses or (len(servers) > 1 and table.get("version") == "1.0")  # A3 servers may use HCCS
    faults = [*_head(table, servers), *_server_faults(servers), *_rank_faults(devices)]
    faults += [*_address_faults(devices, needed), *_port_faults(servers), *_super_pods(table, names)]
    return RankTable(devices, names, tuple(dict.fromkeys(faults))[:_MOST_FAULTS])


def is_address(text: str) -> bool:
    """Whether a text is an IP address, or what redaction has left of one."""
    import ipaddress

    if _TOKEN.fullmatch(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _head(table: Mapping[str, Any], servers: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    if table.get("status") != "completed":
        yield say('status is not "completed"', 'status 不是 "completed"')
    if table.get("version") not in VERSIONS:
        yield say(
            'version is {given}, not "1.0" (A2) or "1.2" (A3)',
            'version 为 {given}，应为 "1.0"（A2）或 "1.2"（A3）',
            given=_text(table.get("version")) or "missing",
        )
    if not servers:
        yield say("server_list is missing or empty", "缺少 server_list 或其为空")
    elif "server_count" in table and _number(table["server_count"]) != len(servers):
        yield say(
            "server_count is {given}, server_list has {count}",
            "server_count 为 {given}，但 server_list 有 {count} 个",
            given=_text(table["server_count"]),
            count=len(servers),
        )


def _server_faults(servers: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    names = [_text(server.get("server_id")) for server in servers]
    for name in names:
        if not 0 < len(name) <= LONGEST_ID:
            yield say("a server_id is missing or longer than 64 characters", "存在缺失或超过 64 个字符的 server_id")
    for name in _doubles(names):
        yield say("server_id {name} occurs twice", "server_id {name} 重复", name=name[:LONGEST_ID])
    for server, name in zip(servers, names):
        if not _objects(server.get("device")):
            yield say("server {name} has no device", "服务器 {name} 没有 device", name=name[:LONGEST_ID])


def _rank_faults(devices: Sequence[Device]) -> Iterator[Message]:
    ranks = [device.rank_id for device in devices]
    if None in ranks:
        yield say("a rank_id is missing or no number", "存在缺失或非数字的 rank_id")
    elif sorted(rank for rank in ranks if rank is not None) != list(range(len(ranks))):
        yield say(
            "the rank_ids are not each number from 0 to {last} once",
            "rank_id 不是 0 到 {last} 各出现一次",
            last=len(ranks) - 1,
        )
    elif _interleaved(devices):
        yield say("the rank_ids of a server do not follow each other", "同一服务器的 rank_id 不连续")
    if any(device.device_id is None for device in devices):
        yield say("a device_id is missing or no number", "存在缺失或非数字的 device_id")
    for server, device_id in _doubles([(device.server, device.device_id) for device in devices]):
        yield say(
            "device_id {device} occurs twice on server {server}",
            "服务器 {server} 上 device_id {device} 重复",
            device=device_id,
            server=server[:LONGEST_ID],
        )


def _interleaved(devices: Sequence[Device]) -> bool:
    ranks: dict[str, list[int]] = {}
    for device in devices:
        ranks.setdefault(device.server, []).append(device.rank_id or 0)
    return any(max(of_server) - min(of_server) + 1 != len(of_server) for of_server in ranks.values())


def _address_faults(devices: Sequence[Device], needed: bool) -> Iterator[Message]:
    given = [device.address for device in devices if device.address]
    for address in given:
        if not is_address(address):
            yield say("device_ip {address} is no address", "device_ip {address} 不是合法地址", address=address[:64])
    for address in _doubles(given):
        yield say("device_ip {address} occurs twice", "device_ip {address} 重复", address=address[:64])
    if needed and len(given) < len(devices):
        yield say("a device has no device_ip", "有 device 缺少 device_ip")


def _port_faults(servers: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    for server in servers:
        entries = _objects(server.get("device"))
        for key in ("device_port", "backup_device_port", "host_port"):
            ports = [_number(entry[key]) for entry in entries if key in entry]
            if any(port is None or not LOWEST_PORT <= port <= HIGHEST_PORT for port in ports):
                yield say("a {key} is not between 1024 and 65535", "存在不在 1024 至 65535 之间的 {key}", key=key)
            if key == "host_port" and len(set(ports)) < len(ports):
                yield say("a host_port occurs twice on one server", "同一服务器上 host_port 重复")


def _super_pods(table: Mapping[str, Any], names: Sequence[str]) -> Iterator[Message]:
    pods = _objects(table.get("super_pod_list"))
    if table.get("version") != "1.2" or not pods:
        return
    listed = [_text(server.get("server_id")) for pod in pods for server in _objects(pod.get("server_list"))]
    if sorted(listed) != sorted(names):
        yield say(
            "super_pod_list does not name each server of server_list once",
            "super_pod_list 与 server_list 中的服务器不一致",
        )
    elif listed != list(names):
        yield say(
            "the servers of a super node do not follow each other in server_list",
            "server_list 中同一超节点的服务器没有相邻排列",
        )


def _device(server: Mapping[str, Any], entry: Mapping[str, Any]) -> Device:
    return Device(
        server=_text(server.get("server_id")),
        device_id=_number(entry.get("device_id")),
        rank_id=_number(entry.get("rank_id")),
        address=_text(entry.get("device_ip")),
    )


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) and abs(value) < 10**18 else ""


def _number(value: Any) -> int | None:
    text = _text(value)
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def _doubles(values: Sequence[Any]) -> list[Any]:
    seen: set[Any] = set()
    return list(dict.fromkeys(value for value in values if value in seen or seen.add(value)))  # type: ignore[func-returns-value]
