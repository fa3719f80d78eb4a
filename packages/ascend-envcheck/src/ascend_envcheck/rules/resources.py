"""Rules on what the machine has to give: memory, disks, limits, ports.

Most are heuristics, so they warn and decide no verdict. All but the disks matter only where there is an NPU.
"""

from __future__ import annotations

import re
import shlex
from typing import Iterable, Mapping

from ascend_envcheck.findings import CUDA, EVERY_DEVICE, NPU, TRAIN, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.npu_smi import table
from ascend_envcheck.rules.host import UNKNOWN, skip, unseen_host
from ascend_envcheck.rules.npu import INFO_LINE, soc
from ascend_envcheck.rules.rule import NO_NPU, NOT_LIVE, Rule, npu_count
from ascend_envcheck.snapshot import UNLIMITED, DiskFacts, Snapshot

GIB = 1024**3

GIB_PER_CARD = 64
"""A rule of thumb: weights, optimizer states and data workers of one card pass through host memory."""
LOW_DISK, LOW_DISK_SHARE, AMPLE_DISK = 50 * GIB, 0.10, 500 * GIB
"""A checkpoint with optimizer states takes tens of GiB; a share is of no account where much is free all the same."""
LEAST_SHM, GOOD_SHM = 1 * GIB, 16 * GIB
"""Data workers and HCCL pass tensors through /dev/shm; docker's own size is 64 MiB."""
NEEDED_LIMITS = {"nofile": 65535, "memlock": UNLIMITED, "nproc": 32768}
"""CANN installation guide (nofile); HCCL registers memory with RDMA (memlock); rule of thumb (nproc)."""
HCCL_PORT, HCCL_PORTS = 60000, 32
"""HCCL listens on 60000 to 60031, or as many from HCCL_IF_BASE_PORT on."""

_MOST_RANGES = 256
"""Of ports; a text with more is no such list."""
_NPU = (NPU,)
_DF = "rule of thumb: 50 GiB and a tenth of the disk, for checkpoints, ~/ascend/log and kernel_meta"
_LIMITS_GUIDE = "CANN installation guide; HCCL environment variables"
_ULIMIT = {"nofile": "-n", "memlock": "-l", "nproc": "-u"}


def memory(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-MEM: enough for the cards that are to be fed."""
    seen = snapshot.host.memory
    available = min((seen[name] for name in ("MemAvailable", "CgroupLimit") if name in seen), default=0)
    unseen = unseen_host("HOST-MEM", snapshot, available)
    if unseen is not None:
        yield unseen
        return
    cards = len({chip.npu for chip in table(snapshot.command(INFO_LINE).output).chips}) or npu_count(snapshot)
    values = {"have": f"{available / 1024**2:.0f}", "cards": cards, "need": cards * GIB_PER_CARD}
    if available >= cards * GIB_PER_CARD * 1024**2:
        cause = say("{have} GiB of memory for {cards} card(s)", "可用内存 {have} GiB，共 {cards} 张卡", **values)
        yield Finding("HOST-MEM", Severity.INFO, cause)
    else:
        cause = say(
            "{have} GiB of memory for {cards} card(s), {need} would do: loading and saving may run out",
            "可用内存 {have} GiB，共 {cards} 张卡，宜有 {need} GiB：加载与保存时可能内存不足",
            **values,
        )
        yield Finding("HOST-MEM", Severity.WARN, cause, command="free -g", source="rule of thumb: 64 GiB a card")


def disk(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-DISK: room for checkpoints, logs and kernel caches."""
    disks = {name: one for name, one in snapshot.host.disks.items() if name != "shm"}
    silent = sorted(name for name, one in disks.items() if one.total <= 0)
    sized = {name: one for name, one in disks.items() if one.total > 0}
    full = {name: one for name, one in sized.items() if one.free <= 0 or one.free_inodes == 0}
    low = {name: one for name, one in sized.items() if name not in full and _is_low(one)}
    if full:
        cause = say("nothing can be written any more: {disks}", "已无法写入：{disks}", disks=_told(full))
        command = "df -h ~ . /tmp; df -i ~ . /tmp; du -sh ~/ascend/log kernel_meta"
        source = "POSIX statvfs: no free blocks or inodes"
        yield Finding("HOST-DISK", Severity.FAIL, cause, command=command, source=source, blocks=EVERY_DEVICE)
    if silent:
        cause = say(
            "the file system of {names} did not answer; a network disk that is gone?",
            "{names} 所在文件系统没有应答，网络盘是否已断开？",
            names=", ".join(silent),
        )
        yield Finding("HOST-DISK", Severity.WARN, cause, command="mount | grep -E 'nfs|lustre|ceph|fuse'", source=_DF)
    if low and npu_count(snapshot):
        cause = say("little room is left: {disks}", "剩余空间较少：{disks}", disks=_told(low))
        command = "df -h ~ . /tmp; du -sh ~/ascend/log kernel_meta"
        yield Finding("HOST-DISK", Severity.WARN, cause, command=command, source=_DF)
    if not sized and not silent:
        yield skip("HOST-DISK", UNKNOWN if snapshot.host.live else NOT_LIVE)
    elif not full and not silent and not (low and npu_count(snapshot)):
        yield Finding("HOST-DISK", Severity.INFO, say("room: {disks}", "剩余空间：{disks}", disks=_told(sized)))


def _is_low(one: DiskFacts) -> bool:
    return one.free < LOW_DISK or (one.free < LOW_DISK_SHARE * one.total and one.free < AMPLE_DISK)


def _told(disks: Mapping[str, DiskFacts]) -> Message:
    """Folders on one file system are named together."""
    together: dict[tuple[int, int], list[str]] = {}
    inodes: set[tuple[int, int]] = set()
    for name, one in sorted(disks.items()):
        together.setdefault((one.total, one.free), []).append(name)
        if one.free_inodes == 0:
            inodes.add((one.total, one.free))
    return joined(
        (
            say(
                "{names} has {free:.1f} GiB of {total:.1f} free{inodes}",
                "{names} 剩余 {free:.1f} GiB，共 {total:.1f} GiB{inodes}",
                names="/".join(names),
                free=size[1] / GIB,
                total=size[0] / GIB,
                inodes=say(" and no inode", "，且无可用 inode") if size in inodes else "",
            )
            for size, names in together.items()
        ),
        ", ",
        "，",
    )


def shared_memory(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-SHM: enough shared memory for data workers."""
    shm = snapshot.host.disks.get("shm")
    if npu_count(snapshot) == 0 and snapshot.imports.device != CUDA:
        yield skip("HOST-SHM", NO_NPU)
    elif shm is None or shm.total <= 0:
        yield skip("HOST-SHM", UNKNOWN if snapshot.host.live else NOT_LIVE)
    else:
        enough, values = shm.total >= GOOD_SHM, {"size": f"{shm.total / GIB:.1f}"}
        cause = say("/dev/shm has {size} GiB", "/dev/shm 为 {size} GiB", **values)
        if enough:
            yield Finding("HOST-SHM", Severity.INFO, cause)
            return
        worse = shm.total < LEAST_SHM
        hint = say(
            "{cause}: data workers end with a bus error", "{cause}：数据加载进程会因总线错误退出", cause=cause
        ) if worse else say("{cause}; 16 would do", "{cause}；宜有 16 GiB", cause=cause)  # fmt: skip
        yield Finding(
            "HOST-SHM",
            Severity.FAIL if worse else Severity.WARN,
            hint,
            command="docker run --ipc=host …   # or --shm-size=16g; else: sudo mount -o remount,size=16g /dev/shm",
            source="PyTorch documentation: data workers share tensors through /dev/shm; docker's default is 64 MiB",
            blocks=(NPU, CUDA) if worse else (),
        )


def limits(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-ULIMIT: the limits of this shell are those that HCCL and data workers need."""
    seen = snapshot.host.limits
    unseen = unseen_host("HOST-ULIMIT", snapshot, seen)
    if unseen is not None:
        yield unseen
        return
    low = [name for name, need in NEEDED_LIMITS.items() if name in seen and _is_below(seen[name], need)]
    for name in low:
        need = "unlimited" if NEEDED_LIMITS[name] == UNLIMITED else str(NEEDED_LIMITS[name])
        cause = say(
            "the limit {name} is {have}, should be {need}",
            "资源限制 {name} 为 {have}，应为 {need}",
            name=name,
            have=seen[name],
            need=need,
        )
        command = f"ulimit {_ULIMIT[name]} {need}   # lasting: /etc/security/limits.conf; docker run --ulimit {name}=…"
        yield Finding("HOST-ULIMIT", Severity.WARN, cause, command=command, source=_LIMITS_GUIDE)
    if seen.get("core") == 0:
        cause = say("core dumps are off: a crash leaves no trace", "未开启 core dump：进程崩溃不会留下现场")
        yield Finding("HOST-ULIMIT", Severity.INFO, cause, command="ulimit -c unlimited")
    elif not low:
        yield Finding("HOST-ULIMIT", Severity.INFO, say("the limits are high enough", "资源限制足够"))


def _is_below(given: int, need: int) -> bool:
    return given != UNLIMITED and (need == UNLIMITED or given < need)


def huge_pages(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-HUGE: transparent huge pages are on, and a 310P has hugepages left."""
    choice, free = snapshot.host.huge_pages, snapshot.host.memory.get("HugePages_Free")
    unseen = unseen_host("HOST-HUGE", snapshot, choice or free is not None)
    chips = table(snapshot.command(INFO_LINE).output).chips
    if unseen is not None:
        yield unseen
    elif soc(snapshot) == "ascend310p" and free == 0 and any(chip.hugepages and chip.hugepages.full for chip in chips):
        cause = say("no hugepage is free, and the NPU uses all it has", "没有空闲大页，且 NPU 的大页已用满")
        command = "grep -i hugepages /proc/meminfo; sudo sysctl -w vm.nr_hugepages=16384"
        yield Finding("HOST-HUGE", Severity.WARN, cause, command=command, source="310P: model memory in hugepages")
    elif choice not in ("", "always"):
        cause = say(
            "transparent huge pages are {choice}; always makes host memory faster",
            "透明大页为 {choice}；设为 always 可加快主机内存访问",
            choice=choice,
        )
        command = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("HOST-HUGE", Severity.INFO, cause, command=command)
    else:
        yield Finding("HOST-HUGE", Severity.INFO, say("huge pages are in order", "大页设置正常"))


def ports(snapshot: Snapshot) -> Iterable[Finding]:
    """HOST-PORTS: the ports of HCCL are kept free."""
    reserved = _port_set(snapshot.host.reserved_ports)
    wanted = _hccl_ports(snapshot.variables)
    unseen = unseen_host("HOST-PORTS", snapshot, snapshot.host.live or reserved)
    if unseen is not None:
        yield unseen
        return
    if not wanted:
        cause = say(
            "HCCL takes free ports (HCCL_HOST_SOCKET_PORT_RANGE)",
            "HCCL 自动选择空闲端口（HCCL_HOST_SOCKET_PORT_RANGE）",
        )
        yield Finding("HOST-PORTS", Severity.INFO, cause)
        return
    taken = sorted(wanted & set(snapshot.host.listening))
    span = f"{min(wanted)}-{max(wanted)}"
    if taken:
        yield _taken(taken, span, several=npu_count(snapshot) > 1)
    elif wanted <= reserved:
        cause = say("HCCL's ports {span} are reserved", "HCCL 的端口 {span} 已保留", span=span)
        yield Finding("HOST-PORTS", Severity.INFO, cause)
    else:
        cause = say(
            "HCCL's ports {span} are not reserved: any program may take one by chance",
            "HCCL 的端口 {span} 未保留：可能被其他程序偶然占用",
            span=span,
        )
        both = ",".join(part for part in (snapshot.host.reserved_ports, span) if part)
        command = f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={shlex.quote(both)}"
        source = "HCCL environment variables: HCCL_IF_BASE_PORT"
        yield Finding("HOST-PORTS", Severity.WARN, cause, command=command, source=source)


def _taken(ports_taken: list[int], span: str, *, several: bool) -> Finding:
    """A single NPU talks to no other, so that the ports matter little to it."""
    cause = say(
        "another program listens on HCCL's ports ({ports} of {span}): a training job that still runs?",
        "HCCL 的端口已被其他程序监听（{span} 中的 {ports}）：是否有训练任务仍在运行？",
        ports=", ".join(map(str, ports_taken)),
        span=span,
    )
    first, last = ports_taken[0], ports_taken[-1]
    return Finding(
        "HOST-PORTS",
        Severity.FAIL if several else Severity.WARN,
        cause,
        command=f"ss -ltnp 'sport >= :{first} and sport <= :{last}'   # end it, or choose another HCCL_IF_BASE_PORT",
        source="HCCL environment variables: HCCL_IF_BASE_PORT",
        blocks=_NPU if several else (),
    )


def _hccl_ports(variables: Mapping[str, str]) -> set[int]:
    chosen = variables.get("HCCL_HOST_SOCKET_PORT_RANGE", "").strip()
    if chosen:
        return _port_set(chosen)  # of "auto" there are none
    base = variables.get("HCCL_IF_BASE_PORT", "").strip()
    first = int(base) if re.fullmatch(r"[0-9]{1,5}", base) else HCCL_PORT
    return set(range(first, first + HCCL_PORTS))


def _port_set(text: str) -> set[int]:
    """Of the kernel's and HCCL's spelling: ``60000-60031,16666``."""
    found = re.findall(r"(?<!\d)(\d{1,5})(?:\s*-\s*(\d{1,5}))?(?!\d)", text, re.ASCII)[:_MOST_RANGES]
    return {port for first, last in found for port in range(int(first), int(last or first) + 1)}


RULES = (
    Rule("HOST-MEM", say("memory for the cards of this machine", "主机内存与卡数相称"), memory, "host", (), (TRAIN,)),
    Rule("HOST-DISK", say("room on the disks", "磁盘空间充足"), disk, "host", EVERY_DEVICE),
    Rule(
        "HOST-SHM",
        say("shared memory for data workers", "共享内存满足数据加载进程的需要"),
        shared_memory,
        "host",
        (NPU, CUDA),
        (TRAIN,),
    ),
    Rule("HOST-ULIMIT", say("limits high enough for HCCL", "资源限制满足 HCCL 的需要"), limits, "host"),
    Rule("HOST-HUGE", say("huge pages are on", "大页已启用"), huge_pages, "host"),
    Rule("HOST-PORTS", say("HCCL's ports are free and reserved", "HCCL 的端口空闲且已保留"), ports, "host"),
)
