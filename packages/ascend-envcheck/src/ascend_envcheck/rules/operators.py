"""Rules on what compiles and holds operators: kernels for the SoC, Python packages of the compiler, triton-ascend."""

from __future__ import annotations

import shlex
from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.rules.cann import GUIDE, active_version, why_not
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import known_canns, records
from ascend_envcheck.versions import cann_version, pairs, release, series

_KERNELS = "/built-in/op_impl/ai_core/tbe/kernel/config"
_OPS_FILES = (
    ("aarch64-linux/ascend_ops_install.info", "version"),
    ("x86_64-linux/ascend_ops_install.info", "version"),
    ("share/info/opp_kernel/version.info", "version_dir"),
    ("opp_kernel/version.info", "version_dir"),
)
"""Beneath a CANN home; the first two since 8.5."""

_PACKAGE_OF_SOC = {
    "ascend910b": "910b",
    "ascend910_93": "A3",
    "ascend310p": "310p",
    "ascend310b": "310b",
    "ascend910": "910",
    "ascend950": "950",
}
_TRITON_SHARES_FOLDER = (3, 2, 0)
_TRITONS_BENEATH = ((3, 2, 0), (3, 5, 0))
"""triton-ascend 3.2.1 and newer ask for triton 3.2.0 (x86-64) or 3.5.0 (aarch64), and then write over it."""

_OLD_PROTOBUF = (4, 0, 0)
_TRITON = "Ascend/triton-ascend FAQ and installation guide"


def kernels(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-OPP: compiled operators are installed, for the SoC that is here."""
    from ascend_envcheck.rules.npu import soc

    named = snapshot.variables.get("ASCEND_OPP_PATH", "").rstrip("/")
    folder = named or (f"{snapshot.cann_homes[0]}/opp" if snapshot.cann_homes else "")
    found = snapshot.folders.get(folder + _KERNELS, ())
    wanted = soc(snapshot)
    why = why_not(snapshot)
    if why is not None:
        yield Finding("CANN-OPP", Severity.SKIP, why)
    elif f"{folder}/built-in" not in snapshot.paths:
        cause = say(
            "{folder} has no built-in operators{variable}",
            "{folder} 中没有内置算子{variable}",
            folder=folder,
            variable=say(", ASCEND_OPP_PATH names it", "（由 ASCEND_OPP_PATH 指定）") if named else "",
        )
        yield _missing_kernels(snapshot, cause, wanted)
    elif not found:
        cause = say("no compiled operators in {folder}", "{folder} 中没有已编译的算子", folder=folder + _KERNELS)
        yield _missing_kernels(snapshot, cause, wanted)
    elif wanted is not None and wanted not in found:
        cause = say(
            "the operators installed are for {found}, the NPU here is {wanted}",
            "已安装的算子适用于 {found}，而本机 NPU 为 {wanted}",
            found=joined(found, ", ", "、"),
            wanted=wanted,
        )
        yield _missing_kernels(snapshot, cause, wanted)
    else:
        cause = say("operators are installed for {found}", "已安装 {found} 的算子", found=joined(found, ", ", "、"))
        yield Finding("CANN-OPP", Severity.INFO, cause)


def _missing_kernels(snapshot: Snapshot, cause: Message, soc: str | None) -> Finding:
    command = _install(active_version(snapshot) or "*", soc)
    return Finding("CANN-OPP", Severity.FAIL, cause, command=command, source=GUIDE, blocks=(NPU,))


def _install(version: str, soc: str | None) -> str:
    """Installs the operators of a CANN for a SoC, which is left to be filled in where it is not known."""
    package = _PACKAGE_OF_SOC.get(soc or "", "<soc>")
    split = (release(version) or (9, 0, 0)) >= (8, 5, 0)  # since 8.5 the package is called ops
    installer = f"Ascend-cann-{package}-ops_{version}" if split else f"Ascend-cann-kernels-{package}_{version}"
    return f"./{installer}_*.run --install"


def ops_version(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-OPS-VER: the operators are of the toolkit's version, or of one that the vendor lets mix."""
    from ascend_envcheck.rules.npu import soc

    cann, ops = active_version(snapshot), _ops_version(snapshot)
    mix = [row for row in records("ops_toolkit") if (row["ops"], row["toolkit"]) == (ops, cann)]
    if cann is None or ops is None:
        why = why_not(snapshot) or say("the version of the operators can't be read", "无法读取算子包的版本")
        yield Finding("CANN-OPS-VER", Severity.SKIP, why)
    elif ops == cann or mix:
        source = f"{mix[0]['source']} ({mix[0]['confidence']})" if mix else ""
        cause = say("operators {ops} go with CANN {cann}", "算子包 {ops} 与 CANN {cann} 配套", ops=ops, cann=cann)
        yield Finding("CANN-OPS-VER", Severity.INFO, cause, source=source)
    else:
        known = ops in known_canns()
        yield Finding(
            "CANN-OPS-VER",
            Severity.WARN,
            say(
                "operators {ops} with CANN {cann}: {why}",
                "算子包 {ops} 与 CANN {cann}：{why}",
                ops=ops,
                cann=cann,
                why=say("no release note lets them mix", "没有发行说明允许混用")
                if known
                else say("a version unknown to this tool", "本工具不认识该版本"),
            ),
            command=_install(cann, soc(snapshot)),
            source="cann/release-management release notes",
            doubts=(NPU,),
        )


def _ops_version(snapshot: Snapshot) -> str | None:
    home = snapshot.cann_homes[0] if snapshot.cann_homes else ""
    for name, key in _OPS_FILES:
        found = cann_version(pairs(snapshot.files.get(f"{home}/{name}", "")).get(key, ""))
        if found:
            return found
    # opp_kernel_running_version=[7.3.0.1.231:8.0.RC3]
    running = pairs(snapshot.files.get(f"{home}/version.cfg", "")).get("opp_kernel_running_version", "")
    return cann_version(running.rpartition(":")[2])


def driver_match(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-DRVMATCH: whether the toolkit's list of drivers names this one; a note, for the numbering began anew."""
    home = snapshot.cann_homes[0] if snapshot.cann_homes else ""
    texts = [
        snapshot.files.get(f"{home}/{name}-linux/ascend_toolkit_install.info", "") for name in ("aarch64", "x86_64")
    ]
    accepted = next((pairs(text)["compatible_version"] for text in texts if "compatible_version" in pairs(text)), "")
    drivers = [pairs(text) for path, text in sorted(snapshot.files.items()) if path.endswith("/driver/version.info")]
    inner = next((found["innerversion"] for found in drivers if found.get("innerversion")), "")
    if not accepted or not inner:
        why = say("CANN's list of drivers, or the driver's code, is not there", "缺少 CANN 的驱动兼容列表或驱动代号")
        yield Finding("CANN-DRVMATCH", Severity.SKIP, why)
        return
    code = inner.partition("SPC")[0].partition("B")[0]
    listed = f"[{code}]" in accepted.replace(" ", "")
    cause = (
        say("CANN's own list names the driver, {code}", "CANN 的兼容列表包含该驱动 {code}", code=code)
        if listed
        else say(
            "CANN's own list does not name the driver, {code}; which may mean nothing: numbers began anew in 9.0.0",
            "CANN 的兼容列表未包含该驱动 {code}；编号自 9.0.0 起重新开始，仅供参考",
            code=code,
        )
    )
    yield Finding("CANN-DRVMATCH", Severity.INFO, cause, source="ascend_toolkit_install.info, compatible_version")


def packages(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-DEPS: the Python packages that CANN's operator compiler imports are installed."""
    why = why_not(snapshot)
    if why is not None:
        yield Finding("CANN-DEPS", Severity.SKIP, why)
        return
    missing = [row for row in records("cann_packages") if row["package"] not in snapshot.distributions]
    needed = [row["package"] for row in missing if row["need"] == "start"]
    names = [row["package"] for row in missing]
    if missing:
        yield Finding(
            "CANN-DEPS",
            Severity.FAIL if needed else Severity.WARN,
            say(
                "this Python lacks {names}, which CANN's operator compiler imports{outcome}",
                "当前 Python 缺少 CANN 算子编译器所需的 {names}{outcome}",
                names=joined(names, ", ", "、"),
                outcome=say(": error 500001 or EH9999 at the start", "：启动时报 500001 或 EH9999") if needed else "",
            ),
            command=f"pip install {' '.join(names)}",
            source=missing[0]["source"],
            blocks=(NPU,) if needed else (),
            doubts=() if needed else (NPU,),
        )
        return
    protobuf = snapshot.distributions["protobuf"].version
    old = (release(active_version(snapshot) or "") or (9, 0, 0)) < (8, 0, 0)
    if old and (release(protobuf) or _OLD_PROTOBUF) >= _OLD_PROTOBUF:
        cause = say(
            "protobuf {version}: CANN before 8.0 was tested with 3.20; where descriptors fail, install that",
            "protobuf {version}：8.0 之前的 CANN 在 3.20 上测试；如出现 descriptor 错误请改用该版本",
            version=protobuf,
        )
        yield Finding("CANN-DEPS", Severity.INFO, cause, command="pip install 'protobuf<=3.20.3'")
    else:
        cause = say("the packages of CANN's operator compiler are here", "CANN 算子编译器所需的 Python 包齐全")
        yield Finding("CANN-DEPS", Severity.INFO, cause)


def triton(snapshot: Snapshot) -> Iterable[Finding]:
    """TRITON-ASCEND: it is the one for this CANN, and the community's triton did not write over it."""
    ascend, community = snapshot.distributions.get("triton-ascend"), snapshot.distributions.get("triton")
    if npu_count(snapshot) == 0 or ascend is None:
        why = NO_NPU if npu_count(snapshot) == 0 else say("triton-ascend is not installed", "未安装 triton-ascend")
        yield Finding("TRITON-ASCEND", Severity.SKIP, why)
        return
    version = release(ascend.version)
    shares = version is not None and version <= _TRITON_SHARES_FOLDER
    if community is not None and (shares or release(community.version) not in _TRITONS_BENEATH):
        yield _two_tritons(ascend.version, community.version, certain=shares)
        return
    yield _triton_for_cann(snapshot, ascend.version)


def _two_tritons(ascend: str, community: str, *, certain: bool) -> Finding:
    return Finding(
        "TRITON-ASCEND",
        Severity.FAIL if certain else Severity.WARN,
        say(
            "triton {community} and triton-ascend {ascend} share one folder, the later one wrote over the other: "
            "Triton kernels and torch.compile may find no NPU (0 active drivers)",
            "triton {community} 与 triton-ascend {ascend} 共用同一目录，后安装者会覆盖前者："
            "Triton 算子和 torch.compile 可能找不到 NPU（0 active drivers）",
            community=community,
            ascend=ascend,
        ),
        command=f"pip uninstall -y triton triton-ascend && pip install {shlex.quote(f'triton-ascend=={ascend}')}",
        source=_TRITON,
        blocks=(NPU,) if certain else (),
    )


def _triton_for_cann(snapshot: Snapshot, ascend: str) -> Finding:
    cann = active_version(snapshot)
    fitting = [row for row in records("triton_ascend") if cann and series(row["cann"]) == series(cann)]
    if any(ascend == row["triton_ascend"] or ascend.startswith(row["triton_ascend"] + ".") for row in fitting):
        cause = say(
            "triton-ascend {ascend} goes with CANN {cann}",
            "triton-ascend {ascend} 与 CANN {cann} 配套",
            ascend=ascend,
            cann=cann,
        )
        return Finding("TRITON-ASCEND", Severity.INFO, cause, source=fitting[0]["source"])
    if not fitting:
        cause = say(
            "no table tells which triton-ascend goes with CANN {cann}",
            "没有数据说明哪个 triton-ascend 与 CANN {cann} 配套",
            cann=cann or "?",
        )
        return Finding("TRITON-ASCEND", Severity.SKIP, cause)
    wanted = fitting[0]["triton_ascend"]
    cause = say(
        "triton-ascend {ascend}: CANN {cann} goes with {wanted}",
        "triton-ascend 为 {ascend}：CANN {cann} 配套的是 {wanted}",
        ascend=ascend,
        cann=cann,
        wanted=" / ".join(dict.fromkeys(row["triton_ascend"] for row in fitting)),
    )
    command = f"pip install triton-ascend=={wanted}"
    source = f"{fitting[0]['source']} ({fitting[0]['confidence']})"
    return Finding("TRITON-ASCEND", Severity.WARN, cause, command=command, source=source)


_NPU = (NPU,)

RULES = (
    Rule(
        "CANN-OPP",
        say("compiled operators are installed for this SoC", "已安装适用于本机 SoC 的算子包"),
        kernels,
        "cann",
        _NPU,
    ),
    Rule(
        "CANN-OPS-VER",
        say("the operators are of a version that goes with CANN", "算子包与 CANN 版本配套"),
        ops_version,
        "cann",
        _NPU,
    ),
    Rule("CANN-DRVMATCH", say("CANN's own list names the driver", "CANN 的兼容列表包含该驱动"), driver_match, "cann"),
    Rule(
        "CANN-DEPS",
        say("what CANN's operator compiler imports is installed", "已安装 CANN 算子编译器所需的 Python 包"),
        packages,
        "cann",
        _NPU,
    ),
    Rule(
        "TRITON-ASCEND",
        say("triton-ascend goes with CANN, and nothing wrote over it", "triton-ascend 与 CANN 配套且未被覆盖"),
        triton,
        "cann",
    ),
)
