"""Rules on the driver as it is installed: its files, its libraries, and whether it is the one that runs."""

from __future__ import annotations

import shlex
from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import say
from ascend_envcheck.npu_smi import values
from ascend_envcheck.probes.driver import HAL, INSTALL_INFO, LIBRARY_FOLDERS
from ascend_envcheck.rules.driver_versions import BOARD, NO_DRIVER, boards, driver_info, running_driver, skip
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import NOT_RUN, OK, Snapshot
from ascend_envcheck.versions import driver_version, pairs

_NPU = (NPU,)
_GUIDE = "Ascend HDK installation guide"
_MOUNT = (
    "docker run -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro "
    "-v /etc/ascend_install.info:/etc/ascend_install.info:ro …"
)
_LIBRARIES = "ascend-docker-runtime mounts; set_env.sh of CANN: driver/lib64, driver/lib64/common, driver/lib64/driver"


def driver_file(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-FILE: the driver's version file is where its installer puts it."""
    found = driver_info(snapshot)
    if npu_count(snapshot) == 0:
        yield skip("DRV-FILE", NO_NPU)
    elif found is not None:
        cause = say("the driver's version file is {path}", "驱动的版本文件为 {path}", path=found[0])
        yield Finding("DRV-FILE", Severity.INFO, cause)
    elif snapshot.host.container or snapshot.variables.get("ASCEND_RUNTIME_OPTIONS"):
        cause = say(
            "a container is given the driver's libraries, mostly without its version.info",
            "容器通常只挂载驱动的库，不含 version.info",
        )
        yield Finding("DRV-FILE", Severity.SKIP, cause, command=_MOUNT)
    elif not snapshot.host.live:
        yield skip("DRV-FILE", say("no version.info among these files", "这些文件中没有 version.info"))
    else:
        cause = say(
            "an NPU is here, and no version.info of a driver: was it installed elsewhere, or removed in part?",
            "存在 NPU，但没有驱动的 version.info：驱动是否装在别处，或被部分删除？",
        )
        command = "cat /etc/ascend_install.info; ls /usr/local/Ascend/driver"
        yield Finding("DRV-FILE", Severity.WARN, cause, command=command, source=_GUIDE)


def install_state(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-INSTALL-STATE: the installer of the driver came to its end."""
    noted = pairs(snapshot.files.get(INSTALL_INFO, "")).get("driver_install_status", "")
    if npu_count(snapshot) == 0:
        yield skip("DRV-INSTALL-STATE", NO_NPU)
    elif not noted:
        cause = say("{path} does not tell", "{path} 中没有说明", path=INSTALL_INFO)
        yield skip("DRV-INSTALL-STATE", cause)
    elif noted.lower() == "complete":
        cause = say("the driver's installation is complete", "驱动安装已完成")
        yield Finding("DRV-INSTALL-STATE", Severity.INFO, cause)
    else:
        cause = say("the driver's installation is noted as {state}", "驱动安装状态记为 {state}", state=noted)
        command = "sudo ./Ascend-hdk-*-npu-driver_*.run --full   # again, then reboot"
        yield Finding("DRV-INSTALL-STATE", Severity.WARN, cause, command=command, source=_GUIDE, doubts=_NPU)


def board(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-BOARD-COMPAT: every board calls its firmware and driver compatible."""
    answers = {line[len(BOARD) :]: values(text, "Compatibility") for line, text in boards(snapshot).items()}
    bad = {card: [word for word in words if word.upper() != "OK"] for card, words in answers.items()}
    bad = {card: words for card, words in bad.items() if words}
    if npu_count(snapshot) == 0:
        yield skip("DRV-BOARD-COMPAT", NO_NPU)
    elif not any(answers.values()):
        cause = say("no board tells (npu-smi info -t board)", "没有板卡给出说明（npu-smi info -t board）")
        yield skip("DRV-BOARD-COMPAT", cause)
    elif bad:
        told = ", ".join(f"{card}: {'/'.join(sorted(set(words)))}" for card, words in bad.items())
        cause = say(
            "the board calls driver and firmware incompatible (NPU {told})",
            "板卡报告驱动与固件不兼容（NPU {told}）",
            told=told,
        )
        command = f"{BOARD}{next(iter(bad))}; cat /usr/local/Ascend/driver/version.info"
        source = "npu-smi command reference: Compatibility"
        yield Finding("DRV-BOARD-COMPAT", Severity.FAIL, cause, command=command, source=source, blocks=_NPU)
    else:
        cause = say("the boards call driver and firmware compatible", "板卡报告驱动与固件兼容")
        yield Finding("DRV-BOARD-COMPAT", Severity.INFO, cause)


def libraries(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-LIBS: the driver's libraries are here, and the loader finds them."""
    loaded = snapshot.loads.get(HAL)
    folders = [path for path in snapshot.paths if path.endswith(tuple(f"/driver/{name}" for name in LIBRARY_FOLDERS))]
    held = [path for path in snapshot.paths if path.endswith(f"/{HAL}")]
    if npu_count(snapshot) == 0:
        yield skip("DRV-LIBS", NO_NPU)
    elif loaded is not None and loaded.outcome == OK:
        yield Finding("DRV-LIBS", Severity.INFO, say("the loader loads {name}", "{name} 可以加载", name=HAL))
    elif held and (loaded is None or loaded.outcome == NOT_RUN):
        yield Finding("DRV-LIBS", Severity.INFO, say("{path} is here", "存在 {path}", path=sorted(held)[0]))
    elif held and loaded is not None:
        folder = sorted(held)[0].rpartition("/")[0]
        both = f"{folder}:{folder.rpartition('/')[0]}/common"  # libascend_hal.so needs libc_sec.so of the second
        cause = say(
            "{path} is here, and the loader does not load it: {why}",
            "存在 {path}，但无法加载：{why}",
            path=sorted(held)[0],
            why=loaded.detail or loaded.outcome,
        )
        command = f"export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:{shlex.quote(both)}   # set_env.sh does"
        yield Finding("DRV-LIBS", Severity.FAIL, cause, command=command, source=_LIBRARIES, blocks=_NPU)
    elif folders or snapshot.host.live:
        cause = say(
            "{name} is nowhere: the driver's libraries are not installed, or not mounted into this container",
            "找不到 {name}：驱动的库未安装，或未挂载到本容器",
            name=HAL,
        )
        command = "docker run -v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64:ro …"
        yield Finding("DRV-LIBS", Severity.FAIL, cause, command=command, source=_LIBRARIES, blocks=_NPU)
    else:
        yield skip("DRV-LIBS", say("no folder of a driver among these files", "这些文件中没有驱动目录"))


def reboot(snapshot: Snapshot) -> Iterable[Finding]:
    """DRV-REBOOT: the driver that runs is the one that is installed."""
    found, running = driver_info(snapshot), running_driver(snapshot)
    installed = (found[1].get("package_version") or found[1].get("version") or "") if found else ""
    first, second = driver_version(installed), driver_version(running.text) if running else None
    if npu_count(snapshot) == 0:
        yield skip("DRV-REBOOT", NO_NPU)
    elif first is None or running is None or second is None:
        told = NO_DRIVER if first is None else say("npu-smi names no driver", "npu-smi 没有给出驱动版本")
        yield skip("DRV-REBOOT", told)
    elif first == second or (first.base == second.base and first.patch == second.patch):
        cause = say("the installed driver {text} runs", "运行中的驱动即已安装的 {text}", text=running.text)
        yield Finding("DRV-REBOOT", Severity.INFO, cause)
    elif snapshot.host.container:
        cause = say(
            "driver {running} runs, the files in this container are of {installed}: mount those of the host",
            "运行中的驱动为 {running}，容器内文件属于 {installed}：请挂载宿主机的驱动文件",
            running=running.text,
            installed=installed,
        )
        yield Finding("DRV-REBOOT", Severity.WARN, cause, command=_MOUNT, source=_GUIDE, doubts=_NPU)
    else:
        cause = say(
            "driver {installed} is installed, {running} still runs: reboot",
            "已安装驱动 {installed}，但仍在运行 {running}：需要重启",
            running=running.text,
            installed=installed,
        )
        yield Finding("DRV-REBOOT", Severity.FAIL, cause, command="sudo reboot", source=_GUIDE, blocks=_NPU)


RULES = (
    Rule("DRV-FILE", say("the driver's version file is in place", "驱动的版本文件就位"), driver_file, "driver"),
    Rule(
        "DRV-INSTALL-STATE",
        say("the driver's installation is complete", "驱动安装已完成"),
        install_state,
        "driver",
    ),
    Rule(
        "DRV-BOARD-COMPAT",
        say("the boards call driver and firmware compatible", "板卡报告驱动与固件兼容"),
        board,
        "driver",
        _NPU,
    ),
    Rule("DRV-LIBS", say("the driver's libraries can be loaded", "驱动的库可以加载"), libraries, "driver", _NPU),
    Rule(
        "DRV-REBOOT",
        say("the installed driver is the one that runs", "运行中的驱动即已安装的驱动"),
        reboot,
        "driver",
        _NPU,
    ),
)
