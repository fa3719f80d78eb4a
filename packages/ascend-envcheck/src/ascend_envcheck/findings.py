"""What the rules say, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ascend_envcheck.messages import ENGLISH, joined, say, told

CPU, CUDA, NPU = "cpu", "cuda", "npu"
EVERY_DEVICE = (CPU, CUDA, NPU)

TRAIN, INFER = "train", "infer"
TASKS = (TRAIN, INFER)
PROFILES = (*TASKS, "all")
TASK_NAMES = {
    TRAIN: say("fine-tune Qwen2.5-VL", "微调 Qwen2.5-VL"),
    INFER: say("run Wan2.1", "运行 Wan2.1"),
}

YES, NO, NOT_KNOWN = "yes", "no", "not known"
_ANSWERS = {YES: say("yes", "可以"), NO: say("no", "不可以"), NOT_KNOWN: say("not known", "无法判断")}


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
        cause: one line: what is, and what should be; a `Message` where it has a Chinese form.
        command: a command to copy; every FAIL has one.
        source: where the knowledge comes from; every FAIL has one.
        blocks: devices on which the tasks can't work because of this.
        doubts: devices whose verdict this leaves open (SKIP), or with a reservation (WARN).
        tasks: what it matters for; a rule that speaks of one task only says so once, in its own `tasks`.
    """

    id: str
    severity: Severity
    cause: str
    command: str = ""
    source: str = ""
    blocks: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS


@dataclass(frozen=True)
class Verdict:
    """Whether the machine can do a task on a kind of device.

    Args:
        task: train or infer.
        device: cpu, cuda or npu.
        answer: "yes", "no" or "not known".
        reasons: why, or with which reservations.
    """

    task: str
    device: str
    answer: str
    reasons: tuple[str, ...] = ()

    def sentence(self, language: str = ENGLISH) -> str:
        """The verdict in words."""
        values = {"task": TASK_NAMES[self.task], "device": self.device.upper(), "answer": _ANSWERS[self.answer]}
        start = say("this machine can {task} on {device}: {answer}", "本机能否在 {device} 上{task}：{answer}", **values)
        if not self.reasons:
            return told(start, language)
        template = ("{start} ({why})", "{start}（{why}）") if self.answer == YES else (
            "{start}, because {why}",
            "{start}，原因：{why}",
        )  # fmt: skip
        return told(say(*template, start=start, why=joined(self.reasons)), language)

    def __str__(self) -> str:
        return self.sentence()


@dataclass(frozen=True)
class Report:
    """All findings, most severe first, and the verdicts that follow from them."""

    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    def exit_code(self, *, strict: bool = False) -> int:
        """0 when the machine is fit, 1 when a FAIL was found, or with ``strict`` a WARN."""
        bad = (Severity.FAIL, Severity.WARN) if strict else (Severity.FAIL,)
        return int(any(finding.severity in bad for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, in English; what `ascend-envcheck schema report` describes."""
        return {
            "schema_version": 2,
            "findings": [dict(vars(finding), severity=finding.severity.value) for finding in self.findings],
            "verdicts": [dict(vars(verdict), sentence=str(verdict)) for verdict in self.verdicts],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text, ending in a newline; findings most severe first."""
        import json  # a third of the cost of --help

        return json.dumps(self.to_dict(), indent=2) + "\n"
