"""What a rule is, and the questions that many rules ask a snapshot."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Callable, Iterable

from ascend_envcheck.findings import TASKS, Finding
from ascend_envcheck.messages import say
from ascend_envcheck.npu_smi import chips
from ascend_envcheck.snapshot import Snapshot

GROUPS = {
    "tool": say("this tool", "本工具"),
    "host": say("host", "主机"),
    "driver": say("driver, firmware, devices", "驱动、固件、设备"),
    "cann": say("CANN and NNAL", "CANN 与 NNAL"),
    "python": say("Python and its packages", "Python 及其软件包"),
    "variables": say("environment variables", "环境变量"),
    "network": say("network and processes", "网络与进程"),
    "other": say("rules of others", "第三方规则"),
}


@dataclass(frozen=True)
class Rule:
    """One check.

    Args:
        id: stable name, upper case.
        title: what is in order when the rule is content, in one line.
        judge: reads a snapshot, never the machine; must not raise on any snapshot.
        group: a key of `GROUPS`.
        devices: devices whose verdict is not known when the rule was not run.
        tasks: what it matters for.
        needs_import: whether it reads the outcome of importing torch.
    """

    id: str
    title: str
    judge: Callable[[Snapshot], Iterable[Finding]]
    group: str = "other"
    devices: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    needs_import: bool = False


NO_NPU = say("no NPU was found", "没有找到 NPU")
NOT_LIVE = say("read from a copy of a machine's files, which does not tell", "读取的是机器文件的副本，无法得知")


def npu_count(snapshot: Snapshot) -> int:
    """How many NPUs the machine shows: as device nodes, else in npu-smi's table, else to torch."""
    nodes = [
        path for path in snapshot.devices if path.startswith("/dev/davinci") and path[len("/dev/davinci") :].isdigit()
    ]
    seen = snapshot.imports.device_count if snapshot.imports.device == "npu" else 0
    return len(nodes) or len(chips(snapshot.command("npu-smi info").output)) or max(seen, 0)


def source_command(script: str) -> str:
    """``source SCRIPT``, quoted."""
    return "source " + quoted_path(script)


def quoted_path(path: str) -> str:
    """A path as a word of a shell; a leading ``~/`` stays outside the quotes, where the shell expands it."""
    return "~/" + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)
