"""Rules on the NPUs as a whole: their nodes, their number, their kind, and whether the driver answers."""

from __future__ import annotations

import shlex
from typing import Iterable, Mapping

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import joined, say
from ascend_envcheck.npu_smi import chips, codes, names, table
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import MISSING, NOT_RUN, OK, Snapshot
from ascend_envcheck.tables import records

INFO_LINE = "npu-smi info"
MAP_LINE = "npu-smi info -m"
GROUP = "HwHiAiUser"
"""The group that the driver's installer gives the device nodes to."""

_CONTAINER = (
    "docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc "
    "-v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi "
    "-v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64 IMAGE"
)
_DOCS = "Ascend installation guide: device nodes, HwHiAiUser group, container mounts"
_NPU = (NPU,)


def kind(snapshot: Snapshot) -> Mapping[str, str] | None:
    """The row of ``data/soc.csv`` of the first NPU whose name is known, None when none is."""
    seen = table(snapshot.command(INFO_LINE).output)
    listed = snapshot.command(MAP_LINE).output
    physical = seen.physical_ids or "Phy-ID" in listed
    for name in [*(chip.name for chip in seen.chips), *names(listed)]:
        row = _kind_of(name, physical)
        if row is not None:
            return row
    return None


def _kind_of(name: str, physical: bool) -> Mapping[str, str] | None:
    bare = name.replace(" ", "")
    bare = bare[len("Ascend") :] if bare.startswith("Ascend") else bare
    if bare == "910" and physical:  # the A3 calls itself Ascend910; only it has physical ids beside
        bare = "910_93"
    return next((row for row in records("soc") if bare.startswith(row["name"])), None)


def soc(snapshot: Snapshot) -> str | None:
    """The SoC in the spelling of CANN's folders (ascend910b, ascend910_93), None when no NPU tells."""
    row = kind(snapshot)
    return row["soc"] if row else None


def device_nodes(snapshot: Snapshot) -> Iterable[Finding]:
    """DEV-NODES: there is an NPU, and this user may open it."""
    count = npu_count(snapshot)
    denied = sorted(path for path, access in snapshot.devices.items() if access != "rw")
    if count == 0:
        yield _no_npu(snapshot)
    elif denied:
        yield _denied(snapshot, denied)
    elif snapshot.devices and not {"/dev/davinci_manager", "/dev/hisi_hdc"} & set(snapshot.devices):
        yield Finding(
            "DEV-NODES",
            Severity.FAIL,
            say(
                "NPU nodes are here, but neither /dev/davinci_manager nor /dev/hisi_hdc, "
                "without which none can be opened",
                "存在 NPU 设备节点，但既没有 /dev/davinci_manager 也没有 /dev/hisi_hdc，缺少它们则无法打开任何 NPU",
            ),
            command=_CONTAINER,
            source=_DOCS,
            blocks=_NPU,
        )
    else:
        listed = chips(snapshot.command(INFO_LINE).output)
        kinds = ", ".join(sorted({chip.name for chip in listed}))
        cause = say("{count} NPU{s}", "{count} 个 NPU", count=count, s="s" if count > 1 else "")
        if kinds:
            cause = say("{cause} ({kinds})", "{cause}（{kinds}）", cause=cause, kinds=kinds)
        yield Finding("DEV-NODES", Severity.INFO, cause)


def _denied(snapshot: Snapshot, nodes: list[str]) -> Finding:
    values = {"nodes": ", ".join(nodes), "group": GROUP}
    cause = say("this user may not open {nodes}", "当前用户无权打开 {nodes}", **values)
    command = f'sudo usermod -aG {GROUP} "$USER"   # then log in again'
    if snapshot.host.root:
        command = _CONTAINER
    elif GROUP in snapshot.host.groups:
        cause = say(
            "this user may not open {nodes}, though in group {group}: the nodes belong to another group or container",
            "当前用户虽属于 {group} 组，仍无权打开 {nodes}：这些节点属于其他用户组或容器",
            **values,
        )
        command = f"ls -l {shlex.quote(nodes[0])}; id"
    return Finding("DEV-NODES", Severity.FAIL, cause, command=command, source=_DOCS, blocks=_NPU)


def _no_npu(snapshot: Snapshot) -> Finding:
    driver = any(path.endswith("/driver/version.info") for path in snapshot.files)
    if driver or snapshot.command(INFO_LINE).outcome not in (MISSING, NOT_RUN):
        cause = say(
            "{none}: a driver or npu-smi is here, /dev/davinci0 is not; a container must be given the devices",
            "{none}：存在驱动或 npu-smi，但没有 /dev/davinci0；容器启动时须映射设备",
            none=NO_NPU,
        )
        return Finding("DEV-NODES", Severity.WARN, cause, command=_CONTAINER, source=_DOCS, blocks=_NPU)
    return Finding("DEV-NODES", Severity.SKIP, NO_NPU, blocks=_NPU)


def device_count(snapshot: Snapshot) -> Iterable[Finding]:
    """DEV-COUNT: nodes, npu-smi and torch agree on the number of NPUs."""
    nodes = sum(path[len("/dev/davinci") :].isdigit() for path in snapshot.devices if path.startswith("/dev/davinci"))
    listed = len(chips(snapshot.command(INFO_LINE).output))
    chosen = "ASCEND_RT_VISIBLE_DEVICES" in snapshot.variables
    seen = snapshot.imports.device_count if snapshot.imports.device == "npu" and not chosen else 0
    counts = {
        say("device nodes", "设备节点"): nodes,
        say("npu-smi", "npu-smi"): listed,
        say("torch", "torch"): seen,
    }
    told = [
        say("{name}: {count}", "{name}：{count}", name=name, count=count) for name, count in counts.items() if count > 0
    ]
    values = {"counts": joined(told, ", ", "，")}
    if npu_count(snapshot) == 0:
        yield Finding("DEV-COUNT", Severity.SKIP, NO_NPU)
    elif len(told) < 2:
        cause = say("there is nothing to compare with: {counts}", "没有可比较的对象：{counts}", **values)
        yield Finding("DEV-COUNT", Severity.SKIP, cause)
    elif len({count for count in counts.values() if count > 0}) == 1:
        yield Finding("DEV-COUNT", Severity.INFO, say("the counts agree ({counts})", "数量一致（{counts}）", **values))
    else:
        cause = say(
            "the numbers of NPUs differ ({counts}): one has dropped out, or a container was given a part",
            "NPU 数量不一致（{counts}）：有 NPU 掉线，或容器只映射了一部分",
            **values,
        )
        yield Finding(
            "DEV-COUNT", Severity.WARN, cause, command="ls /dev/davinci*; npu-smi info -m", source=_DOCS, doubts=_NPU
        )


def npu_smi(snapshot: Snapshot) -> Iterable[Finding]:
    """NPU-SMI: the driver answers."""
    smi = snapshot.command(INFO_LINE)
    listed = chips(smi.output)
    if npu_count(snapshot) == 0:
        yield Finding("NPU-SMI", Severity.SKIP, NO_NPU)
    elif smi.outcome == OK and listed:
        cause = say("npu-smi lists {count} NPU(s)", "npu-smi 列出 {count} 个 NPU", count=len(listed))
        yield Finding("NPU-SMI", Severity.INFO, cause)
    elif smi.outcome in (MISSING, NOT_RUN):
        reason = smi.detail or say("npu-smi was not run", "未运行 npu-smi")
        yield Finding(
            "NPU-SMI",
            Severity.WARN,
            say("the driver can't be asked: {reason}", "无法询问驱动：{reason}", reason=reason),
            command="docker run -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi -v /usr/local/dcmi:/usr/local/dcmi …",
            source=_DOCS,
        )
    else:
        none = say("it printed no table of NPUs", "它没有打印 NPU 表格")
        yield Finding(
            "NPU-SMI",
            Severity.FAIL,
            say("npu-smi info failed: {why}", "npu-smi info 失败：{why}", why=_why(smi.output) or smi.detail or none),
            command="dmesg | grep -i -E 'davinci|hisi|drv' | tail; cat /usr/local/Ascend/driver/version.info",
            source="dcmi return codes: -8005 driver not loaded or reboot due, -8020 NPU in use by another container",
            blocks=_NPU,
        )


def _why(output: str) -> str:
    """The line with the driver's own code, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    coded = [line for line in lines if "ret is -" in line]
    return (coded or lines[-1:] or [""])[0][:300]


_SHARE_CODES = {
    -8020: (
        say("another container or process holds the NPU (-8020)", "NPU 被其他容器或进程占用（-8020）"),
        "docker ps --format '{{.Names}}'   # on the host: stop the container that was given the same /dev/davinci*",
    ),
    -8005: (
        say(
            "the driver is not loaded, waits for a reboot, or is closed to this container (-8005)",
            "驱动未加载、等待重启，或未对本容器开放（-8005）",
        ),
        "npu-smi info   # on the host; works there: start the container with all manager nodes; fails: reboot",
    ),
}


def share(snapshot: Snapshot) -> Iterable[Finding]:
    """NPU-SHARE: npu-smi does not say that the NPUs are held by others."""
    smi = snapshot.command(INFO_LINE)
    if npu_count(snapshot) == 0:
        yield Finding("NPU-SHARE", Severity.SKIP, NO_NPU)
        return
    held = [_SHARE_CODES[code] for code in codes(smi.output) if code in _SHARE_CODES]
    for cause, command in dict.fromkeys(held):
        source = "dcmi return codes of the driver (dcmi_interface_api.h)"
        yield Finding("NPU-SHARE", Severity.FAIL, cause, command=command, source=source, blocks=_NPU)
    if held:
        return
    if smi.outcome == OK and chips(smi.output):
        free = say("no other container holds the NPUs", "NPU 未被其他容器占用")
        yield Finding("NPU-SHARE", Severity.INFO, free)
    else:
        yield Finding("NPU-SHARE", Severity.SKIP, say("npu-smi gives no table", "npu-smi 没有给出表格"))


def soc_kind(snapshot: Snapshot) -> Iterable[Finding]:
    """NPU-SOC: the kind of NPU is known, and computes in bf16."""
    row = kind(snapshot)
    if npu_count(snapshot) == 0:
        yield Finding("NPU-SOC", Severity.SKIP, NO_NPU)
        return
    if row is None:
        listed = ", ".join(sorted({chip.name for chip in chips(snapshot.command(INFO_LINE).output)}))
        unknown = say("{names} is no name of a known SoC", "{names} 不是已知的 SoC 名称", names=listed)
        unnamed = say("npu-smi names no NPU", "npu-smi 没有给出 NPU 名称")
        yield Finding("NPU-SOC", Severity.SKIP, unknown if listed else unnamed)
        return
    source = f"{row['source']} ({row['confidence']})"
    if row["bf16"] == "no":
        cause = say(
            "{soc} does not compute in bf16, in which both tasks run; 910B and newer do",
            "{soc} 不支持 bf16 计算，而两项任务都使用 bf16；910B 及更新的芯片支持",
            soc=row["soc"],
        )
        command = "npu-smi info -m   # 910B, Ascend910 with Phy-ID (A3) or 950 is needed"
        yield Finding("NPU-SOC", Severity.FAIL, cause, command=command, source=source, blocks=_NPU)
        return
    cause = say("the SoC is {soc}", "SoC 为 {soc}", soc=row["soc"])
    if row["soc"] == "ascend910b":
        cause = say(
            "{cause} (Atlas A2; a 910B3 is no A3)", "{cause}（Atlas A2；910B3 并非 A3）", cause=cause
        )  # fmt: skip
    yield Finding("NPU-SOC", Severity.INFO, cause, source=source)


RULES = (
    Rule(
        "DEV-NODES",
        say("an NPU is here, and this user may open it", "存在 NPU，且当前用户可以打开"),
        device_nodes,
        "driver",
        _NPU,
    ),
    Rule(
        "DEV-COUNT",
        say("device nodes, npu-smi and torch count the same NPUs", "设备节点、npu-smi 与 torch 的 NPU 数量一致"),
        device_count,
        "driver",
    ),
    Rule("NPU-SMI", say("the NPU driver answers", "NPU 驱动有应答"), npu_smi, "driver", _NPU),
    Rule(
        "NPU-SHARE",
        say("no other container holds the NPUs", "NPU 未被其他容器占用"),
        share,
        "driver",
        _NPU,
    ),
    Rule(
        "NPU-SOC",
        say("the kind of NPU is known, and computes in bf16", "NPU 型号已知，且支持 bf16"),
        soc_kind,
        "driver",
        _NPU,
    ),
)
