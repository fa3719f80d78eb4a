"""The machine around the interpreter: its files always, what only a running kernel knows when it is this machine."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Iterable, Mapping

from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import CommandFacts, DiskFacts, HostFacts

DISK_SECONDS = 2.0
"""A healthy network disk answers in milliseconds; a dead one never does."""

LIMITS = {"nofile": "RLIMIT_NOFILE", "memlock": "RLIMIT_MEMLOCK", "nproc": "RLIMIT_NPROC", "core": "RLIMIT_CORE"}
MEMORY_LIMIT = "CgroupLimit"
"""Beside the names of /proc/meminfo: what the container may use, in kB."""

CLOCKS = (("chronyc", "tracking"), ("timedatectl",))
_CLOCK_LINES = ("system time", "leap status", "last offset", "system clock synchronized", "ntp synchronized")
"""All else that the two print, as the name of the time server, is nobody's business."""

_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 where there is none
_LISTENING = "0A"  # state of a socket in /proc/net/tcp
_LOG = "ascend/log"


def look(place: Place) -> Facts:
    """What a few files tell, and on the machine itself its kernel, limits, memory, disks, ports and clock."""
    tree = place.tree
    seen = HostFacts(live=place.live, os_name=_os_name(tree), container=_container(tree, place.environ, place.live))
    if not place.live:
        return {"host": seen}
    seen = replace(
        seen,
        libc=_libc(tree),
        kernel=os.uname().release,
        root=os.geteuid() == 0,
        groups=_groups(tree),
        cpus=_cpus(),
        governor=_line(tree, "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory=_memory(tree),
        huge_pages=_selected(_line(tree, "/sys/kernel/mm/transparent_hugepage/enabled")),
        limits=_limits(),
        disks=_disks(tree, _folders(tree, place.environ)),
        reserved_ports=_line(tree, "/proc/sys/net/ipv4/ip_local_reserved_ports"),
        listening=_listening(tree),
        interfaces={name: _state(tree, name) for name in tree.names("/sys/class/net")},
    )
    clocks = [line for line in CLOCKS if place.find(line[0])]
    return {"host": seen, "commands": {line: _of_clock(answer) for line, answer in place.run_all(clocks).items()}}


def _os_name(tree: Tree) -> str:
    text = next((text for text in map(tree.text, _OS_RELEASE) if text), "")
    found = dict(re.findall(r'^(PRETTY_NAME|NAME)="?([^"\n]*)"?', text, re.MULTILINE))
    return str(found.get("PRETTY_NAME") or found.get("NAME") or "").strip()


def _container(tree: Tree, environ: Mapping[str, str], live: bool) -> str:
    """Which kind of container this is in, "" for none: by the files that runtimes leave, then by the control group."""
    if "KUBERNETES_SERVICE_HOST" in environ or tree.resolve("/var/run/secrets/kubernetes.io"):
        return "kubernetes"
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if tree.resolve(path):
            return kind
    groups = (tree.text("/proc/1/cgroup") or "") if live else ""
    found = re.search(r"kubepods|docker|containerd|lxc", groups)
    return {"kubepods": "kubernetes"}.get(found[0], found[0]) if found else environ.get("container", "")


def _libc(tree: Tree) -> str:
    try:
        named = os.confstr("CS_GNU_LIBC_VERSION")
    except (OSError, ValueError):
        named = None
    if named:
        return named
    return "musl" if any(name.startswith("ld-musl") for name in tree.names("/lib")) else ""


def _groups(tree: Tree) -> tuple[str, ...]:
    """By /etc/group alone: a directory service may not answer; a group that is not there stays a number."""
    lines = [line.split(":") for line in (tree.text("/etc/group") or "").splitlines()]
    named = {parts[2]: parts[0] for parts in lines if len(parts) > 2}
    return tuple(sorted({named.get(str(number), str(number)) for number in [*os.getgroups(), os.getegid()]}))


def _cpus() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count()


def _line(tree: Tree, path: str) -> str:
    return (tree.text(path) or "").strip()


def _selected(choice: str) -> str:
    """The word in brackets: madvise of ``always [madvise] never``."""
    found = re.search(r"\[(\w+)\]", choice)
    return found[1] if found else ""


def _memory(tree: Tree) -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d{1,15})", tree.text("/proc/meminfo") or "", re.MULTILINE)
    memory = {name: int(value) for name, value in found if name.startswith(("Mem", "Swap", "HugePages", "Hugepage"))}
    for path in _CGROUPS:
        limit = _line(tree, path)
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            memory[MEMORY_LIMIT] = int(limit) // 1024
    return memory


def _limits() -> dict[str, int]:
    import resource

    return {name: resource.getrlimit(getattr(resource, constant))[0] for name, constant in LIMITS.items()}


def _folders(tree: Tree, environ: Mapping[str, str]) -> dict[str, str]:
    """The folders that fill up, by what they are for."""
    home = environ.get("HOME", "")
    try:
        here = str(Path.cwd())
    except OSError:
        here = ""
    logs = environ.get("ASCEND_PROCESS_LOG_PATH", "") or f"{home}/{_LOG}"
    wanted = {"home": home, "cwd": here, "tmp": environ.get("TMPDIR", "") or "/tmp", "shm": "/dev/shm", "log": logs}
    return {name: path for name, path in wanted.items() if path.startswith("/")}


def _disks(tree: Tree, folders: Mapping[str, str]) -> dict[str, DiskFacts]:
    """The file systems of folders. One that does not answer in time has no size; one that is not there is left out."""
    found: dict[str, DiskFacts | None] = {}

    def ask(name: str, path: str) -> None:
        found[name] = _disk(tree, path)

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in folders.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + DISK_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    answers = dict(found)
    disks = {name: answers.get(name, DiskFacts()) for name in folders}
    return {name: disk for name, disk in disks.items() if disk is not None}


def _disk(tree: Tree, path: str) -> DiskFacts | None:
    try:
        seen = os.statvfs(tree.real(path))
    except (OSError, ValueError):
        return None
    inodes = seen.f_favail if seen.f_files else None
    return DiskFacts(seen.f_blocks * seen.f_frsize, seen.f_bavail * seen.f_frsize, inodes) if seen.f_blocks else None


def _listening(tree: Tree) -> tuple[int, ...]:
    """TCP ports; the kernel prints listening sockets before all others, so the head of the file will do."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in (tree.text(f"/proc/net/{name}") or "").splitlines()]
    return tuple(sorted({port for row in rows for port in _port(row)}))


def _port(row: list[str]) -> Iterable[int]:
    if len(row) > 3 and row[3] == _LISTENING and re.fullmatch(r"[0-9A-F]+:[0-9A-F]{4}", row[1]):
        yield int(row[1].rpartition(":")[2], 16)


def _state(tree: Tree, name: str) -> str:
    return _line(tree, f"/sys/class/net/{name}/operstate") or "unknown"


def _of_clock(answer: CommandFacts) -> CommandFacts:
    lines = [line.strip() for line in answer.output.splitlines()]
    return replace(answer, output="\n".join(line for line in lines if line.lower().startswith(_CLOCK_LINES)))
