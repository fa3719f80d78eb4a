"""Rules on the NPU and its driver."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.npu_smi import chips
from ascend_envcheck.rules.rule import NO_NPU, npu_count
from ascend_envcheck.snapshot import MISSING, NOT_RUN, OK, Snapshot

_CONTAINER = (
    "docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc "
    "-v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi "
    "-v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64 IMAGE"
)
_DOCS = "Ascend installation guide: device nodes, HwHiAiUser group, container mounts"


def device_nodes(snapshot: Snapshot) -> Iterable[Finding]:
    """DEV-NODES: there is an NPU, and this user may open it."""
    count = npu_count(snapshot)
    denied = sorted(path for path, access in snapshot.devices.items() if access != "rw")
    if count == 0:
        yield _no_npu(snapshot)
    elif denied:
        yield Finding(
            "DEV-NODES",
            Severity.FAIL,
            f"this user may not open {', '.join(denied)}",
            command='sudo usermod -aG HwHiAiUser "$USER"   # then log in again',
            source=_DOCS,
            blocks=(NPU,),
        )
    elif snapshot.devices and not {"/dev/davinci_manager", "/dev/hisi_hdc"} & set(snapshot.devices):
        yield Finding(
            "DEV-NODES",
            Severity.FAIL,
            "NPU nodes are here, but neither /dev/davinci_manager nor /dev/hisi_hdc, without which none can be opened",
            command=_CONTAINER,
            source=_DOCS,
            blocks=(NPU,),
        )
    else:
        yield Finding("DEV-NODES", Severity.INFO, f"{count} NPU{'s' if count > 1 else ''}{_names(snapshot)}")


def _names(snapshot: Snapshot) -> str:
    names = sorted({chip.name for chip in chips(snapshot.npu_smi.output)})
    return f" ({', '.join(names)})" if names else ""


def _no_npu(snapshot: Snapshot) -> Finding:
    driver = any(path.endswith("/driver/version.info") for path in snapshot.files)
    if driver or snapshot.npu_smi.outcome not in (MISSING, NOT_RUN):
        return Finding(
            "DEV-NODES",
            Severity.WARN,
            f"{NO_NPU}: a driver or npu-smi is here, /dev/davinci0 is not; a container must be given the devices",
            command=_CONTAINER,
            source=_DOCS,
            blocks=(NPU,),
        )
    return Finding("DEV-NODES", Severity.SKIP, NO_NPU, blocks=(NPU,))


def npu_smi(snapshot: Snapshot) -> Iterable[Finding]:
    """NPU-SMI: the driver answers."""
    smi = snapshot.npu_smi
    if npu_count(snapshot) == 0:
        yield Finding("NPU-SMI", Severity.SKIP, NO_NPU)
    elif smi.outcome == OK and chips(smi.output):
        yield Finding("NPU-SMI", Severity.INFO, f"npu-smi lists {len(chips(smi.output))} NPU(s)")
    elif smi.outcome in (MISSING, NOT_RUN):
        yield Finding(
            "NPU-SMI",
            Severity.WARN,
            f"the driver can't be asked: {smi.detail or 'npu-smi was not run'}",
            command="docker run -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi -v /usr/local/dcmi:/usr/local/dcmi …",
            source=_DOCS,
        )
    else:
        yield Finding(
            "NPU-SMI",
            Severity.FAIL,
            f"npu-smi info failed: {_why(smi.output) or smi.detail or 'it printed no table of NPUs'}",
            command="dmesg | grep -i -E 'davinci|hisi|drv' | tail; cat /usr/local/Ascend/driver/version.info",
            source="dcmi return codes: -8005 driver not loaded or reboot due, -8020 NPU in use by another container",
            blocks=(NPU,),
        )


def _why(output: str) -> str:
    """The line with the driver's own code, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    coded = [line for line in lines if "ret is -" in line]
    return (coded or lines[-1:] or [""])[0][:300]
