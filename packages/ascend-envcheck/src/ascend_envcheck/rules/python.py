"""Rules on the interpreter."""

from __future__ import annotations

from typing import Iterable

from ascend_envcheck.findings import EVERY_DEVICE, NPU, Finding, Severity
from ascend_envcheck.messages import Message, say
from ascend_envcheck.rules.rule import NOT_LIVE, Rule
from ascend_envcheck.snapshot import FAILED, NOT_RUN, OK, Snapshot
from ascend_envcheck.tables import find_torch_npu
from ascend_envcheck.versions import release

OLDEST_PYTHON = (3, 10, 0)

_NEW_PYTHON = "conda create -y -n ascend python=3.11 && conda activate ascend"


def python_version(snapshot: Snapshot) -> Iterable[Finding]:
    """PY-VER: the packages need 3.10, an installed torch_npu has its own span."""
    version = snapshot.python.version
    given = release(version)
    if given is None:
        cause = say(
            "no Python version to read in {version!r}", "无法从 {version!r} 中读出 Python 版本", version=version
        )
        yield Finding("PY-VER", Severity.SKIP, cause, doubts=EVERY_DEVICE)
    elif given < OLDEST_PYTHON:
        yield Finding(
            "PY-VER",
            Severity.FAIL,
            say(
                "Python {version}: mm-finetune and its siblings need 3.10 or newer",
                "Python {version}：mm-finetune 等软件包需要 3.10 或更新版本",
                version=version,
            ),
            command=_NEW_PYTHON,
            source="requires-python of mm-finetune",
            blocks=EVERY_DEVICE,
        )
    else:
        new_enough = say("Python {version} is new enough (3.10)", "Python {version} 满足要求（3.10）", version=version)
        yield _python_of_torch_npu(snapshot, f"{given[0]}.{given[1]}") or Finding("PY-VER", Severity.INFO, new_enough)


def _python_of_torch_npu(snapshot: Snapshot, python: str) -> Finding | None:
    installed = snapshot.distributions.get("torch_npu")
    row = find_torch_npu(installed.version) if installed else None
    if row is None or not row.python_documented:
        return None
    values = {"python": python, "version": row.torch_npu, "span": row.python_documented}
    if row.supports(python):
        cause = say("Python {python} fits torch_npu {version}", "Python {python} 受 torch_npu {version} 支持", **values)
        return Finding("PY-VER", Severity.INFO, cause, source=row.note)
    cause = say(
        "Python {python}: torch_npu {version} is documented for {span}",
        "Python {python}：torch_npu {version} 的文档支持范围是 {span}",
        **values,
    )
    return Finding("PY-VER", Severity.WARN, cause, command=_NEW_PYTHON, source=row.note, doubts=(NPU,))


def one_python(snapshot: Snapshot) -> Iterable[Finding]:
    """PY-EXE: what was judged is the Python of the active environment, and its packages do not contradict."""
    python, active = snapshot.python, _active_environment(snapshot)
    values = {"executable": python.executable, "on_path": python.on_path or "?", "active": active}
    if not snapshot.host.live:
        yield Finding("PY-EXE", Severity.SKIP, NOT_LIVE)
    elif active and not f"{python.executable}/".startswith(f"{active}/") and not _is_on_path(snapshot):
        yield Finding(
            "PY-EXE",
            Severity.WARN,
            say(
                "judged is {executable}, the active environment is {active}: its packages may be others",
                "检查的是 {executable}，而当前激活的环境是 {active}：二者的软件包可能不同",
                **values,
            ),
            command="python3 -m ascend_envcheck check   # of the environment that is meant",
            source="VIRTUAL_ENV and CONDA_PREFIX",
            doubts=EVERY_DEVICE,
        )
    elif not _is_on_path(snapshot):
        cause = say(
            "judged is {executable}; python3 on PATH is {on_path}",
            "检查的是 {executable}；PATH 中的 python3 是 {on_path}",
            **values,
        )
        yield Finding("PY-EXE", Severity.INFO, cause)
    else:
        yield Finding("PY-EXE", Severity.INFO, say("judged is {executable}", "检查的是 {executable}", **values))
    yield from _conflicts(snapshot)


def _active_environment(snapshot: Snapshot) -> str:
    variables = snapshot.variables
    return (variables.get("VIRTUAL_ENV") or variables.get("CONDA_PREFIX") or "").rstrip("/")


def _is_on_path(snapshot: Snapshot) -> bool:
    """By folder: the interpreters of all virtual environments are links to one file."""
    folders = [path.rpartition("/")[0] for path in (snapshot.python.executable, snapshot.python.on_path)]
    return folders[0] == folders[1]


def _conflicts(snapshot: Snapshot) -> Iterable[Finding]:
    """The contradictions that pip sees among the packages that matter here."""
    asked = snapshot.command("python -m pip check")
    if asked.outcome in (NOT_RUN, OK) or asked.outcome != FAILED or "No module named pip" in asked.output:
        return
    lines = [line.strip() for line in asked.output.splitlines() if " requires " in line or " has requirement " in line]
    known = {name.lower().replace("_", "-") for name in snapshot.distributions}
    ours = [line for line in lines if line.split()[0].lower().replace("_", "-") in known]
    if ours:
        cause: Message = say(
            "pip sees a contradiction among the packages: {line}{more}",
            "pip 发现软件包依赖冲突：{line}{more}",
            line=ours[0][:300],
            more=say(" (and {count} more)", "（另有 {count} 处）", count=len(ours) - 1) if len(ours) > 1 else "",
        )
        yield Finding("PY-EXE", Severity.WARN, cause, command="python3 -m pip check", source="pip check")


RULES = (
    Rule(
        "PY-VER",
        say("Python is 3.10 or newer, and one that torch_npu supports", "Python 不低于 3.10，且受 torch_npu 支持"),
        python_version,
        "python",
        EVERY_DEVICE,
    ),
    Rule(
        "PY-EXE",
        say("one Python, whose packages do not contradict", "使用同一个 Python，且软件包依赖无冲突"),
        one_python,
        "python",
    ),
)
