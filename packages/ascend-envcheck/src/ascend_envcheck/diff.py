"""What differs between snapshots, by topic; with three and more, which one differs from the majority. Pure.

What differs between two healthy nodes, or between two looks at one, is no difference here: addresses and serial
numbers, process ids, temperatures, memory in use, free disk, the rank of a process.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Mapping, NamedTuple, Sequence

from ascend_envcheck.messages import Message, say
from ascend_envcheck.npu_smi import chips, table
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.snapshot import MISSING, NOT_RUN, UNLIMITED, Snapshot
from ascend_envcheck.versions import pairs

TOPICS: Mapping[str, Message] = {
    "packages": say("Python and its packages", "Python 及其软件包"),
    "import": say("import of torch", "torch 导入"),
    "driver": say("driver and firmware", "驱动与固件"),
    "devices": say("devices", "设备"),
    "cann": say("CANN and NNAL", "CANN 与 NNAL"),
    "variables": say("environment variables", "环境变量"),
    "limits": say("limits", "资源限制"),
    "host": say("host", "主机"),
    "commands": say("answers of commands", "命令输出"),
}
ABSENT = "absent"
_THERE = "there"
_SEEN_BY_FEW = ("import", "limits", "host", "commands")  # where nothing was seen, nothing is known

_TOKEN = re.compile(r"\b(ip4|ip6|mac|id)-[0-9a-f]{8}\b")
_VOLATILE = re.compile(
    r"(?<![a-z])(temp|temperature|power|usage|used|free|util|utilization|voltage|current|freq\w*|process\w*|pid|time\w*|"
    r"date|serial|uuid|die id|counts?|memory)(?![a-z])",
    re.IGNORECASE,
)
_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK_ID", "DEVICE_ID"),
    *("SERVER_ID", "POD_NAME", "POD_IP", "HOST_IP"),
)
_VIRTUAL = re.compile(r"lo$|veth|cali|docker|br-|virbr|flannel|cni|tun|tap")
_GIB = 2**30


class Fact(NamedTuple):
    """What a value is of: a topic, a name in it, and a part of that."""

    topic: str
    name: str
    part: str = ""

    @property
    def title(self) -> str:
        """Name and part."""
        return f"{self.name}: {self.part}" if self.part else self.name


Facts = Dict[Fact, str]


@dataclass(frozen=True)
class Difference:
    """One fact that is not the same in all snapshots.

    Args:
        fact: which one.
        values: of each snapshot, in their order; None where that snapshot can't tell.
        usual: what more than half of those that tell have; None for two snapshots, and where there is no majority.
    """

    fact: Fact
    values: tuple[str | None, ...]
    usual: str | None

    @property
    def odd(self) -> tuple[int, ...]:
        """The places of the snapshots that differ from the majority; none without one."""
        if self.usual is None:
            return ()
        return tuple(place for place, value in enumerate(self.values) if value not in (None, self.usual))


def differences(snapshots: Sequence[Snapshot]) -> tuple[Difference, ...]:
    """Every fact in which the snapshots differ, in the order of `TOPICS`."""
    all_facts = [facts(snapshot) for snapshot in snapshots]
    names = dict.fromkeys(fact for each in all_facts for fact in each)
    ordered = sorted(names, key=lambda fact: (list(TOPICS).index(fact.topic), fact.name, fact.part))
    found = ((fact, tuple(_value(each, fact) for each in all_facts)) for fact in ordered)
    return tuple(Difference(fact, values, _majority(values)) for fact, values in found if len({*values} - {None}) > 1)


def facts(snapshot: Snapshot) -> Facts:
    """All facts of a snapshot that are worth comparing."""
    return {fact: _TOKEN.sub(r"\1", value) for read in _READERS for fact, value in read(snapshot)}


def _value(seen: Facts, fact: Fact) -> str | None:
    if fact in seen:
        return seen[fact]
    whole = fact._replace(part="")
    if (fact.part and whole not in seen) or (fact.topic in _SEEN_BY_FEW and not fact.part):
        return None
    return ABSENT


def _majority(values: Sequence[str | None]) -> str | None:
    known = [value for value in values if value is not None]
    usual, count = Counter(known).most_common(1)[0] if known else ("", 0)
    return usual if len(values) > 2 and 2 * count > len(known) else None


_Found = Iterator["tuple[Fact, str]"]


def _packages(snapshot: Snapshot) -> _Found:
    for name in ("version", "implementation", "system", "machine", "executable", "on_path"):
        yield Fact("packages", f"python {name}"), str(getattr(snapshot.python, name))
    for name, distribution in snapshot.distributions.items():
        yield Fact("packages", name), distribution.version


def _import(snapshot: Snapshot) -> _Found:
    seen = snapshot.imports
    if seen.torch == NOT_RUN:
        return
    for name in ("torch", "torch_npu", "torch_version", "accelerator_api", "cxx11_abi", "device", "device_count"):
        value = getattr(seen, name)
        if value not in (None, ""):
            yield Fact("import", name), str(value)


def _driver(snapshot: Snapshot) -> _Found:
    seen = table(snapshot.command("npu-smi info").output)
    for name, version in (("npu-smi", seen.tool), ("running driver", seen.driver)):
        if version:
            yield Fact("driver", name), version


def _devices(snapshot: Snapshot) -> _Found:
    for path, access in snapshot.devices.items():
        yield Fact("devices", path), access
    for number, chip in enumerate(chips(snapshot.command("npu-smi info").output)):
        yield Fact("devices", f"NPU {number}"), _THERE
        yield Fact("devices", f"NPU {number}", "name"), chip.name
        yield Fact("devices", f"NPU {number}", "health"), chip.health
        if chip.device_memory:
            yield Fact("devices", f"NPU {number}", "memory"), f"{chip.device_memory.total} MB"


def _cann(snapshot: Snapshot) -> _Found:
    version = active_version(snapshot)
    if version is not None:
        yield Fact("cann", "version"), version
    yield Fact("cann", "homes"), ", ".join(snapshot.cann_homes) or ABSENT
    for name, folders in snapshot.libraries.items():
        yield Fact("cann", name), ", ".join(folders)
    for name, load in snapshot.loads.items():
        if load.outcome != NOT_RUN:
            yield Fact("cann", f"loading {name}"), load.outcome


def _files(snapshot: Snapshot) -> _Found:
    for path, text in snapshot.files.items():
        fact = Fact(_topic_of(path), path)
        found = pairs(text)
        yield fact, _THERE if found else " ".join(text.split())
        for key, value in found.items():
            if not _VOLATILE.search(key):
                yield fact._replace(part=key), value
    for path, target in snapshot.paths.items():
        yield Fact(_topic_of(path), path), _THERE
        yield Fact(_topic_of(path), path, "is"), target
    for path, names in snapshot.folders.items():
        fact = Fact(_topic_of(path), path + "/")
        yield fact, _THERE
        for name in names:
            yield fact._replace(part=name), _THERE


def _topic_of(path: str) -> str:
    if re.search(r"driver|firmware|ascend_install|dcmi|npu-smi", path):
        return "driver"
    if path.startswith("/dev/"):
        return "devices"
    if re.search(r"site-packages|megatron|mindspeed|ffmpeg", path, re.IGNORECASE):
        return "packages"
    return "cann" if re.search(r"cann|ascend|nnal|atb|opp", path, re.IGNORECASE) else "host"


def _variables(snapshot: Snapshot) -> _Found:
    for name, value in snapshot.variables.items():
        if name not in _RANKS:
            yield Fact("variables", name), value


def _limits(snapshot: Snapshot) -> _Found:
    for name, limit in snapshot.host.limits.items():
        yield Fact("limits", name), "unlimited" if limit == UNLIMITED else str(limit)


def _host(snapshot: Snapshot) -> _Found:
    host = snapshot.host
    for name in ("os_name", "libc", "kernel", "container", "root", "cpus", "governor", "huge_pages", "reserved_ports"):
        value = getattr(host, name)
        if value not in (None, "") or (name in ("container", "reserved_ports") and host.live):
            yield Fact("host", name), str(value) or "none"
    if host.groups:
        yield Fact("host", "groups"), ", ".join(sorted(host.groups))
    if "MemTotal" in host.memory:  # machines of one model differ by a few MiB
        yield Fact("host", "memory"), f"{round(host.memory['MemTotal'] * 1024 / _GIB)} GiB"
    if "HugePages_Total" in host.memory:
        yield Fact("host", "HugePages_Total"), str(host.memory["HugePages_Total"])
    for purpose, disk in host.disks.items():
        yield Fact("host", f"disk of {purpose}"), f"{disk.total / _GIB:.1f} GiB"
    for name, state in host.interfaces.items():
        if not _VIRTUAL.match(name):
            yield Fact("host", "interfaces"), _THERE
            yield Fact("host", "interfaces", name), state


def _commands(snapshot: Snapshot) -> _Found:
    for line, answer in snapshot.commands.items():
        if answer.outcome == NOT_RUN:
            continue
        yield Fact("commands", line), answer.outcome
        if answer.outcome == MISSING or line == "npu-smi info":  # its table is read above
            continue
        for key, values in _all_pairs(answer.output).items():
            if not _VOLATILE.search(key):
                yield Fact("commands", line, key), ", ".join(values)


def _all_pairs(text: str) -> dict[str, list[str]]:
    """The ``key : value`` lines of an output, which may have a block for each NPU."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        for key, value in pairs(line).items():
            found.setdefault(key, []).append(value)
    return found


_READERS: Sequence[Callable[[Snapshot], _Found]] = (
    _packages,
    _import,
    _driver,
    _devices,
    _cann,
    _files,
    _variables,
    _limits,
    _host,
    _commands,
)
