"""Rules on each NPU: its health, memory, temperature and processes."""

from __future__ import annotations

import re
from typing import Callable, Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.npu_smi import Chip, counts, table, values
from ascend_envcheck.rules.npu import INFO_LINE, soc
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import Snapshot

MOST_USED_SHARE, IDLE_MB = 0.20, 4096
"""The driver itself holds 2.8 to 3.5 GB of a 910B or A3, and tens of MB of a 950: less than 4 GiB is idle."""
HOT_CELSIUS = 80.0
"""A rule of thumb; the chip slows down at about 100."""

_NPU = (NPU,)
_HEALTH_LINE, _ECC_LINE = "npu-smi info -t health -i ", "npu-smi info -t ecc -i "
_REFERENCE = "npu-smi command reference"
_RULE_OF_THUMB = "rule of thumb; npu-smi command reference"
_BAD = ("Alarm", "Critical")

Judge = Callable[[Snapshot], Iterable[Finding]]


def _of_chips(rule: str, judge: Callable[[Snapshot, tuple[Chip, ...]], Iterable[Finding]]) -> Judge:
    """A judge of the chips in npu-smi's table; without them it says why nothing can be said."""

    def judged(snapshot: Snapshot) -> Iterable[Finding]:
        chips = table(snapshot.command(INFO_LINE).output).chips
        if npu_count(snapshot) == 0:
            return [Finding(rule, Severity.SKIP, NO_NPU)]
        if not chips:
            return [Finding(rule, Severity.SKIP, say("npu-smi gives no table", "npu-smi 没有给出表格"))]
        return judge(snapshot, chips)

    return judged


def _chosen(snapshot: Snapshot, chips: tuple[Chip, ...]) -> tuple[Chip, ...]:
    """The chips that ASCEND_RT_VISIBLE_DEVICES leaves to the task; its numbers are places in the table."""
    text = snapshot.variables.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None or not re.fullmatch(r"\s*\d{1,4}\s*(,\s*\d{1,4}\s*)*", text, re.ASCII):
        return chips
    places = {int(place) for place in text.split(",")}
    return tuple(chip for place, chip in enumerate(chips) if place in places)


def _labels(chips: Iterable[Chip]) -> str:
    return ", ".join(chip.label for chip in chips)


def _health(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-HEALTH: every chip is well."""
    chosen = _chosen(snapshot, chips)
    ill = [chip for chip in chips if chip.health != "OK"]
    for chip in ill:
        fatal = chip.health in _BAD and chip in chosen
        cause = say(
            "NPU {label} is in state {health}{codes}",
            "NPU {label} 的状态为 {health}{codes}",
            label=chip.label,
            health=chip.health,
            codes=_error_codes(snapshot, chip),
        )
        if fatal and len(chips) > 1:
            hint = say("{cause}; the others can do without it", "{cause}；可不使用它，仅用其余 NPU", cause=cause)
            cause = hint if any(other.health == "OK" for other in chosen) else cause
        yield Finding(
            "NPU-HEALTH",
            Severity.FAIL if fatal else Severity.WARN,
            cause,
            command=_without(chips, ill) if fatal else f"{_HEALTH_LINE}{chip.npu}",
            source=_REFERENCE,
            blocks=_NPU if fatal else (),
            doubts=_NPU if chip in chosen and not fatal else (),
        )
    if not ill:
        cause = say("all {count} NPU(s) are OK", "{count} 个 NPU 均为 OK", count=len(chips))
        yield Finding("NPU-HEALTH", Severity.INFO, cause)


def _without(chips: tuple[Chip, ...], ill: Iterable[Chip]) -> str:
    """How to look closer, and how to leave the ill ones out."""
    first, *_ = ill
    well = [str(place) for place, chip in enumerate(chips) if chip.health == "OK"]
    ask = f"{_HEALTH_LINE}{first.npu}"
    return f"{ask}; export ASCEND_RT_VISIBLE_DEVICES={','.join(well)}" if well else ask


def _error_codes(snapshot: Snapshot, chip: Chip) -> Message:
    output = snapshot.command(f"{_HEALTH_LINE}{chip.npu}").output
    codes = ", ".join(dict.fromkeys(values(output, "Error Code")))
    return say(", error code {codes}", "，错误码 {codes}", codes=codes) if codes else say("", "")


def _memory(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-HBM: the memory is free before a task starts."""
    known = [(chip, usage) for chip in chips for usage in (chip.device_memory,) if usage and usage.total]
    busy = [(chip, usage) for chip, usage in known if usage.used > max(IDLE_MB, MOST_USED_SHARE * usage.total)]
    if busy:
        told = joined(
            (
                say(
                    "NPU {label} {used} of {total} MB",
                    "NPU {label} 已用 {used} MB，共 {total} MB",
                    label=chip.label,
                    used=usage.used,
                    total=usage.total,
                )
                for chip, usage in busy
            ),
            ", ",
            "，",
        )
        cause = say("memory is in use before a task starts: {told}", "任务开始前显存已被占用：{told}", told=told)
        yield Finding("NPU-HBM", Severity.WARN, cause, command="npu-smi info   # its processes", source=_RULE_OF_THUMB)
    elif known:
        totals = ", ".join(sorted({str(usage.total) for _, usage in known}))
        cause = say("memory is free ({totals} MB each)", "显存空闲（每个 {totals} MB）", totals=totals)
        yield Finding("NPU-HBM", Severity.INFO, cause)
    else:
        yield Finding("NPU-HBM", Severity.SKIP, say("npu-smi prints no memory", "npu-smi 没有给出显存"))


def _hugepages(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-HUGEPAGES: a 310P, whose models live in hugepages, has some left."""
    full = [chip for chip in chips if chip.hugepages and chip.hugepages.full]
    if soc(snapshot) != "ascend310p":
        cause = say("only a 310P keeps models in hugepages", "仅 310P 使用大页存放模型")
        yield Finding("NPU-HUGEPAGES", Severity.SKIP, cause)
    elif full:
        cause = say("all hugepages of NPU {labels} are used", "NPU {labels} 的大页已用满", labels=_labels(full))
        command = "npu-smi info; grep -i hugepages /proc/meminfo"
        yield Finding("NPU-HUGEPAGES", Severity.WARN, cause, command=command, source=_RULE_OF_THUMB)
    else:
        yield Finding("NPU-HUGEPAGES", Severity.INFO, say("hugepages are left", "大页有剩余"))


def _temperature(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-TEMP: no chip is hot; how warm they are, and what they draw."""
    degrees = {chip: chip.temperature for chip in chips if chip.temperature is not None}
    hot = [chip for chip, value in degrees.items() if value > HOT_CELSIUS]
    watts = [chip.power for chip in chips if chip.power is not None]
    if not degrees:
        yield Finding("NPU-TEMP", Severity.SKIP, say("npu-smi prints no temperature", "npu-smi 没有给出温度"))
        return
    values_told = {"degrees": f"{max(degrees.values()):g}", "labels": _labels(hot)}
    if hot:
        cause = say(
            "NPU {labels} is hot ({degrees} °C at most): it will slow down",
            "NPU {labels} 温度过高（最高 {degrees} °C），可能降频",
            **values_told,
        )
        command = "npu-smi info -t temp -i 0; npu-smi info -t power -i 0"
        yield Finding("NPU-TEMP", Severity.WARN, cause, command=command, source=_RULE_OF_THUMB)
    else:
        cause = say("{degrees} °C at most", "最高 {degrees} °C", **values_told)
        if watts:
            cause = say("{cause}, {watts:g} W", "{cause}，{watts:g} W", cause=cause, watts=max(watts))
        yield Finding("NPU-TEMP", Severity.INFO, cause)


def _ecc(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-ECC: no memory error that could not be corrected."""
    outputs = {
        str(chip.npu): snapshot.command(f"{_ECC_LINE}{chip.npu}").output for chip in chips if chip.npu is not None
    }
    errors = {card: sum(counts(text, "double bit error count")) for card, text in outputs.items()}
    pages = {card: sum(counts(text, "isolated pages count")) for card, text in outputs.items()}
    chosen = {str(chip.npu) for chip in _chosen(snapshot, chips)}
    faulty = [card for card, count in errors.items() if count > 0]
    worn = [card for card, count in pages.items() if count > 0]
    if faulty:
        fatal = bool(chosen & set(faulty))
        cause = say(
            "memory errors that could not be corrected on NPU {cards}",
            "NPU {cards} 出现无法纠正的内存错误（双比特 ECC）",
            cards=", ".join(faulty),
        )
        command = (
            f"{_ECC_LINE}{faulty[0]}   # counted since the last reboot; a card on which they come back is worn out"
        )
        yield Finding(
            "NPU-ECC",
            Severity.FAIL if fatal else Severity.WARN,
            cause,
            command=command,
            source=_REFERENCE,
            blocks=_NPU if fatal else (),
        )
    if worn:
        cause = say(
            "NPU {cards} has isolated pages of memory: it was faulty before",
            "NPU {cards} 有被隔离的内存页：曾出现过内存错误",
            cards=", ".join(worn),
        )
        yield Finding("NPU-ECC", Severity.WARN, cause, command=f"{_ECC_LINE}{worn[0]}", source=_REFERENCE)
    if not any(counts(text, "error count") for text in outputs.values()):
        cause = say("no card tells (npu-smi info -t ecc)", "没有卡给出说明（npu-smi info -t ecc）")
        yield Finding("NPU-ECC", Severity.SKIP, cause)
    elif not faulty and not worn:
        yield Finding("NPU-ECC", Severity.INFO, say("no memory error", "没有内存错误"))


def _processes(snapshot: Snapshot, chips: tuple[Chip, ...]) -> Iterable[Finding]:
    """NPU-PROC: nobody else computes on the NPUs."""
    running = table(snapshot.command(INFO_LINE).output).processes
    if not running:
        yield Finding("NPU-PROC", Severity.INFO, say("no process holds NPU memory", "没有进程占用 NPU 显存"))
        return
    told = joined(
        (
            say(
                "{name} (pid {pid}) {megabytes} MB on NPU {npu}",
                "{name}（pid {pid}）在 NPU {npu} 上占用 {megabytes} MB",
                **vars(process),
            )
            for process in running
        ),
        ", ",
        "，",
    )
    cause = say("others compute on the NPUs: {told}", "NPU 上有其他进程：{told}", told=told)
    pids = ",".join(str(process.pid) for process in running)
    command = f"ps -o pid,user,etime,args -p {pids}   # in a container: on the host"
    yield Finding("NPU-PROC", Severity.WARN, cause, command=command, source=_REFERENCE)


RULES = (
    Rule("NPU-HEALTH", say("every NPU is well", "所有 NPU 健康"), _of_chips("NPU-HEALTH", _health), "driver", _NPU),
    Rule("NPU-HBM", say("NPU memory is free", "NPU 显存空闲"), _of_chips("NPU-HBM", _memory), "driver"),
    Rule(
        "NPU-HUGEPAGES",
        say("a 310P has hugepages left", "310P 的大页有剩余"),
        _of_chips("NPU-HUGEPAGES", _hugepages),
        "driver",
    ),
    Rule("NPU-TEMP", say("no NPU is hot", "NPU 温度正常"), _of_chips("NPU-TEMP", _temperature), "driver"),
    Rule(
        "NPU-ECC",
        say("no uncorrectable memory error", "没有无法纠正的内存错误"),
        _of_chips("NPU-ECC", _ecc),
        "driver",
        _NPU,
    ),
    Rule(
        "NPU-PROC",
        say("nobody else computes on the NPUs", "没有其他进程使用 NPU"),
        _of_chips("NPU-PROC", _processes),
        "driver",
    ),
)
