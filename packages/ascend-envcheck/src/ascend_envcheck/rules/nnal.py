"""Rules on NNAL, whose library libatb.so comes in one build for each C++ ABI of torch."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.rules.cann import active_version
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count, source_command
from ascend_envcheck.snapshot import CRASHED, FAILED, OK, TIMEOUT, Snapshot
from ascend_envcheck.versions import cann_order, cann_version, pairs

_USUAL = "/usr/local/Ascend/nnal/atb"
_SOURCE = "MindSpeed-MM FAQ, libatb.so; https://github.com/vllm-project/vllm-ascend/issues/152"
_NOT_INSTALLED = say("NNAL is not installed", "未安装 NNAL")


def version_of(snapshot: Snapshot) -> str | None:
    """The version of the active NNAL by its version.info, "Ascend-cann-atb : 8.2.RC1" or "Version : 8.2.RC1.B150"."""
    active = snapshot.variables.get("ATB_HOME_PATH", "").rstrip("/")
    files = [path for path in snapshot.files if path.endswith("/version.info") and "/nnal/" in path]
    files.sort(key=lambda path: not (active and active.startswith(path[: -len("version.info")])))
    for path in files:
        stated = pairs(snapshot.files[path])
        found = cann_version(stated.get("ascend-cann-atb", "") or stated.get("version", ""))
        if found:
            return found
    return None


def library(snapshot: Snapshot) -> Iterable[Finding]:
    """NNAL-LIB: NNAL is installed and was sourced, so that the loader finds libatb.so, and can load it."""
    load = snapshot.loads.get("libatb.so")
    works = snapshot.imports.torch_npu == OK
    if npu_count(snapshot) == 0:
        yield Finding("NNAL-LIB", Severity.SKIP, NO_NPU)
    elif not snapshot.libraries.get("libatb.so"):
        yield _not_found(snapshot)
    elif load is not None and load.outcome in (FAILED, CRASHED, TIMEOUT):
        yield Finding(
            "NNAL-LIB",
            Severity.WARN if works else Severity.FAIL,
            say(
                "libatb.so is found, the loader can't load it ({outcome}): {detail}",
                "能找到 libatb.so，但加载失败（{outcome}）：{detail}",
                outcome=load.outcome,
                detail=load.detail,
            ),
            command=_source(snapshot),
            source=_SOURCE,
            blocks=() if works else (NPU,),
            doubts=(NPU,),
        )
    else:
        folder = snapshot.libraries["libatb.so"][0]
        yield Finding(
            "NNAL-LIB", Severity.INFO, say("libatb.so is in {folder}", "libatb.so 位于 {folder}", folder=folder)
        )


def _not_found(snapshot: Snapshot) -> Finding:
    works = snapshot.imports.torch_npu == OK
    cause = say(
        "NNAL is {state}: no folder of LD_LIBRARY_PATH has libatb.so",
        "{state}：LD_LIBRARY_PATH 的目录中没有 libatb.so",
        state=say("installed but not sourced", "NNAL 已安装但未 source")
        if _is_installed(snapshot)
        else say("not installed", "未安装 NNAL"),
    )
    source = _source(snapshot)
    return Finding(
        "NNAL-LIB",
        Severity.WARN if works else Severity.FAIL,
        cause,
        command=source if _is_installed(snapshot) else f"./Ascend-cann-nnal_*.run --install && {source}",
        source=_SOURCE,
        blocks=() if works else (NPU,),
        doubts=(NPU,),
    )


def _is_installed(snapshot: Snapshot) -> bool:
    return bool(_homes(snapshot)) or bool(snapshot.variables.get("ATB_HOME_PATH"))


def _homes(snapshot: Snapshot) -> list[str]:
    return [path for path in snapshot.paths if path.endswith("/nnal/atb")]


def _source(snapshot: Snapshot, option: str = "") -> str:
    script = next((f"{home}/set_env.sh" for home in _homes(snapshot)), f"{_USUAL}/set_env.sh")
    return source_command(script) + option + "   # after CANN's set_env.sh, with the Python in use active"


def installed(snapshot: Snapshot) -> Iterable[Finding]:
    """NNAL-INSTALLED: NNAL is of the toolkit's version."""
    nnal, cann = version_of(snapshot), active_version(snapshot)
    why: Message | None = None
    if npu_count(snapshot) == 0:
        why = NO_NPU
    elif not _is_installed(snapshot):
        why = _NOT_INSTALLED
    elif nnal is None or cann is None:
        why = say("the version of NNAL or of CANN can't be read", "无法读取 NNAL 或 CANN 的版本")
    if why is not None or nnal is None or cann is None:
        yield Finding("NNAL-INSTALLED", Severity.SKIP, why or _NOT_INSTALLED)
    elif _train(nnal) == _train(cann):
        cause = say("NNAL {nnal} goes with CANN {cann}", "NNAL {nnal} 与 CANN {cann} 配套", nnal=nnal, cann=cann)
        yield Finding("NNAL-INSTALLED", Severity.INFO, cause)
    else:
        yield Finding(
            "NNAL-INSTALLED",
            Severity.WARN,
            say(
                "NNAL is {nnal}, CANN is {cann}: they are released and tested as one version",
                "NNAL 为 {nnal}，CANN 为 {cann}：二者应使用同一版本",
                nnal=nnal,
                cann=cann,
            ),
            command=f"./Ascend-cann-nnal_{cann}_*.run --install && {_source(snapshot)}",
            source="CANN installation guide, NNAL",
            doubts=(NPU,),
        )


def _train(version: str) -> tuple[int, ...]:
    """What must be equal: the first two numbers and the number of the RC; patches of one train mix."""
    order = cann_order(version)
    return order[:2] + order[3:4]


def abi(snapshot: Snapshot) -> Iterable[Finding]:
    """NNAL-ABI: the build of NNAL that was sourced is the one for the C++ ABI of this torch."""
    active = snapshot.variables.get("ATB_HOME_PATH", "").rstrip("/").rsplit("/", 1)[-1]
    wanted = snapshot.imports.cxx11_abi
    why: Message | None = None
    if npu_count(snapshot) == 0:
        why = NO_NPU
    elif not active.startswith("cxx_abi_"):
        why = say("ATB_HOME_PATH names no build of NNAL", "ATB_HOME_PATH 未指向 NNAL 的某个构建")
    elif wanted is None:
        why = say("the C++ ABI of torch is not known", "torch 的 C++ ABI 未知")
    if why is not None:
        yield Finding("NNAL-ABI", Severity.SKIP, why)
    elif active == f"cxx_abi_{int(bool(wanted))}":
        yield Finding(
            "NNAL-ABI",
            Severity.INFO,
            say("NNAL's {active} is torch's", "NNAL 的 {active} 与 torch 一致", active=active),
        )
    else:
        number = int(bool(wanted))
        yield Finding(
            "NNAL-ABI",
            Severity.FAIL,
            say(
                "NNAL was sourced for {active}, torch is built with cxx_abi_{number}: set_env.sh asks the Python that "
                "is active then, and takes 1 when that has no torch",
                "source NNAL 时选择了 {active}，而 torch 使用 cxx_abi_{number}：set_env.sh 会询问当时激活的 Python，"
                "若其中没有 torch 则取 1",
                active=active,
                number=number,
            ),
            command=_source(snapshot, f" --cxx_abi={number}"),
            source="NNAL set_env.sh; undefined symbol _ZN3Mki…",
            blocks=(NPU,),
        )


_NPU = (NPU,)

RULES = (
    Rule(
        "NNAL-LIB",
        say("NNAL is installed and sourced: libatb.so is found", "NNAL 已安装并已 source：能找到 libatb.so"),
        library,
        "cann",
        _NPU,
        needs_import=True,
    ),
    Rule("NNAL-INSTALLED", say("NNAL is of the version of CANN", "NNAL 与 CANN 版本一致"), installed, "cann", _NPU),
    Rule(
        "NNAL-ABI",
        say("NNAL was sourced for torch's C++ ABI", "NNAL 的 C++ ABI 与 torch 一致"),
        abi,
        "cann",
        _NPU,
        needs_import=True,
    ),
)
