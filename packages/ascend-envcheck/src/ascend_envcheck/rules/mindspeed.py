"""Rules on MindSpeed-MM, which is used as a clone with a copy of Megatron beside it."""

from __future__ import annotations

import re
from typing import Iterable

from ascend_envcheck.findings import NPU, TRAIN, Finding, Severity
from ascend_envcheck.messages import Message, joined, say
from ascend_envcheck.rules.rule import Rule, quoted_path
from ascend_envcheck.rules.torch_stack import version_of
from ascend_envcheck.snapshot import Snapshot
from ascend_envcheck.tables import records
from ascend_envcheck.versions import release

_PACKAGE_INFO = "/megatron/core/package_info.py"
_NOT_HERE = say("MindSpeed-MM is not here", "没有 MindSpeed-MM")
_BRANCH = re.compile(r"_core_r(\d+\.\d+\.\d+)\s*$")
_FAQ = "Ascend/MindSpeed-MM docs/zh/FAQ.md"


def clone(snapshot: Snapshot) -> str | None:
    """The folder of a clone of MindSpeed-MM, "" when only its distribution is installed, None without it."""
    found = next((path for path in sorted(snapshot.paths) if path.endswith("/mindspeed_mm")), None)
    if found is not None:
        return found.rpartition("/")[0]
    return "" if "mindspeed-mm" in snapshot.distributions else None


def megatron_version(snapshot: Snapshot) -> str | None:
    """The version of the Megatron beside MindSpeed-MM, else of the installed megatron-core."""
    text = snapshot.files.get(f"{clone(snapshot) or ''}{_PACKAGE_INFO}", "")
    parts = [re.search(rf"^{name}\s*=\s*(\d{{1,4}})", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    numbers = [part[1] for part in parts if part]
    return ".".join(numbers) if len(numbers) == len(parts) else version_of(snapshot, "megatron-core")


def megatron(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-MEGATRON: the Megatron that MindSpeed-MM imports is here, in the version that it was made for."""
    folder, found = clone(snapshot), megatron_version(snapshot)
    if folder is None:
        yield Finding("MM-MEGATRON", Severity.SKIP, _NOT_HERE)
        return
    rows = records("mindspeed_mm")
    mine = [row for row in rows if release(row["mindspeed_mm"]) == release(version_of(snapshot, "mindspeed-mm") or "")]
    wanted = list(dict.fromkeys(row["megatron_core"] for row in (mine or rows)))
    if found is None and f"{folder}/megatron" not in snapshot.paths:
        cause = say(
            "there is no megatron folder beside mindspeed_mm in {folder}, and no megatron-core is installed",
            "{folder} 中 mindspeed_mm 旁没有 megatron 目录，也未安装 megatron-core",
            folder=folder or "?",
        )
        yield _get_megatron(cause, Severity.FAIL, wanted[0], folder)
    elif found is None:
        cause = say(
            "the version of megatron in {folder} can't be read", "无法读取 {folder} 中 megatron 的版本", folder=folder
        )
        yield Finding("MM-MEGATRON", Severity.SKIP, cause)
    elif found in wanted:
        cause = say("Megatron is core {found}", "Megatron 为 core {found}", found=found)
        yield Finding("MM-MEGATRON", Severity.INFO, cause, source=rows[0]["source"])
    else:
        cause = say(
            "Megatron is core {found}, MindSpeed-MM is made for {wanted}",
            "Megatron 为 core {found}，MindSpeed-MM 配套的是 {wanted}",
            found=found,
            wanted=" / ".join(wanted),
        )
        yield _get_megatron(cause, Severity.WARN, wanted[0], folder)


def _get_megatron(cause: Message, severity: Severity, version: str, folder: str) -> Finding:
    command = (
        f"git clone -b core_v{version} https://github.com/NVIDIA/Megatron-LM && "
        f"cp -r Megatron-LM/megatron {quoted_path(folder) if folder else '<MindSpeed-MM>'}/"
    )
    blocks = (NPU,) if severity is Severity.FAIL else ()
    return Finding("MM-MEGATRON", severity, cause, command=command, source=_FAQ, blocks=blocks)


def mindspeed(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-MINDSPEED: MindSpeed is here, and its branch is made for the Megatron that is here."""
    adaptor = next((path for path in sorted(snapshot.paths) if path.endswith("/mindspeed/megatron_adaptor.py")), None)
    core, found = _branch_core(snapshot, adaptor), megatron_version(snapshot)
    rows = records("mindspeed_mm")
    if clone(snapshot) is None:
        yield Finding("MM-MINDSPEED", Severity.SKIP, _NOT_HERE)
    elif adaptor is None and "mindspeed" not in snapshot.distributions:
        cause = say(
            "MindSpeed-MM is here, MindSpeed is not: `import mindspeed.megatron_adaptor` fails",
            "有 MindSpeed-MM 但没有 MindSpeed：`import mindspeed.megatron_adaptor` 会失败",
        )
        yield _get_mindspeed(cause, rows[0]["mindspeed"])
    elif core is not None and found is not None and core != found:
        cause = say(
            "MindSpeed is of the branch for Megatron core {core}, here is core {found}",
            "MindSpeed 所在分支面向 Megatron core {core}，而此处是 core {found}",
            core=core,
            found=found,
        )
        branch = next((row["mindspeed"] for row in rows if row["megatron_core"] == found), rows[0]["mindspeed"])
        yield _get_mindspeed(cause, branch)
    else:
        version = version_of(snapshot, "mindspeed") or (f"core_r{core}" if core else "?")
        cause = say("MindSpeed is here ({version})", "已有 MindSpeed（{version}）", version=version)
        yield Finding("MM-MINDSPEED", Severity.INFO, cause)


def _branch_core(snapshot: Snapshot, adaptor: str | None) -> str | None:
    """The Megatron that a clone of MindSpeed is made for, by its branch: 2.3.0_core_r0.12.1."""
    root = adaptor[: -len("/mindspeed/megatron_adaptor.py")] if adaptor else ""
    found = _BRANCH.search(snapshot.files.get(f"{root}/.git/HEAD", ""))
    return found[1] if found else None


def _get_mindspeed(cause: Message, branch: str) -> Finding:
    command = f"git clone -b {branch} https://gitcode.com/Ascend/MindSpeed && pip install -e MindSpeed"
    return Finding("MM-MINDSPEED", Severity.WARN, cause, command=command, source=_FAQ, doubts=(NPU,))


def dependencies(snapshot: Snapshot) -> Iterable[Finding]:
    """MM-DEPS: decord, apex and ffmpeg, which the scripts of MindSpeed-MM use and pip can't always get."""
    if clone(snapshot) is None:
        yield Finding("MM-DEPS", Severity.SKIP, _NOT_HERE)
        return
    missing = [name for name in ("decord", "apex") if name not in snapshot.distributions]
    missing += [] if any(path.endswith("/ffmpeg") for path in snapshot.paths) else ["ffmpeg"]
    if not missing:
        cause = say("decord, apex and ffmpeg are here", "decord、apex、ffmpeg 均已安装")
        yield Finding("MM-DEPS", Severity.INFO, cause)
        return
    command = {
        "decord": "pip install eva-decord   # or build decord, which has no aarch64 wheel",
        "apex": "git clone https://gitcode.com/Ascend/apex && cd apex && bash scripts/build.sh --python=3.10",
        "ffmpeg": "sudo apt-get install ffmpeg   # or: conda install -c conda-forge ffmpeg",
    }[missing[0]]
    cause = say(
        "scripts of MindSpeed-MM use {missing}, not installed",
        "MindSpeed-MM 的脚本会用到 {missing}，尚未安装",
        missing=joined(missing, ", ", "、"),
    )
    yield Finding("MM-DEPS", Severity.WARN, cause, command=command, source="Ascend/MindSpeed-MM examples/wan2.1")


RULES = (
    Rule(
        "MM-MEGATRON",
        say("the Megatron that MindSpeed-MM imports is here", "已有 MindSpeed-MM 所需的 Megatron"),
        megatron,
        "python",
        (),
        (TRAIN,),
    ),
    Rule(
        "MM-MINDSPEED",
        say("MindSpeed is here and made for this Megatron", "已有 MindSpeed 且与 Megatron 配套"),
        mindspeed,
        "python",
        (),
        (TRAIN,),
    ),
    Rule(
        "MM-DEPS",
        say("decord, apex and ffmpeg are here for MindSpeed-MM", "已有 MindSpeed-MM 所需的 decord、apex、ffmpeg"),
        dependencies,
        "python",
        (),
        (TRAIN,),
    ),
)
