"""What a rule is, and the questions that many rules ask a snapshot."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Callable, Iterable

from ascend_envcheck.findings import Finding
from ascend_envcheck.npu_smi import chips
from ascend_envcheck.snapshot import Snapshot


@dataclass(frozen=True)
class Rule:
    """One check.

    Args:
        id: stable name, upper case.
        title: what is in order when the rule is content, in one line.
        judge: reads a snapshot, never the machine; must not raise on any snapshot.
        devices: devices whose verdict is not known when the rule was not run.
        needs_import: whether it reads the outcome of importing torch.
    """

    id: str
    title: str
    judge: Callable[[Snapshot], Iterable[Finding]]
    devices: tuple[str, ...] = ()
    needs_import: bool = False


NO_NPU = "no NPU was found"


def npu_count(snapshot: Snapshot) -> int:
    """How many NPUs the machine shows: as device nodes, else in npu-smi's table, else to torch."""
    nodes = [
        path for path in snapshot.devices if path.startswith("/dev/davinci") and path[len("/dev/davinci") :].isdigit()
    ]
    seen = snapshot.imports.device_count if snapshot.imports.device == "npu" else 0
    return len(nodes) or len(chips(snapshot.npu_smi.output)) or max(seen, 0)


def source_command(script: str) -> str:
    """``source SCRIPT``, quoted; a leading ``~/`` stays outside the quotes, where the shell expands it."""
    if script.startswith("~/"):
        return "source ~/" + shlex.quote(script[2:])
    return "source " + shlex.quote(script)
