"""Rules on the CANN toolkit, its environment and NNAL."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.rules.rule import NO_NPU, npu_count, source_command
from ascend_envcheck.snapshot import OK, Snapshot
from ascend_envcheck.versions import cann_version, pairs

_GUIDE = "CANN installation guide: toolkit, then kernels (ops), then set_env.sh, then NNAL"
_NNAL = "/usr/local/Ascend/nnal/atb"


def version_of(snapshot: Snapshot, home: str) -> str | None:
    """The version of a CANN home by its own files, the most exact first; else by the name of its folder."""
    for name, key in (
        ("aarch64-linux/ascend_toolkit_install.info", "version"),
        ("x86_64-linux/ascend_toolkit_install.info", "version"),
        ("share/info/runtime/version.info", "version_dir"),
        ("runtime/version.info", "version_dir"),
        ("compiler/version.info", "version_dir"),
    ):
        found = cann_version(pairs(snapshot.files.get(f"{home}/{name}", "")).get(key, ""))
        if found:
            return found
    # runtime_running_version=[7.3.0.1.231:8.0.RC3]: internal version, then the one that everybody uses.
    running = pairs(snapshot.files.get(f"{home}/version.cfg", "")).get("runtime_running_version", "")
    folder = snapshot.paths.get(home, "").rsplit("/", 1)[-1]
    return cann_version(running.rpartition(":")[2]) or cann_version(folder)


def active_version(snapshot: Snapshot) -> str | None:
    """The version of the CANN home that wins, None without a home or a version."""
    return version_of(snapshot, snapshot.cann_homes[0]) if snapshot.cann_homes else None


def home(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-HOME: there is one toolkit, and its version can be read."""
    homes = snapshot.cann_homes
    versions = {path: version_of(snapshot, path) for path in homes}
    if not homes and npu_count(snapshot) == 0:
        yield Finding("CANN-HOME", Severity.SKIP, NO_NPU)
    elif not homes:
        yield Finding(
            "CANN-HOME",
            Severity.FAIL,
            "no CANN toolkit: neither ASCEND_HOME_PATH nor /usr/local/Ascend/cann nor …/ascend-toolkit/latest",
            command="./Ascend-cann-toolkit_*.run --install && source /usr/local/Ascend/cann/set_env.sh",
            source=_GUIDE,
            blocks=(NPU,),
        )
    elif versions[homes[0]] is None:
        cause = f"CANN at {homes[0]} has no version file that can be read"
        yield Finding("CANN-HOME", Severity.SKIP, cause, doubts=(NPU,))
    elif len({version for version in versions.values() if version}) > 1:
        listed = ", ".join(f"{version or '?'} at {path}" for path, version in versions.items())
        yield Finding(
            "CANN-HOME",
            Severity.WARN,
            f"several CANN versions: {listed}; the first one wins here",
            command="env | grep -E 'ASCEND|LD_LIBRARY_PATH' | tr ':' '\\n'",
            source=_GUIDE,
            doubts=(NPU,),
        )
    else:
        yield Finding("CANN-HOME", Severity.INFO, f"CANN {versions[homes[0]]} at {homes[0]}")


def sourced(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-SOURCED: set_env.sh of the toolkit was sourced in this shell."""
    variables = snapshot.variables
    named = (variables.get("ASCEND_HOME_PATH") or variables.get("ASCEND_TOOLKIT_HOME") or "").rstrip("/")
    if npu_count(snapshot) == 0 or not snapshot.cann_homes:
        why = NO_NPU if npu_count(snapshot) == 0 else "no CANN was found"
        yield Finding("CANN-SOURCED", Severity.SKIP, why)
        return
    if not named:
        cause = "set_env.sh of CANN was not sourced in this shell: ASCEND_HOME_PATH is not set"
    elif named not in snapshot.paths:
        cause = f"ASCEND_HOME_PATH names {named}, which does not exist"
    elif not _on_library_path(snapshot, snapshot.paths[named]):
        cause = f"LD_LIBRARY_PATH has no folder of {named}: it was set again after set_env.sh was sourced"
    else:
        yield Finding("CANN-SOURCED", Severity.INFO, f"set_env.sh of {named} was sourced")
        return
    yield Finding(
        "CANN-SOURCED",
        Severity.FAIL,
        cause,
        command=source_command(_set_env(snapshot)),
        source=_GUIDE,
        blocks=(NPU,),
    )


def _entries(snapshot: Snapshot) -> list[str]:
    return [entry.rstrip("/") for entry in snapshot.variables.get("LD_LIBRARY_PATH", "").split(":") if entry]


def _on_library_path(snapshot: Snapshot, folder: str) -> bool:
    return any(
        (snapshot.paths.get(entry) or snapshot.paths.get(entry + "/", "") + "/").startswith(folder + "/")
        for entry in _entries(snapshot)
    )


def _set_env(snapshot: Snapshot) -> str:
    """The set_env.sh that is there: in the home (CANN 8.5 and newer), or beside it (older)."""
    for path in snapshot.cann_homes:
        for script in (f"{path}/set_env.sh", path.rsplit("/", 1)[0] + "/set_env.sh"):
            if script in snapshot.paths:
                return script
    return "/usr/local/Ascend/cann/set_env.sh"


def nnal_library(snapshot: Snapshot) -> Iterable[Finding]:
    """NNAL-LIB: NNAL is installed and was sourced, so that the loader finds libatb.so."""
    if npu_count(snapshot) == 0:
        yield Finding("NNAL-LIB", Severity.SKIP, NO_NPU)
    elif "libatb.so" in snapshot.libraries:
        yield Finding("NNAL-LIB", Severity.INFO, f"libatb.so is in {snapshot.libraries['libatb.so']}")
    else:
        installed = _NNAL in snapshot.paths or bool(snapshot.variables.get("ATB_HOME_PATH"))
        works = snapshot.imports.torch_npu == OK
        source = source_command(f"{_NNAL}/set_env.sh") + "   # after CANN's set_env.sh, with the Python in use active"
        yield Finding(
            "NNAL-LIB",
            Severity.WARN if works else Severity.FAIL,
            f"NNAL is {'installed but not sourced' if installed else 'not installed'}: "
            "no folder of LD_LIBRARY_PATH has libatb.so",
            command=source if installed else f"./Ascend-cann-nnal_*.run --install && {source}",
            source="MindSpeed-MM FAQ, libatb.so; https://github.com/vllm-project/vllm-ascend/issues/152",
            blocks=() if works else (NPU,),
            doubts=(NPU,),
        )
