"""Rules on the versions of driver and firmware: whether the two and CANN fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping

from ascend_envcheck.compat.asked import covers
from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.npu_smi import table, values
from ascend_envcheck.probes.driver import INSTALL_INFO, driver_homes, firmware_home
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.npu import INFO_LINE
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import records
from ascend_envcheck.versions import DriverVersion, driver_version, is_listed, is_within, pairs, ranges

BOARD = "npu-smi info -t board -i "
NO_DRIVER = say("no version of the driver was found", "没有找到驱动版本")

_NPU = (NPU,)
_NO_FIRMWARE = say("no version of the firmware was found", "没有找到固件版本")
_LISTS = "compatible_version_fw in the driver's version.info, compatible_version_drv in the firmware's"
_DOWNLOAD = "https://www.hiascend.com/hardware/firmware-drivers"


def skip(rule: str, cause: Message) -> Finding:
    """A finding that says why nothing can be said."""
    return Finding(rule, Severity.SKIP, cause)


@dataclass(frozen=True)
class Version:
    """A version, and what said so: a file, or npu-smi."""

    text: str
    origin: str


def driver_info(snapshot: Snapshot) -> tuple[str, Mapping[str, str]] | None:
    """The driver's version file: its path and its values."""
    homes = driver_homes(snapshot.files.get(INSTALL_INFO, ""), snapshot.variables)
    return _first_file(snapshot, homes, "/driver/version.info")


def _firmware_info(snapshot: Snapshot) -> tuple[str, Mapping[str, str]] | None:
    homes = driver_homes(snapshot.files.get(INSTALL_INFO, ""), snapshot.variables)
    return _first_file(snapshot, list(map(firmware_home, homes)), "/firmware/version.info")


def _first_file(snapshot: Snapshot, homes: list[str], ending: str) -> tuple[str, Mapping[str, str]] | None:
    usual = [f"{home}/version.info" for home in homes]
    others = sorted(path for path in snapshot.files if path.endswith(ending))
    path = next((path for path in [*usual, *others] if path in snapshot.files), None)
    return (path, pairs(snapshot.files[path])) if path else None


def driver(snapshot: Snapshot) -> Version | None:
    """The installed driver, by its file; else, as in a container, the one that runs."""
    found = driver_info(snapshot)
    text = (found[1].get("package_version") or found[1].get("version") or "") if found else ""
    return Version(text, found[0]) if found and text else running_driver(snapshot)


def running_driver(snapshot: Snapshot) -> Version | None:
    """The driver that is loaded, by npu-smi."""
    header = table(snapshot.command(INFO_LINE).output).driver
    if header:
        return Version(header, INFO_LINE)
    return _of_board(snapshot, "Software Version")


def firmware(snapshot: Snapshot) -> Version | None:
    """The firmware, by its file, else by the board."""
    found = _firmware_info(snapshot)
    text = (found[1].get("version") or found[1].get("firmware_version") or "") if found else ""
    return Version(text, found[0]) if found and text else _of_board(snapshot, "Firmware Version")


def _of_board(snapshot: Snapshot, field: str) -> Version | None:
    for line, answer in boards(snapshot).items():
        found = values(answer, field)
        if found:
            return Version(found[0], line)
    return None


def _is_of_board(line: str) -> bool:
    return line.startswith(BOARD) and line[len(BOARD) :].isdigit()


def boards(snapshot: Snapshot) -> dict[str, str]:
    """What each card said of its board, by the command."""
    return {line: answer.output for line, answer in sorted(snapshot.commands.items()) if _is_of_board(line)}


def driver_known(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-VER: which driver it is."""
    found = driver(snapshot)
    if npu_count(snapshot) == 0:
        yield skip("DRV-VER", NO_NPU)
    elif found is None:
        yield skip("DRV-VER", NO_DRIVER)
    elif driver_version(found.text) is None:
        cause = say("{text} in {origin} is no version", "{origin} 中的 {text} 不是版本号", **vars(found))
        yield skip("DRV-VER", cause)
    else:
        yield Finding(
            "DRV-VER", Severity.INFO, say("driver {text} ({origin})", "驱动 {text}（{origin}）", **vars(found))
        )


def hdk_pair(snapshot: Snapshot) -> Iterable[Finding]:
    """HDK-PAIR: the driver is one that the active CANN runs on."""
    found, cann = driver(snapshot), active_version(snapshot)
    version = driver_version(found.text) if found else None
    row = hdk_row(cann) if cann else None
    if npu_count(snapshot) == 0:
        yield skip("HDK-PAIR", NO_NPU)
    elif found is None or version is None:
        yield skip("HDK-PAIR", NO_DRIVER)
    elif cann is None:
        yield skip("HDK-PAIR", say("no version of CANN was found", "没有找到 CANN 版本"))
    elif row is None:
        cause = say("no list names the drivers of CANN {cann}", "没有资料列出 CANN {cann} 的配套驱动", cann=cann)
        yield skip("HDK-PAIR", cause)
    else:
        yield _paired(found.text, version, cann, row)


def hdk_row(cann: str) -> Mapping[str, str] | None:
    """The row of ``data/hdk.csv`` of a CANN version: its own, else that of its whole series."""
    rows = records("hdk")
    own = next((row for row in rows if row["cann"] == cann), None)
    return own or next((row for row in rows if covers(row["cann"], cann)), None)


def _paired(text: str, version: DriverVersion, cann: str, row: Mapping[str, str]) -> Finding:
    entries = row["hdk"].split()
    source = f"{row['source']} ({row['confidence']})"
    words = {"text": text, "cann": cann, "entries": ", ".join(entries)}
    if any(is_listed(version, entry) for entry in entries):
        cause = say("driver {text} is listed for CANN {cann}", "驱动 {text} 在 CANN {cann} 的配套列表中", **words)
        return Finding("HDK-PAIR", Severity.INFO, cause, source=source)
    if version.line:
        cause = say(
            "driver {text} is of the 950's own line, which the list of CANN {cann} does not name",
            "驱动 {text} 属于 950 专用系列，CANN {cann} 的列表中没有",
            **words,
        )
        return Finding("HDK-PAIR", Severity.SKIP, cause, source=source)
    command = f"# on the host, driver and then firmware of HDK {_newest(entries)}, then reboot: {_DOWNLOAD}"
    if row["confidence"] == "official" and _is_too_old(version, entries):
        cause = say(
            "driver {text} is older than any that CANN {cann} runs on ({entries})",
            "驱动 {text} 早于 CANN {cann} 支持的所有版本（{entries}）",
            **words,
        )
        return Finding("HDK-PAIR", Severity.FAIL, cause, command=command, source=source, blocks=_NPU)
    cause = say(
        "driver {text} is not listed for CANN {cann}, which names {entries}",
        "驱动 {text} 不在 CANN {cann} 的配套列表中，列表为 {entries}",
        **words,
    )
    return Finding("HDK-PAIR", Severity.WARN, cause, command=command, source=source, doubts=_NPU)


def _is_too_old(version: DriverVersion, entries: Iterable[str]) -> bool:
    """Older than all entries of its own line; a series ``25.0.x`` begins with its first alpha."""
    own = [first for first in map(_first_of, entries) if first is not None and first.line == version.line]
    return bool(own) and version < min(own)


def _first_of(entry: str) -> DriverVersion | None:
    return driver_version(entry[:-2] + ".0.alpha0" if entry.endswith(".x") else entry)


def _newest(entries: Iterable[str]) -> str:
    """The newest entry, those of the 950's own line left out where there are others."""
    known = [(first, entry) for entry in entries for first in (_first_of(entry),) if first is not None]
    others = [pair for pair in known if not pair[0].line]
    return max(others or known)[1]


def firmware_known(snapshot: Snapshot) -> Iterable[Finding]:
    """FW-VER: which firmware it is."""
    found = firmware(snapshot)
    if npu_count(snapshot) == 0:
        yield skip("FW-VER", NO_NPU)
    elif found is None:
        yield skip("FW-VER", _NO_FIRMWARE)
    else:
        yield Finding(
            "FW-VER", Severity.INFO, say("firmware {text} ({origin})", "固件 {text}（{origin}）", **vars(found))
        )


def cross(snapshot: Snapshot) -> Iterable[Finding]:
    """FW-DRV-CROSS: driver and firmware name each other as compatible, by the lists that both carry."""
    here, there = driver(snapshot), firmware(snapshot)
    driver_side, firmware_side = driver_info(snapshot), _firmware_info(snapshot)
    for_firmware = ranges(driver_side[1].get("compatible_version_fw", "")) if driver_side else []
    for_driver = ranges(firmware_side[1].get("compatible_version_drv", "")) if firmware_side else []
    if npu_count(snapshot) == 0 or here is None or there is None:
        none = NO_DRIVER if here is None else _NO_FIRMWARE
        yield skip("FW-DRV-CROSS", NO_NPU if npu_count(snapshot) == 0 else none)
        return
    faults = [
        say(
            "{what} {version} is outside {ranges}, which the {other} {with_version} admits",
            "{what} {version} 不在{other} {with_version} 允许的范围 {ranges} 内",
            what=what,
            version=version.text,
            ranges=" ".join(f"{low}-{high}" for low, high in spans),
            other=other,
            with_version=partner.text,
        )
        for what, version, spans, other, partner in (
            (say("firmware", "固件"), there, for_firmware, say("driver", "驱动"), here),
            (say("driver", "驱动"), here, for_driver, say("firmware", "固件"), there),
        )
        if spans and not any(is_within(version.text, low, high) for low, high in spans)
    ]
    if not for_firmware and not for_driver:
        cause = say("neither version file lists the other's versions", "两个版本文件都没有列出对方的版本范围")
        yield skip("FW-DRV-CROSS", cause)
    elif faults:
        command = (
            "# on the host: install driver and firmware of one HDK release, then reboot; npu-smi info -t board -i 0"
        )
        yield Finding("FW-DRV-CROSS", Severity.FAIL, joined(faults), command=command, source=_LISTS, blocks=_NPU)
    else:
        cause = say(
            "firmware {firmware} and driver {driver} admit each other",
            "固件 {firmware} 与驱动 {driver} 相互兼容",
            firmware=there.text,
            driver=here.text,
        )
        yield Finding("FW-DRV-CROSS", Severity.INFO, cause, source=_LISTS)


RULES = (
    Rule("DRV-VER", say("the driver's version is known", "驱动版本已知"), driver_known, "driver"),
    Rule("HDK-PAIR", say("the driver fits the active CANN", "驱动与当前 CANN 配套"), hdk_pair, "driver", _NPU),
    Rule("FW-VER", say("the firmware's version is known", "固件版本已知"), firmware_known, "driver"),
    Rule("FW-DRV-CROSS", say("driver and firmware admit each other", "驱动与固件相互兼容"), cross, "driver", _NPU),
)
