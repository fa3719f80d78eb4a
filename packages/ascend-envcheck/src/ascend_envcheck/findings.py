"""What the rules say, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum

CPU, CUDA, NPU = "cpu", "cuda", "npu"
EVERY_DEVICE = (CPU, CUDA, NPU)


class Severity(str, Enum):
    """How bad a finding is; most severe first."""

    FAIL = "FAIL"  # will not work
    WARN = "WARN"  # works badly, in part, or is a pair that nobody vouches for
    INFO = "INFO"  # found in order, or worth knowing
    SKIP = "SKIP"  # can't be judged here; the cause says why


@dataclass(frozen=True)
class Finding:
    """One statement of one rule.

    Args:
        id: the id of the rule.
        severity: how bad it is.
        cause: one line: what is, and what should be.
        command: a command to copy; every FAIL has one.
        source: where the knowledge comes from; every FAIL has one.
        blocks: devices on which fine-tuning can't work because of this.
        doubts: devices whose verdict this leaves open (SKIP), or with a reservation (WARN).
    """

    id: str
    severity: Severity
    cause: str
    command: str = ""
    source: str = ""
    blocks: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether the machine can do a task on a kind of device.

    Args:
        task: what is asked for, in words.
        device: cpu, cuda or npu.
        answer: "yes", "no" or "not known".
        reason: why, or with which reservation.
    """

    task: str
    device: str
    answer: str
    reason: str

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.answer == "yes" else f", because {self.reason}"
        return f"this machine can {self.task} on {self.device.upper()}: {self.answer}{why if self.reason else ''}"


@dataclass(frozen=True)
class Report:
    """All findings, most severe first, and the verdicts that follow from them."""

    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    def exit_code(self, *, strict: bool = False) -> int:
        """0 when the machine is fit, 1 when a FAIL was found, or with ``strict`` a WARN."""
        bad = (Severity.FAIL, Severity.WARN) if strict else (Severity.FAIL,)
        return int(any(finding.severity in bad for finding in self.findings))

    def to_json(self) -> str:
        """The report as JSON text, ending in a newline; findings and verdicts in the order of the text form."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=2) + "\n"
