"""Rules on the CANN toolkit: which one, whether this shell sees it, whether the loader finds the right libraries."""

from __future__ import annotations

import re
from typing import Iterable

from ascend_envcheck.findings import NPU, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.rules.rule import NO_NPU, Rule, npu_count, source_command
from ascend_envcheck.snapshot import NOT_RUN, OK, CommandFacts, Snapshot
from ascend_envcheck.tables import DATA_DATE, known_canns
from ascend_envcheck.versions import cann_order, cann_version, pairs

GUIDE = "CANN installation guide: toolkit, then operators (ops), then set_env.sh, then NNAL"
NO_CANN = say("no CANN was found", "没有找到 CANN")

_VERSION_FILES = (
    ("aarch64-linux/ascend_toolkit_install.info", "version"),
    ("x86_64-linux/ascend_toolkit_install.info", "version"),
    ("share/info/runtime/version.info", "version_dir"),
    ("runtime/version.info", "version_dir"),
    ("compiler/version.info", "version_dir"),
)
"""Beneath a CANN home, the most exact first."""

_CORE_LIBRARIES = ("libascendcl.so", "libhccl.so", "libruntime.so", "libge_runner.so")
_ROOT_OF_CANN = re.compile(r".*?/(?:ascend-toolkit/[^/]+|cann-[^/]+)/")
_STUBS = ("devlib", "stub")
_SHOW_PATHS = "env | grep -E '^(ASCEND|LD_LIBRARY_PATH)' | tr ':' '\\n'"


def version_of(snapshot: Snapshot, home: str) -> str | None:
    """The version of a CANN home by its own files, the most exact first; else by the name of its folder."""
    for _, version in stated_versions(snapshot, home):
        return version
    # runtime_running_version=[7.3.0.1.231:8.0.RC3]: internal version, then the one that everybody uses.
    running = pairs(snapshot.files.get(f"{home}/version.cfg", "")).get("runtime_running_version", "")
    folder = snapshot.paths.get(home, "").rsplit("/", 1)[-1]
    return cann_version(running.rpartition(":")[2]) or cann_version(folder)


def stated_versions(snapshot: Snapshot, home: str) -> list[tuple[str, str]]:
    """The version files of a home that name a version: file and version."""
    found = []
    for name, key in _VERSION_FILES:
        version = cann_version(pairs(snapshot.files.get(f"{home}/{name}", "")).get(key, ""))
        if version:
            found.append((name, version))
    return found


def active_version(snapshot: Snapshot) -> str | None:
    """The version of the CANN home that wins, None without a home or a version."""
    return version_of(snapshot, snapshot.cann_homes[0]) if snapshot.cann_homes else None


def why_not(snapshot: Snapshot) -> Message | None:
    """Why a rule on CANN and the NPU has nothing to judge; None when it has."""
    if npu_count(snapshot) == 0:
        return NO_NPU
    return None if snapshot.cann_homes else NO_CANN


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
            say(
                "no CANN toolkit: neither ASCEND_HOME_PATH nor /usr/local/Ascend/cann nor …/ascend-toolkit/latest",
                "没有 CANN toolkit：ASCEND_HOME_PATH、/usr/local/Ascend/cann、…/ascend-toolkit/latest 均不存在",
            ),
            command="./Ascend-cann-toolkit_*.run --install && source /usr/local/Ascend/cann/set_env.sh",
            source=GUIDE,
            blocks=(NPU,),
        )
    elif versions[homes[0]] is None:
        cause = say(
            "CANN at {home} has no version file that can be read", "{home} 的 CANN 没有可读的版本文件", home=homes[0]
        )
        yield Finding("CANN-HOME", Severity.SKIP, cause, doubts=(NPU,))
    elif len({version for version in versions.values() if version}) > 1:
        places = [
            say("{version} at {path}", "{path} 中的 {version}", version=found or "?", path=path)
            for path, found in versions.items()
        ]
        yield Finding(
            "CANN-HOME",
            Severity.WARN,
            say(
                "several CANN versions: {listed}; the first one wins here",
                "存在多个 CANN 版本：{listed}；当前生效的是第一个",
                listed=joined(places, ", ", "、"),
            ),
            command=_SHOW_PATHS,
            source=GUIDE,
            doubts=(NPU,),
        )
    else:
        cause = say("CANN {version} at {home}", "{home} 中的 CANN {version}", version=versions[homes[0]], home=homes[0])
        yield Finding("CANN-HOME", Severity.INFO, cause)


def version(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-VER: the version files of the active toolkit agree, and the tables know the version."""
    found = active_version(snapshot)
    if not snapshot.cann_homes or found is None:
        why = say("the version of CANN can't be read", "无法读取 CANN 版本") if snapshot.cann_homes else NO_CANN
        yield Finding("CANN-VER", Severity.SKIP, why)
        return
    stated = stated_versions(snapshot, snapshot.cann_homes[0])
    newest = max(known_canns(), key=cann_order)
    if len({each for _, each in stated}) > 1:
        yield Finding(
            "CANN-VER",
            Severity.WARN,
            say(
                "the parts of CANN at {home} are of different versions: {listed}",
                "{home} 中 CANN 各部分的版本不一致：{listed}",
                home=snapshot.cann_homes[0],
                listed=", ".join(f"{name}: {each}" for name, each in stated),
            ),
            command="./Ascend-cann-toolkit_*.run --install   # whole, into a folder of its own",
            source=GUIDE,
            doubts=(NPU,),
        )
    elif cann_order(found) > cann_order(newest):
        cause = say(
            "CANN {version} is unknown to this tool, whose tables end at {newest} ({date})",
            "本工具不认识 CANN {version}，其数据表截至 {newest}（{date}）",
            version=found,
            newest=newest,
            date=DATA_DATE,
        )
        yield Finding("CANN-VER", Severity.WARN, cause, doubts=(NPU,))
    else:
        by = stated[0][0] if stated else "version.cfg, or the name of the folder"
        cause = say("CANN is {version}, by {by}", "CANN 版本为 {version}，依据 {by}", version=found, by=by)
        yield Finding("CANN-VER", Severity.INFO, cause)


def sourced(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-SOURCED: set_env.sh of the toolkit was sourced in this shell, and nothing was lost of it since."""
    why = why_not(snapshot)
    if why is not None:
        yield Finding("CANN-SOURCED", Severity.SKIP, why)
        return
    fault = _not_sourced(snapshot)
    lost = [name for name in ("PYTHONPATH", "PATH") if not _has_folder_of_home(snapshot, name)]
    command = source_command(set_env(snapshot))
    if fault is not None:
        yield Finding("CANN-SOURCED", Severity.FAIL, fault, command=command, source=GUIDE, blocks=(NPU,))
    elif lost:
        cause = say(
            "{lost} has no folder of CANN, it was set again after set_env.sh: operators that are compiled here fail",
            "{lost} 中没有 CANN 的目录，可能在 source set_env.sh 之后被重新赋值：需要在线编译的算子会失败",
            lost=joined(lost, ", ", "、"),
        )
        yield Finding("CANN-SOURCED", Severity.WARN, cause, command=command, source=GUIDE, doubts=(NPU,))
    else:
        cause = say("set_env.sh of {home} was sourced", "已 source {home} 的 set_env.sh", home=_named(snapshot))
        yield Finding("CANN-SOURCED", Severity.INFO, cause)


def _named(snapshot: Snapshot) -> str:
    variables = snapshot.variables
    return (variables.get("ASCEND_HOME_PATH") or variables.get("ASCEND_TOOLKIT_HOME") or "").rstrip("/")


def _not_sourced(snapshot: Snapshot) -> Message | None:
    named = _named(snapshot)
    if not named:
        return say(
            "set_env.sh of CANN was not sourced in this shell: ASCEND_HOME_PATH is not set",
            "当前 shell 未 source CANN 的 set_env.sh：未设置 ASCEND_HOME_PATH",
        )
    if named not in snapshot.paths:
        return say(
            "ASCEND_HOME_PATH names {home}, which does not exist", "ASCEND_HOME_PATH 指向的 {home} 不存在", home=named
        )
    if not _has_folder_of_home(snapshot, "LD_LIBRARY_PATH"):
        return say(
            "LD_LIBRARY_PATH has no folder of {home}: it was set again after set_env.sh was sourced",
            "LD_LIBRARY_PATH 中没有 {home} 的目录：可能在 source set_env.sh 之后被重新赋值",
            home=named,
        )
    return None


def entries(snapshot: Snapshot, name: str) -> list[str]:
    """The folders of a search path."""
    return [entry.rstrip("/") for entry in snapshot.variables.get(name, "").split(":") if entry]


def _has_folder_of_home(snapshot: Snapshot, name: str) -> bool:
    """By name or by what it resolves to: `latest` is a link in some installations, a folder of links in others."""
    named = _named(snapshot)
    target = snapshot.paths.get(named, named)
    for entry in entries(snapshot, name):
        resolved = snapshot.paths.get(entry) or snapshot.paths.get(entry + "/", entry)
        if f"{entry}/".startswith(f"{named}/") or f"{resolved}/".startswith(f"{target}/"):
            return True
    return False


def set_env(snapshot: Snapshot) -> str:
    """The set_env.sh that is there: in the home (CANN 8.5 and newer), or beside it (older)."""
    for path in snapshot.cann_homes:
        for script in (f"{path}/set_env.sh", path.rsplit("/", 1)[0] + "/set_env.sh"):
            if script in snapshot.paths:
                return script
    return "/usr/local/Ascend/cann/set_env.sh"


def libraries(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-LIBS: the loader can load CANN's core libraries."""
    broken = {name: snapshot.loads[name] for name in _CORE_LIBRARIES if _is_broken(snapshot.loads.get(name))}
    why = why_not(snapshot)
    if why is None and not snapshot.loads:
        why = say("loading CANN's libraries was not tried", "未尝试加载 CANN 的库")
    if why is None and _not_sourced(snapshot) is not None:
        why = say("set_env.sh was not sourced, see CANN-SOURCED", "未 source set_env.sh，见 CANN-SOURCED")
    if why is not None:
        yield Finding("CANN-LIBS", Severity.SKIP, why)
    elif broken:
        listed = joined(f"{name} ({each.outcome}): {each.detail}" for name, each in broken.items())
        yield Finding(
            "CANN-LIBS",
            Severity.FAIL,
            say("the loader can't load {listed}", "加载失败：{listed}", listed=listed),
            command=f"LD_DEBUG=libs python3 -c \"import ctypes; ctypes.CDLL('{next(iter(broken))}')\" 2>&1 | tail -20",
            source="outcome of dlopen in a child process",
            blocks=(NPU,),
        )
    else:
        cause = say("the loader loads CANN's core libraries", "CANN 的核心库均可加载")
        yield Finding("CANN-LIBS", Severity.INFO, cause)


def _is_broken(load: CommandFacts | None) -> bool:
    return load is not None and load.outcome not in (OK, NOT_RUN)


def stubs(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-STUB: the driver's own libraries come before CANN's empty ones."""
    if npu_count(snapshot) == 0:
        yield Finding("CANN-STUB", Severity.SKIP, NO_NPU)
        return
    path = entries(snapshot, "LD_LIBRARY_PATH")
    stub = next((place for place, entry in enumerate(path) if is_stub(entry)), None)
    driver = next((place for place, entry in enumerate(path) if "/driver/lib64" in entry), len(path))
    if stub is None or driver < stub:
        cause = say("no stub library comes before the driver's", "驱动库之前没有桩库")
        yield Finding("CANN-STUB", Severity.INFO, cause)
        return
    yield Finding(
        "CANN-STUB",
        Severity.FAIL,
        say(
            "LD_LIBRARY_PATH has {folder} before any driver/lib64: its empty libraries stand in for the driver, and "
            "opening an NPU gives ACL error 100039; set_env.sh adds it when it does not find the driver",
            "LD_LIBRARY_PATH 中 {folder} 位于 driver/lib64 之前：加载到的是桩库而不是驱动，"
            "打开 NPU 会报 ACL 错误 100039；set_env.sh 找不到驱动时会加入该目录",
            folder=path[stub],
        ),
        command="export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64/common:"
        "/usr/local/Ascend/driver/lib64/driver:$(echo $LD_LIBRARY_PATH | tr ':' '\\n' | grep -v devlib | paste -sd:)",
        source="set_env.sh of CANN 8.5; ACL error 100039",
        blocks=(NPU,),
    )


def is_stub(folder: str) -> bool:
    """Whether a folder holds libraries to link with, which do nothing when called."""
    return folder.rstrip("/").rsplit("/", 1)[-1] in _STUBS


def duplicates(snapshot: Snapshot) -> Iterable[Finding]:
    """CANN-DUP: no library of CANN is on the loader's path in two builds."""
    doubles = {name: _builds(snapshot, name) for name in sorted(snapshot.libraries)}
    doubles = {name: folders for name, folders in doubles.items() if len(folders) > 1}
    if not snapshot.libraries:
        cause = say("LD_LIBRARY_PATH has no library of CANN", "LD_LIBRARY_PATH 中没有 CANN 的库")
        yield Finding("CANN-DUP", Severity.SKIP, cause)
    for name, folders in doubles.items():
        yield Finding(
            "CANN-DUP",
            Severity.WARN,
            say(
                "{name} is on LD_LIBRARY_PATH in several builds: {folders}; the first one is loaded",
                "LD_LIBRARY_PATH 中有多个不同构建的 {name}：{folders}；加载的是第一个",
                name=name,
                folders=joined(folders, ", ", "、"),
            ),
            command=_SHOW_PATHS,
            source=GUIDE,
            doubts=(NPU,),
        )
    if snapshot.libraries and not doubles:
        cause = say("each library of CANN is on LD_LIBRARY_PATH once", "CANN 的每个库在 LD_LIBRARY_PATH 中只有一份")
        yield Finding("CANN-DUP", Severity.INFO, cause)


def _builds(snapshot: Snapshot, name: str) -> list[str]:
    """The folders whose builds of a library differ by what they belong to; a CANN may list its own several times."""
    found: dict[str, str] = {}
    for folder in snapshot.libraries[name]:
        if not is_stub(folder):
            file = snapshot.paths.get(f"{folder}/{name}", f"{folder}/{name}")
            root = _ROOT_OF_CANN.match(file)
            found.setdefault(root[0] if root else file.rpartition("/")[0], folder)
    return list(found.values())


_NPU = (NPU,)

RULES = (
    Rule("CANN-HOME", say("one CANN toolkit is here", "存在唯一的 CANN toolkit"), home, "cann", _NPU),
    Rule(
        "CANN-VER",
        say("the parts of CANN are of one known version", "CANN 各部分版本一致且为已知版本"),
        version,
        "cann",
        _NPU,
    ),
    Rule("CANN-SOURCED", say("CANN's set_env.sh was sourced", "已 source CANN 的 set_env.sh"), sourced, "cann", _NPU),
    Rule("CANN-LIBS", say("CANN's core libraries load", "CANN 的核心库可以加载"), libraries, "cann", _NPU),
    Rule(
        "CANN-STUB",
        say("no stub library stands in for the driver", "没有桩库顶替驱动库"),
        stubs,
        "cann",
        _NPU,
    ),
    Rule(
        "CANN-DUP",
        say("no library of CANN is there in two builds", "CANN 的库没有重复的不同构建"),
        duplicates,
        "cann",
        _NPU,
    ),
)
